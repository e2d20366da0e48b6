"""What a run minimises: a teacher's flow matching, or what takes its place."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from pid_lightning.diffusion import flow, losses
from pid_lightning.diffusion.randomness import draw_noise, sample_generators
from pid_lightning.nn import PiD
from pid_lightning.training.optimizers import make_optimizer, make_schedule
from pid_lightning.training.sample import Sample
from pid_lightning.training.settings import Training


class Objective(Protocol):
    """How a module trains: `FlowMatching`, a `RegressionObjective`, or the `Turns` of a
    distillation."""

    automatic_optimization: bool

    def training_step(
        self, module: LightningModule, sample: Sample
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """One training step; the loss, None under manual optimisation, and what to log."""

    def configure_optimizers(self, fused: bool) -> Any:
        """What Lightning's hook of that name returns, with optimisers fused or not."""

    def num_denoiser_updates(self, global_step: int) -> int:
        """Optimiser steps the denoiser has taken."""


class FlowMatching:
    """The teacher's objective: velocity at random times, plus the RGB head's loss (v1.5).

    Args:
        denoiser: the network that learns, or is judged.
        settings: its times, loss weights, optimiser and seed.
    """

    automatic_optimization = True

    def __init__(self, denoiser: PiD, settings: Training) -> None:
        self.denoiser = denoiser
        self.settings = settings

    def training_step(
        self, module: LightningModule, sample: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch and its parts."""
        return self.losses(sample, "train")

    def losses(self, sample: Sample, purpose: str) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its named parts) on a sample; each purpose has its own random numbers."""
        denoiser, settings, x0 = self.denoiser, self.settings, sample.x0
        if settings.train == "rgb_head":
            rgb = denoiser.adapt(sample.latents, sample.latent_sigma, with_rgb=True).rgb
            loss = losses.rgb_alignment_loss(rgb, sample.low_resolution, sample.latent_sigma)
            return loss, {"rgb_loss": loss.detach(), "loss": loss.detach()}
        if settings.train == "latents":
            estimate = denoiser.adapter.estimate(sample.latents, sample.latent_sigma)
            loss = losses.latent_loss(estimate, sample.clean, sample.latent_sigma)
            return loss, {"latent_loss": loss.detach(), "loss": loss.detach()}
        t, eps = self._times(sample, purpose), self._noise(sample, purpose)
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

    def _times(self, sample: Sample, purpose: str) -> Tensor:
        settings, x0 = self.settings, sample.x0
        shift = settings.time_shift
        if shift is None:
            shift = flow.resolution_shift(*x0.shape[-2:])
        generators = sample_generators(settings.seed, f"{purpose} times", sample.numbers)
        drawn = [flow.sample_times(1, shift, settings.time_std, one) for one in generators]
        return torch.cat(drawn).to(x0.device, non_blocking=True)

    def _noise(self, sample: Sample, purpose: str) -> Tensor:
        seed, device = self.settings.seed, sample.x0.device
        generators = sample_generators(seed, f"{purpose} pixels", sample.numbers, device)
        return draw_noise(sample.x0.shape, generators, device)

    def configure_optimizers(self, fused: bool) -> dict[str, Any]:
        """The configured optimiser and its learning-rate schedule."""
        settings = self.settings
        optimizer = self._optimizer(fused)
        schedule = make_schedule(optimizer, settings.warmup_steps, settings.decay_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _optimizer(self, fused: bool) -> torch.optim.Optimizer:
        return make_optimizer(self.denoiser, self.settings, fused)

    def num_denoiser_updates(self, global_step: int) -> int:
        """Every optimiser step is the denoiser's."""
        return global_step
