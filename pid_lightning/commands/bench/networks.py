"""Networks to measure: sizes by name, random weights, and random inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pid_lightning.checks import check_at_least
from pid_lightning.files.hub import find_model
from pid_lightning.files.models import ModelInfo, load_model
from pid_lightning.files.published import FLUX, VERSIONS
from pid_lightning.nn import AdapterConfig, PiD, PiDConfig

V15 = VERSIONS["v1.5"]
CONFIGS = {
    "full": PiDConfig(),
    "full_v15": replace(V15, learned_null=True, adapter=replace(V15.adapter, rgb_head=True)),
    "small": PiDConfig(
        width=384,
        num_heads=6,
        num_blocks=6,
        pixel_width=16,
        pixel_attention_width=384,
        pixel_num_heads=6,
        text_width=256,
        text_length=77,
        adapter=AdapterConfig(width=128, num_res_blocks=2),
    ),
}


def named(name: str) -> ModelInfo:
    """One of `CONFIGS` on FLUX.1's latents, as a teacher."""
    return replace(FLUX, image_size=None, student_times=None, config=CONFIGS[name])


def find(name: str, model: str | None) -> tuple[PiD | None, ModelInfo]:
    """A model's network and description; for one of `CONFIGS` only the description.

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: the file is not a model.
    """
    return (None, named(name)) if model is None else load_model(find_model(model))


def check_sizes(info: ModelInfo, sizes: list[int]) -> None:
    """Check that output sides are whole patches and latent cells.

    Raises:
        ValueError: a side does not fit; names the required multiple.
    """
    denoiser = build_meta(info)
    for size in sizes:
        check_at_least("--sizes", size, 1)
        denoiser.check_size(size, size)


def build_meta(info: ModelInfo) -> PiD:
    """The network on the meta device."""
    with torch.device("meta"):
        return info.build()


def build_random(info: ModelInfo, generator: torch.Generator) -> PiD:
    """The network with random fp32 weights, none of them zero, so that checks see every layer."""
    denoiser = build_meta(info).to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            weight.normal_(generator=generator)
            if name.endswith("log_alpha"):
                weight.mul_(0.3).add_(math.log(5))
            elif weight.ndim == 1 and name.endswith("weight"):  # of a norm
                weight.mul_(0.2).add_(1)
            elif weight.ndim == 1:
                weight.mul_(0.2)
            else:
                weight.div_(math.sqrt(weight[0].numel()))
    return denoiser


@dataclass(frozen=True)
class Inputs:
    """Random inputs of one output size.

    Attributes:
        x0, eps: (B, 3, H, W).
        low_resolution: (B, 3, H/scale, W/scale).
        t: pixel times (B,).
        latents: (B, C, h, w).
        latent_sigma: (B,).
        text: (B, L, D_text), None for a network without text.
    """

    x0: Tensor
    eps: Tensor
    low_resolution: Tensor
    t: Tensor
    latents: Tensor
    latent_sigma: Tensor
    text: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All inputs that are not None."""
        return [value for value in vars(self).values() if value is not None]


def draw_inputs(info: ModelInfo, size: int, batch_size: int, device: torch.device) -> Inputs:
    """Deterministic fp32 inputs, drawn on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator).to(device)

    def uniform() -> Tensor:
        return torch.rand(batch_size, generator=generator).to(device)

    config, geometry = info.config, info.geometry
    seen, cells = size // geometry.scale, size // geometry.cell
    return Inputs(
        x0=normal(3, size, size).clamp(-1, 1),
        eps=normal(3, size, size),
        low_resolution=normal(3, seen, seen).clamp(-1, 1),
        t=uniform(),
        latents=normal(geometry.latent_channels, cells, cells),
        latent_sigma=0.8 * uniform(),
        text=normal(config.text_length, config.text_width) if config.text_length else None,
    )
