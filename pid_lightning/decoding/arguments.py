"""Checks of the arguments of `PiDDecoder` before any work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from pid_lightning.checks import Mistake, check_whole
from pid_lightning.decoding.plan import num_sampling_steps
from pid_lightning.decoding.tile_choice import CALLER_LEVEL, TileChoice, check_tile_choice
from pid_lightning.diffusion.randomness import Generators, sample_generators
from pid_lightning.encoders.latent_spaces import warn_if_not_normalised
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import PiD

MAX_OVERSHOOT = 4.0  # of pictures in [-1, 1]; bytes and percentages lie above


def check_latents(latents: Tensor, info: ModelInfo) -> None:
    """Raise `Mistake` unless latents may be decoded; warn if they are not normalised."""
    channels = info.geometry.latent_channels
    shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
    fits = isinstance(shape, tuple) and len(shape) == 4 and shape[1] == channels and 0 not in shape
    if not fits or not latents.isfinite().all():
        raise Mistake(
            "latents",
            f"{shape} must be (B, {channels}, h, w) and finite; give normalised "
            f"{info.latent_space} latents.",
        )
    warn_if_not_normalised(latents, info.latent_space, CALLER_LEVEL + 1)


def noise_levels(
    latent_sigma: float | Sequence[float] | Tensor, batch_size: int, highest_trained: float
) -> Tensor:
    """The noise levels (B,) of latents; warns above those of the training.

    Raises:
        Mistake: not one number in [0, 1], or one per sample.
    """
    try:
        sigma = torch.as_tensor(latent_sigma, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):
        sigma = torch.empty(0)
    if sigma.numel() not in {1, batch_size} or not ((sigma >= 0) & (sigma <= 1)).all():
        raise Mistake(
            "latent_sigma",
            f"{latent_sigma!r} must be one number between 0 (clean) and 1 (noise), or "
            f"{batch_size} of them, one per sample.",
        )
    highest = sigma.max().item()
    if highest > highest_trained + 1e-6:
        warnings.warn(
            f"latent_sigma: {highest:g} is above {highest_trained:g}, the highest level this "
            "model was trained for: expect invented content.",
            stacklevel=CALLER_LEVEL,
        )
    return sigma.expand(batch_size)


def noise_source(generator: Generators, seed: int | None, batch_size: int) -> Generators:
    """The generator or those of a seed, one per sample; None if neither is given.

    Raises:
        Mistake: both, or something else.
    """
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    is_right = seed is None and all(isinstance(g, torch.Generator) for g in generators)
    if generator is not None and not is_right:
        raise Mistake(
            "generator",
            f"{generator!r} with seed {seed}; give a torch.Generator, one per sample, or a seed.",
        )
    if seed is None:
        return generator
    check_whole("seed", seed)
    return sample_generators(int(seed), "decode", range(batch_size))


def check_pictures(images: Tensor) -> None:
    """Raise `Mistake` unless these may be pictures in [-1, 1], which a native decoder's output
    overshoots."""
    is_float = isinstance(images, Tensor) and images.is_floating_point() and images.numel()
    largest = images.abs().max().item() if is_float else math.nan
    if not largest < MAX_OVERSHOOT:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise Mistake(
            "images",
            f"{kind} of up to {largest:g}; give a tensor of floats in [-1, 1], to which 0 to 255 "
            "is converted by `images / 127.5 - 1`.",
        )


def check_steps(student_times: Sequence[float] | None, steps: int | None) -> None:
    """Raise `Mistake` unless a student, or a teacher without times, can sample in `steps`."""
    if steps is not None:
        check_whole("steps", steps)
    num_sampling_steps(student_times, steps)


def check_options(
    denoiser: PiD,
    student_times: Sequence[float] | None,
    steps: int | None,
    tile: TileChoice,
    prompt: str | list[str] | Tensor | None,
    guidance_scale: float,
) -> None:
    """Check what decoding depends on besides its input, before there is one.

    Raises:
        Mistake: one of the options does not fit the model.
    """
    check_steps(student_times, steps)
    check_tile_choice(tile, denoiser.alignment)
    if prompt is not None:
        check_takes_text(denoiser)
    is_number = isinstance(guidance_scale, Real) and math.isfinite(guidance_scale)
    if not is_number or (guidance_scale != 1 and prompt is None):
        raise Mistake(
            "guidance_scale",
            f"{guidance_scale!r} must be a finite number, and 1 where there is no prompt.",
        )


def check_takes_text(denoiser: PiD) -> None:
    """Raise `Mistake` for a network without a text stream."""
    if denoiser.text_embedding is None:
        raise Mistake("prompt", "this model was trained without text; leave it out.")


def check_features(text: Tensor, width: int, batch_size: int) -> Tensor:
    """Expand text features (L, D_text) or (B or 1, L, D_text) to (B, L, D_text).

    Raises:
        Mistake: the shape does not fit, or values are not finite.
    """
    text = text[None] if text.ndim == 2 else text
    fits = text.ndim == 3 and text.shape[-1] == width and len(text) in {1, batch_size}
    if not fits or not text.isfinite().all():
        raise Mistake(
            "prompt",
            f"features {tuple(text.shape)}; give finite ones of one prompt or one per sample, "
            f"(L, {width}) or ({batch_size}, L, {width}).",
        )
    return text.expand(batch_size, -1, -1)
