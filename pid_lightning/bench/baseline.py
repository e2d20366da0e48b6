"""The benchmark baseline: the plain transcription in tests/plain.py in place of the denoiser."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.nn import PiD
from pid_lightning.released import from_released
from pid_lightning.weights import ModelInfo

PLAIN = Path(__file__).parents[2] / "tests" / "plain.py"
GATES = {"channel": "sigma_aware_per_token_per_dim", "token": "sigma_aware_per_token"}


def load_plain(path: Path = PLAIN) -> ModuleType:
    """Import the plain transcription.

    Raises:
        FileNotFoundError: the package was installed without the repository's tests.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--baseline: {path} does not exist, since an installed package has no tests; run from "
            "a clone of the repository (pip install -e .)."
        )
    spec = importlib.util.spec_from_file_location("pid_lightning_plain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_arguments(info: ModelInfo) -> dict[str, Any]:
    """The published constructor's arguments for a network.

    Raises:
        ValueError: the published layout cannot express the network.
    """
    config, adapter = info.config, info.config.adapter
    unsupported = {
        "text_length: 0": config.text_length == 0,
        "prediction: x0": config.prediction != "velocity",
        "adapter.upsampling: shuffle": adapter.upsampling != "nearest",
        "adapter.sigma_plane: true": adapter.sigma_plane,
        "adapter.head_norm: true": adapter.head_norm,
        f"adapter.gate: {adapter.gate}": adapter.gate not in GATES,
    }
    if any(unsupported.values()):
        names = ", ".join(name for name, is_present in unsupported.items() if is_present)
        raise ValueError(
            "--baseline: the plain transcription covers the published network and does not support "
            f"{names}; use --network full or small."
        )
    rope_height, rope_width = config.rope_reference or (1024, 1024)
    return {
        "hidden_size": config.width,
        "num_groups": config.num_heads,
        "patch_depth": config.num_blocks,
        "patch_size": config.patch_size,
        "pixel_hidden_size": config.pixel_width,
        "pixel_attn_hidden_size": config.pixel_attention_width,
        "pixel_num_groups": config.pixel_num_heads,
        "pixel_depth": config.num_pixel_blocks,
        "txt_embed_dim": config.text_width,
        "txt_max_length": config.text_length,
        "rope_mode": "original" if config.rope_reference is None else "ntk_aware",
        "rope_ref_h": rope_height,
        "rope_ref_w": rope_width,
        "lq_hidden_dim": adapter.width,
        "lq_num_res_blocks": adapter.num_res_blocks,
        "lq_interval": adapter.interval,
        "lq_gate_type": GATES[adapter.gate],
        "lq_conv_padding_mode": adapter.padding,
        "pit_lq_inject": adapter.inject_pixels,
        "lq_aux_rgb_head": adapter.rgb_head,
        "lq_aux_rgb_head_latent_block_idx": adapter.rgb_head_block or -1,
        "lq_latent_unpatchify_factor": adapter.unpack,
        "lq_latent_channels": info.latent_channels,
        "latent_spatial_down_factor": info.latent_stride,
        "sr_scale": info.scale,
    }


def build_pair(
    denoiser: PiD, info: ModelInfo, generator: torch.Generator
) -> tuple[PiD, Transcription]:
    """`denoiser` and its transcription with the same random weights in fp32.

    Raises:
        FileNotFoundError, ValueError: see `load_plain` and `published_arguments`.
    """
    arguments, plain = published_arguments(info), load_plain()
    released = plain.random_released(arguments, generator)
    denoiser.load_state_dict(denoiser.state_dict() | from_released(released, denoiser))
    return denoiser, Transcription(plain, released, arguments, info)


class Condition(NamedTuple):
    """The inputs: the plain transcription caches nothing between calls."""

    latents: Tensor
    latent_sigma: Tensor
    text: Tensor
    rgb: Tensor | None


class Transcription(nn.Module):
    """The plain transcription behind the `nn.PiD` methods that the benchmarks call.

    Args:
        plain: the module from `load_plain`.
        released: weights under the published names.
        arguments: the published constructor's arguments.
        info: the model's geometry.
    """

    def __init__(
        self,
        plain: ModuleType,
        released: dict[str, Tensor],
        arguments: dict[str, Any],
        info: ModelInfo,
    ) -> None:
        super().__init__()
        self.scale, self.latent_stride = info.scale, info.latent_stride
        self.config, self.arguments = info.config, arguments
        # Functions instead of their module, which `deepcopy` cannot copy.
        names = ("plain_velocity", "plain_features", "plain_tokens", "plain_rgb")
        self.plain = SimpleNamespace(**{name: getattr(plain, name) for name in names})
        # Parameter names must not contain dots.
        self.weights = nn.ParameterDict({k.replace(".", "/"): v for k, v in released.items()})

    def check_size(self, height: int, width: int) -> None:
        """Do nothing: the denoiser has checked the sizes."""

    def condition(
        self,
        latents: Tensor,
        latent_sigma: Tensor,
        text: Tensor | None = None,
        keep_latents: Tensor | None = None,
        keep_text: Tensor | None = None,
        with_rgb: bool = False,
    ) -> Condition:
        """Bundle the inputs; the benchmarks drop none of them."""
        rgb = None
        if with_rgb and self.arguments["lq_aux_rgb_head"]:
            rgb = self.plain.plain_rgb(self._params(), self.arguments, latents)
        return Condition(latents, latent_sigma, text, rgb)

    def without_text(self, condition: Condition, null_text: Tensor | None = None) -> Condition:
        """The condition with `null_text`, or zeros by default."""
        null = torch.zeros_like(condition.text) if null_text is None else null_text
        return condition._replace(text=null)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity."""
        latents, latent_sigma, text, _ = condition
        return self.plain.plain_velocity(
            self._params(), self.arguments, x_t, t, text, latents, latent_sigma
        )

    def features(
        self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Patch tokens after the given blocks, each (B, D, H/P, W/P)."""
        latents, latent_sigma, text, _ = condition
        params = self._params()
        features = self.plain.plain_features(params, self.arguments, latents)
        after = self.plain.plain_tokens(
            params, self.arguments, x_t, t, text, features, latent_sigma
        )
        rows = x_t.shape[-2] // self.arguments["patch_size"]
        return [rearrange(after[i], "b (h w) d -> b d h w", h=rows) for i in blocks]

    def _params(self) -> dict[str, Tensor]:
        return {k.replace("/", "."): v for k, v in self.weights.items()}
