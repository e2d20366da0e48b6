"""Checks of the arguments of `PiDDecoder` before any work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pid_lightning.checks import check_at_least, check_whole
from pid_lightning.decoding.latents import output_size
from pid_lightning.decoding.tile_choice import TileChoice, check_tile_choice
from pid_lightning.diffusion.randomness import Generators
from pid_lightning.diffusion.sampling import few_step_times
from pid_lightning.encoders.latent_spaces import warn_if_not_normalised

if TYPE_CHECKING:
    from pid_lightning.decoding.decoder import PiDDecoder

# Stack level of the user's own call to PiDDecoder.decode, seen from a warning in check_inputs.
CALLER_LEVEL = 4
MAX_OVERSHOOT = 4.0  # of pictures in [-1, 1]; bytes and percentages lie above


def check_inputs(
    decoder: PiDDecoder,
    latents: Tensor,
    latent_sigma: float | Sequence[float] | Tensor,
    generator: Generators,
    seed: int | None,
) -> Tensor:
    """Check those arguments of `PiDDecoder.decode` that `check_options` does not.

    Returns:
        The noise levels (B,), on the network's device.

    Raises:
        ValueError: an argument does not fit the model.
    """
    denoiser, info = decoder.denoiser, decoder.info
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents: {type(latents).__name__} is no tensor; give a torch.Tensor.")
    channels = info.geometry.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels or not latents.numel():
        raise ValueError(
            f"latents: shape {tuple(latents.shape)} is not (B, {channels}, h, w); give "
            f"normalised {info.latent_space} latents."
        )
    if not latents.isfinite().all():
        raise ValueError("latents: some values are not finite; check what produced them.")
    denoiser.check_size(*output_size(denoiser, latents))
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in generators):
        raise ValueError(
            f"generator: {generator!r} is none; give a torch.Generator, one per sample, or a seed."
        )
    if generator is not None and seed is not None:
        raise ValueError("seed and generator were both given; give only one of them.")
    if seed is not None:
        check_whole("seed", seed)
    told = (
        f"latent_sigma: {latent_sigma!r} must be one number between 0 (clean) and 1 (noise), or "
        f"{len(latents)} of them, one per sample."
    )
    try:
        sigma = torch.as_tensor(latent_sigma, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(told) from error
    sigma = sigma.to(denoiser.out.weight.device).flatten()
    if sigma.numel() not in (1, len(latents)) or not ((sigma >= 0) & (sigma <= 1)).all():
        raise ValueError(told)
    highest = sigma.max().item()
    if highest > info.latent_sigma_max + 1e-6:
        warnings.warn(
            f"latent_sigma: {highest:g} is above {info.latent_sigma_max:g}, the highest level this "
            "model was trained for: expect invented content.",
            stacklevel=CALLER_LEVEL,
        )
    warn_if_not_normalised(latents, info.latent_space, CALLER_LEVEL + 1)
    return sigma.expand(len(latents))


def check_pictures(images: Tensor) -> None:
    """Check that these may be pictures in [-1, 1], which a native decoder's output overshoots.

    Raises:
        ValueError: no tensor of floating-point numbers, or values far out of range or not finite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() or not images.numel():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: {kind} is none; give a tensor of floats in [-1, 1].")
    largest = images.abs().max().item()
    if not largest < MAX_OVERSHOOT:
        raise ValueError(
            f"images: values of up to {largest:g} are no pictures in [-1, 1]; convert 0 to 255 by "
            "`images / 127.5 - 1`."
        )


def check_steps(student_times: Sequence[float] | None, steps: int | None) -> None:
    """Raise ValueError unless a student, or a teacher without times, can sample in `steps`."""
    if steps is None:
        return
    check_whole("steps", steps)
    check_at_least("steps", steps, 1)
    if student_times is not None:
        few_step_times(student_times, steps)


def check_options(
    decoder: PiDDecoder,
    steps: int | None,
    tile: TileChoice,
    prompt: str | list[str] | Tensor | None,
    guidance_scale: float,
) -> None:
    """Check what decoding depends on besides its input, before there is one.

    Raises:
        ValueError: one of the options does not fit the model.
    """
    check_steps(decoder.info.student_times, steps)
    check_tile_choice(tile, decoder.denoiser.alignment)
    if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: {guidance_scale!r} must be a finite number.")
    if (prompt is not None or guidance_scale != 1) and decoder.denoiser.text_embedding is None:
        raise ValueError(
            "prompt and guidance_scale: this model was trained without text; leave them out."
        )
    if guidance_scale != 1 and prompt is None:
        raise ValueError("guidance_scale: only used with a prompt; give one, or leave it out.")


def text_features(text: Tensor, width: int, batch_size: int) -> Tensor:
    """Expand text features (L, D_text) or (B or 1, L, D_text) to (B, L, D_text).

    Raises:
        ValueError: the shape does not fit, or values are not finite.
    """
    text = text[None] if text.ndim == 2 else text
    if text.ndim != 3 or text.shape[-1] != width or text.shape[0] not in (1, batch_size):
        raise ValueError(
            f"prompt: shape {tuple(text.shape)} does not fit; give one prompt or one per sample, "
            f"as features (L, {width}) or ({batch_size}, L, {width})."
        )
    if not text.isfinite().all():
        raise ValueError("prompt: some features are not finite; check what produced them.")
    return text.expand(batch_size, -1, -1)
