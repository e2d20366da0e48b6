"""One batch with its random draws: noisy latents, dropped conditions, captions."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pid_lightning.diffusion import noising
from pid_lightning.diffusion.noising import add_latent_noise
from pid_lightning.diffusion.randomness import draw_noise, sample_generators
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.text import TextEncoder
from pid_lightning.nn import Condition, PiD
from pid_lightning.nn.condition import Adapted
from pid_lightning.pictures.resizing import reduce_picture
from pid_lightning.training.settings import Training


class Sample(NamedTuple):
    """One batch with all random draws that do not depend on the network.

    Attributes:
        x0: images (B, 3, H, W) in [-1, 1].
        low_resolution: what the encoder saw (B, 3, H/scale, W/scale).
        latents: noisy normalised latents (B, C, h, w).
        latent_sigma: their noise levels (B,).
        text: caption features (B, L, D_text), None for the learned null.
        keep_latents: (B,) bool, False where dropped.
        keep_text: (B,) bool, False where the learned null takes its place; None where it never
            does.
        numbers: identify the samples within the run, to seed further draws.
        clean: the latents without noise, None where no loss needs them.
        offset: row and column (B, 2) of x0 in the latents, in cells, where these show more than
            the picture; None where they do not.
    """

    x0: Tensor
    low_resolution: Tensor
    latents: Tensor
    latent_sigma: Tensor
    text: Tensor | None
    keep_latents: Tensor
    keep_text: Tensor | None
    numbers: list[int]
    clean: Tensor | None = None
    offset: Tensor | None = None

    def condition(self, denoiser: PiD, with_rgb: bool = False) -> Condition:
        """The condition of `denoiser` for this batch."""
        if self.offset is not None:
            return self.condition_on(denoiser, self.adapt(denoiser))
        return denoiser.condition(
            self.latents,
            self.latent_sigma,
            self.text,
            keep_latents=self.keep_latents,
            keep_text=self.keep_text,
            with_rgb=with_rgb,
        )

    def adapt(self, denoiser: PiD) -> Adapted:
        """What the adapter of `denoiser` makes of the latents, where x0 is."""
        adapted = denoiser.adapt(self.latents, self.latent_sigma)
        if self.offset is None:
            return adapted
        height, width = self.x0.shape[-2:]
        starts = (self.offset * denoiser.geometry.cell).tolist()
        places = [(slice(top, top + height), slice(left, left + width)) for top, left in starts]
        return adapted.parts(places, denoiser.config.patch_size)

    def condition_on(self, denoiser: PiD, adapted: Adapted) -> Condition:
        """The condition for a result of `adapt`."""
        return denoiser.condition_on(
            adapted, self.latent_sigma, self.text, self.keep_latents, self.keep_text
        )


@torch.no_grad()
def encode_batch(
    encoder: Encoder, text_encoder: TextEncoder, images: Tensor, captions: list[str]
) -> tuple[Tensor, Tensor | None]:
    """Clean normalised latents (B, C, h, w) and caption features (B, L, D_text) of pictures at the
    encoder's resolution."""
    # Cloned because the adapter's backward pass cannot save inference tensors.
    with torch.inference_mode():
        latents = encoder.encode(images)
        text = text_encoder.encode(captions)
    return latents.clone(), None if text is None else text.clone()


def draw_sample(
    batch: dict[str, Any],
    purpose: str,
    encoder: Encoder,
    text_encoder: TextEncoder,
    denoiser: PiD,
    settings: Training,
) -> Sample:
    """Encode a batch and draw its latent noise and dropouts, as configured in `Training`.

    Args:
        batch: from `ImageData`.
        purpose: e.g. ``"train"``; each purpose has its own random numbers.
        encoder, text_encoder: loaded, on the batch's device.
        denoiser: its scale, and whether its null text is learned, decide what is encoded.
        settings: noise levels, dropouts and seed.
    """
    x0, numbers = batch["image"], batch["number"].tolist()
    scalars = sample_generators(settings.seed, f"{purpose} scalars", numbers)
    drawn = [
        (
            noising.sample_latent_sigma(
                1, settings.latent_sigma_max, settings.latent_sigma_probability, generator
            ),
            torch.rand(2, 1, generator=generator, dtype=torch.float32),
        )
        for generator in scalars
    ]
    to_device = partial(Tensor.to, device=x0.device, non_blocking=True)
    latent_sigma = to_device(torch.cat([sigma for sigma, _ in drawn]))
    drop_latents, drop_text = torch.cat([drops for _, drops in drawn], dim=1)
    keep_latents = to_device(drop_latents >= settings.latent_dropout)
    captions, keep_text = batch["caption"], drop_text >= settings.caption_dropout
    if not denoiser.config.learned_null:
        captions = [c if kept else "" for c, kept in zip(captions, keep_text, strict=True)]

    low_resolution = reduce_picture(x0, denoiser.geometry.scale)
    if "latents" in batch:  # cut from those of the whole photograph
        clean, text = batch["latents"], text_encoder.encode(captions)
    else:
        clean, text = encode_batch(encoder, text_encoder, low_resolution, captions)
    replaced = text is not None and denoiser.config.learned_null
    replaced = replaced and settings.caption_dropout > 0
    generators = sample_generators(settings.seed, f"{purpose} latents", numbers, x0.device)
    eps = draw_noise(clean.shape, generators, x0.device)
    return Sample(
        x0,
        low_resolution,
        noising.add_latent_noise(clean, eps, latent_sigma, settings.noise_frame),
        latent_sigma,
        text,
        keep_latents,
        to_device(keep_text) if replaced else None,
        numbers,
        clean,
        batch.get("offset"),
    )


def evaluation_generators(
    seed: int, purpose: str, numbers: list[int], device: torch.device
) -> list[torch.Generator]:
    """One generator per picture, from the run's seed, the purpose and the picture's number."""
    return sample_generators(seed, f"test {purpose}", numbers, device)


def add_evaluation_noise(
    clean: Tensor, sigma: float, numbers: list[int], settings: Training
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) at one noise level, and that level for each sample (B,).

    A picture gets the same noise at every level.
    """
    latent_sigma = torch.full((len(clean),), sigma, device=clean.device)
    generators = evaluation_generators(settings.seed, "latents", numbers, clean.device)
    eps = draw_noise(clean.shape, generators, clean.device)
    return add_latent_noise(clean, eps, latent_sigma, settings.noise_frame), latent_sigma
