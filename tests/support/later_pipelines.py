"""Pipelines of diffusers 0.42 with tiny random networks; see `tiny_pipelines`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_bria_fibo2 import BriaFibo2Transformer2DModel
from diffusers.pipelines.bria_fibo2.pipeline_bria_fibo2 import BriaFibo2Pipeline
from tiny_pipelines import (
    HEIGHT,
    WIDTH,
    Tiny,
    dynamic_shift,
    flux2_vae,
    random_tensor,
    randomise,
)
from torch import Tensor

from pid_lightning.encoders.latent_spaces import FLUX2

PACKED = (1, 128, HEIGHT // 16, WIDTH // 16)


def wan_vae() -> Any:
    return randomise(diffusers.AutoencoderKLWan(base_dim=4, num_res_blocks=1), std=0.2)


def qwen21_vae() -> Any:
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, num_res_blocks=1, dim_mult=[1, 1, 1, 1, 1]
    )
    return randomise(vae, std=0.2)


def dc_vae() -> Any:
    sizes = {
        "encoder_block_out_channels": (8, 8, 8, 8, 8, 32),
        "decoder_block_out_channels": (8, 8, 8, 8, 8, 32),
    }
    layers = {"encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (1,) * 6}
    scales = {"encoder_qkv_multiscales": ((),) * 6, "decoder_qkv_multiscales": ((),) * 6}
    vae = diffusers.AutoencoderDC(
        **sizes, **layers, **scales, scaling_factor=0.41407, attention_head_dim=8
    )
    return randomise(vae)


def tiny_vae(latent_channels: int = 16) -> Any:
    sizes = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    vae = diffusers.AutoencoderTiny(**sizes, **blocks, latent_channels=latent_channels)
    return randomise(vae, std=0.3)


def ideogram_vae() -> Any:
    """FLUX.2's statistics, by cell and then channel, as Ideogram 4 applies them to its tokens."""
    vae = flux2_vae()
    for buffer, name in ((vae.bn.running_mean, "mean"), (vae.bn.running_var, "variance")):
        buffer.copy_(torch.tensor(FLUX2[name]).unflatten(0, (32, 4)).T.flatten())
    return vae


def wan() -> Tiny:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=randomise(transformer),
        vae=wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )
    text = {"prompt_embeds": random_tensor(1, 3, 16), "guidance_scale": 1.0, "num_frames": 1}
    return Tiny(pipe, text, (1, 16, 1, HEIGHT // 8, WIDTH // 8))


def sana() -> Tiny:
    transformer = diffusers.SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    pipe = diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=dc_vae(),
        transformer=randomise(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )
    text = {
        "prompt_embeds": random_tensor(1, 3, 16),
        "prompt_attention_mask": torch.ones(1, 3),
        "negative_prompt_embeds": random_tensor(1, 3, 16, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 3),
        "negative_prompt": None,
        "use_resolution_binning": False,
    }
    return Tiny(pipe, text, (1, 32, HEIGHT // 32, WIDTH // 32))


class Processor:
    """What the constructor of Qwen-Image 2.1's pipeline asks of its processor."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *given: Any, **more: Any) -> list[list[int]]:
        return [[0]]


def qwen21() -> Tiny:
    transformer = diffusers.QwenImage21Transformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = diffusers.QwenImage21Pipeline(
        scheduler=dynamic_shift(),
        vae=qwen21_vae(),
        text_encoder=None,
        processor=Processor(),
        transformer=randomise(transformer),
    )
    text = {
        "prompt_embeds": random_tensor(1, 4, 16),
        "negative_prompt_embeds": random_tensor(1, 4, 16, seed=1),
        "true_cfg_scale": 2.0,
    }
    return Tiny(pipe, text, (1, HEIGHT * WIDTH // 256, 64))


def ideogram() -> Tiny:
    def transformer() -> Any:
        return randomise(
            diffusers.Ideogram4Transformer2DModel(
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                intermediate_size=16,
                adaln_dim=16,
                llm_features_dim=16,
                mrope_section=(4, 2, 2),
            )
        )

    pipe = diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=ideogram_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )

    def encode_prompt(grid_h: int, grid_w: int, **more: Any) -> tuple[Tensor, ...]:
        ids = pipe._prepare_ids([3], grid_h, grid_w, 3, torch.device("cpu"))
        return random_tensor(1, 3 + grid_h * grid_w, 16), *ids

    pipe.encode_prompt = encode_prompt
    text = {
        "prompt": "a",
        "max_sequence_length": 3,
        "guidance_scale": 3.0,
        "guidance_schedule": None,
    }
    return Tiny(pipe, text, (1, HEIGHT * WIDTH // 256, 128))


def fibo2() -> Tiny:
    transformer = BriaFibo2Transformer2DModel(
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=4,
        axes_dims=(4, 6, 6),
        axes_lens=(512, 32, 32),
    )
    pipe = BriaFibo2Pipeline(
        transformer=randomise(transformer),
        scheduler=dynamic_shift(),
        vae=flux2_vae(),
        text_encoder=None,
        processor=None,
    )
    text = {
        "prompt_embeds": random_tensor(1, 2, 3, 16),
        "negative_prompt_embeds": random_tensor(1, 2, 3, 16, seed=1),
    }
    return Tiny(pipe, text, (1, 32, HEIGHT // 8, WIDTH // 8))


def ernie() -> Tiny:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    vae = flux2_vae()
    vae.register_to_config(batch_norm_eps=1e-5)  # which its pipeline assumes
    pipe = diffusers.ErnieImagePipeline(
        transformer=randomise(transformer),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    text = {
        "prompt_embeds": [random_tensor(3, 16)],
        "negative_prompt_embeds": [random_tensor(3, 16, seed=1)],
    }
    return Tiny(pipe, text, PACKED)


LATER = {
    "wan": wan,
    "sana": sana,
    "qwen21": qwen21,
    "ideogram": ideogram,
    "fibo2": fibo2,
    "ernie": ernie,
}
LATER_VAES = {"wan": wan_vae, "qwen21": qwen21_vae, "dc": dc_vae, "tiny": tiny_vae}


def to_normalised(name: str, latents: Tensor) -> Tensor:
    """A pipeline's latents (B, C, h, w), in its autoencoder's layout."""
    height, width = HEIGHT // 16, WIDTH // 16
    if name == "wan":
        return latents[:, :, 0]
    if name in ("qwen21", "ideogram"):
        latents = latents.transpose(1, 2).unflatten(2, (height, width))
    if name == "ideogram":  # of a token: row, column, channel
        return latents.unflatten(1, (4, 32)).transpose(1, 2).flatten(1, 2)
    if name == "fibo2":
        return BriaFibo2Pipeline._patchify_latents(latents)
    return latents
