"""Training objectives: the random draws of a batch, and the teacher's flow matching."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pid_lightning.diffusion import flow, losses, noising
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.diffusion.sampling import draw_noise
from pid_lightning.nn import Condition, PiD
from pid_lightning.pictures.files import reduce_picture

if TYPE_CHECKING:
    from pid_lightning.training.modules.base import PiDModule


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
    """

    x0: Tensor
    low_resolution: Tensor
    latents: Tensor
    latent_sigma: Tensor
    text: Tensor | None
    keep_latents: Tensor
    keep_text: Tensor | None
    numbers: list[int]

    def condition(self, denoiser: PiD, with_rgb: bool = False) -> Condition:
        """The condition of `denoiser` for this batch."""
        return denoiser.condition(
            self.latents,
            self.latent_sigma,
            self.text,
            keep_latents=self.keep_latents,
            keep_text=self.keep_text,
            with_rgb=with_rgb,
        )


class Objective(Protocol):
    """How a module trains: the teacher's flow matching, or a distillation in its place."""

    automatic_optimization: bool

    def training_step(self, module: PiDModule, sample: Sample) -> Tensor | None:
        """One training step; returns a loss under automatic optimisation."""

    def configure_optimizers(self, module: PiDModule) -> Any:
        """What Lightning's hook of that name returns."""

    def num_denoiser_updates(self, module: PiDModule) -> int:
        """Optimiser steps the denoiser has taken."""


def draw_sample(module: PiDModule, batch: dict[str, Any], purpose: str) -> Sample:
    """Encode a batch and draw its latent noise and dropouts, as configured in `Training`.

    Args:
        module: provides the encoder, text encoder and settings.
        batch: from `ImageData`.
        purpose: e.g. ``"train"``; each purpose has its own random numbers.
    """
    settings, x0 = module.training_settings, batch["image"]
    numbers = batch["number"].tolist()
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
    if not module.denoiser.config.learned_null:
        captions = [c if kept else "" for c, kept in zip(captions, keep_text, strict=True)]

    low_resolution = reduce_picture(x0, module.scale)
    clean, text = module.encode(low_resolution, captions)
    replaced = text is not None and module.denoiser.config.learned_null
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
    )


class FlowMatching:
    """The teacher's objective: velocity at random times, plus the RGB head's loss (v1.5)."""

    automatic_optimization = True

    def training_step(self, module: PiDModule, sample: Sample) -> Tensor:
        """The loss of one batch; logs its parts."""
        loss, parts = self.losses(module, module.denoiser, sample, "train")
        module.log_dict({f"train/{k}": v for k, v in parts.items()}, batch_size=len(sample.x0))
        return loss

    def losses(
        self, module: PiDModule, denoiser: PiD, sample: Sample, purpose: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its named parts) of `denoiser` on `sample`."""
        settings, x0 = module.training_settings, sample.x0
        if settings.train == "rgb_head":
            _, rgb = denoiser.adapt(sample.latents, sample.latent_sigma, with_rgb=True)
            loss = losses.rgb_alignment_loss(rgb, sample.low_resolution, sample.latent_sigma)
            return loss, {"rgb_loss": loss.detach(), "loss": loss.detach()}
        shift = settings.time_shift
        if shift is None:
            shift = flow.resolution_shift(*x0.shape[-2:])
        scalars = sample_generators(settings.seed, f"{purpose} times", sample.numbers)
        drawn = [flow.sample_times(1, shift, settings.time_std, one) for one in scalars]
        t = torch.cat(drawn).to(x0.device, non_blocking=True)
        generators = sample_generators(
            settings.seed, f"{purpose} pixels", sample.numbers, x0.device
        )
        eps = draw_noise(x0.shape, generators, x0.device)

        with_rgb = denoiser.config.adapter.rgb_head
        condition = sample.condition(denoiser, with_rgb)
        velocity = denoiser(flow.add_noise(x0, eps, t), t, condition)
        loss = losses.flow_matching_loss(velocity, x0, eps)
        parts = {"velocity_loss": loss.detach()}
        if with_rgb:
            rgb_loss = losses.rgb_alignment_loss(
                condition.rgb, sample.low_resolution, sample.latent_sigma
            )
            parts["rgb_loss"] = rgb_loss.detach()
            loss = loss + settings.rgb_loss_weight * rgb_loss
        return loss, parts | {"loss": loss.detach()}

    def configure_optimizers(self, module: PiDModule) -> dict[str, Any]:
        """The configured optimiser and its learning-rate schedule."""
        optimizer = module.make_optimizer()
        schedule = {"scheduler": module.make_schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def num_denoiser_updates(self, module: PiDModule) -> int:
        """Every optimiser step is the denoiser's."""
        return module.trainer.global_step
