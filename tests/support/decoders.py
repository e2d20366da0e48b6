"""Decoders of tiny random networks."""

from __future__ import annotations

from dataclasses import replace

import networks
from torch import Tensor

from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.latents import decode_latents
from pid_lightning.decoding.plan import Plan
from pid_lightning.diffusion.randomness import Generators
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import Geometry, PiD

TIMES = (0.999, 0.866, 0.634, 0.342)


def make_info(latent_channels: int = 4, latent_stride: int = 8, **changes) -> ModelInfo:
    """A student of 4 steps; `sizes` are changes of its network."""
    sizes = changes.pop("sizes", {})
    info = ModelInfo(
        family="VAEPiD",
        encoder={"vae": "taef2", "pretrained": True},
        latent_space="flux2",
        geometry=Geometry(latent_channels, latent_stride, scale=4),
        image_size=128,
        latent_sigma_max=0.8,
        noise_frame="flow",
        student_times=TIMES,
        config=networks.config(**sizes),
    )
    return replace(info, **changes)


def make(**changes) -> PiDDecoder:
    """A decoder with random weights, so that the output depends on every input."""
    info = make_info(**changes)
    return PiDDecoder(networks.randomise(info.build()), info)


def decode_by(
    denoiser: PiD,
    latents: Tensor,
    latent_sigma: Tensor,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    generator: Generators = None,
    **options,
) -> Tensor:
    """Decode as planned with these options."""
    plan = Plan.of(denoiser, latents, **options)
    return decode_latents(denoiser, plan, latents, latent_sigma, text, null_text, generator)


def decode(decoder: PiDDecoder, latents: Tensor, *args, **options) -> Tensor:
    """The picture of seed 0, without a progress bar."""
    return decoder.decode(latents, *args, **({"seed": 0, "progress": False} | options))
