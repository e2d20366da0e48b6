"""A network from the arguments of the published constructor, by which test vectors name sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plain import GATES

from pid_lightning.nn import AdapterConfig, Geometry, PiD, PiDConfig

# What makes the authors' v1 arguments those of v1.5.
V15 = {
    "lq_gate_type": "sigma_aware_per_token",
    "lq_conv_padding_mode": "replicate",
    "pit_lq_inject": True,
    "lq_aux_rgb_head": True,
}
ROPES = {"ntk_aware": True, "original": False}


def build_from_arguments(arguments: Mapping[str, Any]) -> PiD:
    """An untrained network; missing arguments take the published defaults."""
    get = arguments.get
    assert not get("lq_in_channels", 0)
    assert get("use_text_rope", True)
    reference = (get("rope_ref_h", 1024), get("rope_ref_w", 1024))
    rgb_head_block = get("lq_aux_rgb_head_latent_block_idx", -1)
    gates = {theirs: ours for ours, theirs in GATES.items()}
    width, num_heads = get("hidden_size", 1152), get("num_groups", 16)
    config = PiDConfig(
        width=width,
        num_heads=num_heads,
        num_blocks=get("patch_depth", 26),
        patch_size=get("patch_size", 16),
        pixel_width=get("pixel_hidden_size", 64),
        pixel_attention_width=get("pixel_attn_hidden_size") or width,
        pixel_num_heads=get("pixel_num_groups") or num_heads,
        num_pixel_blocks=get("pixel_depth", 2),
        text_width=get("txt_embed_dim", 4096),
        text_length=get("txt_max_length", 1024),
        learned_null=False,
        rope_reference=reference if ROPES[get("rope_mode", "ntk_aware")] else None,
        adapter=AdapterConfig(
            width=get("lq_hidden_dim", 512),
            num_res_blocks=get("lq_num_res_blocks", 4),
            interval=get("lq_interval", 1),
            gate=gates[get("lq_gate_type", GATES["channel"])],
            padding=get("lq_conv_padding_mode", "zeros"),
            inject_pixels=get("pit_lq_inject", False),
            rgb_head=get("lq_aux_rgb_head", False),
            rgb_head_block=rgb_head_block if rgb_head_block > 0 else None,
            unpack=get("lq_latent_unpatchify_factor", 1),
        ),
    )
    geometry = Geometry(
        latent_channels=get("lq_latent_channels", 0),
        latent_stride=get("latent_spatial_down_factor", 8),
        scale=get("sr_scale", 4),
    )
    return PiD(config, geometry)
