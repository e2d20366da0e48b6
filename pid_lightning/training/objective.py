"""Training objectives: the random draws of a batch, and the teacher's flow matching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pid_lightning.diffusion import flow, losses
from pid_lightning.diffusion.randomness import draw_noise, sample_generators
from pid_lightning.nn import PiD
from pid_lightning.training.sample import Sample

if TYPE_CHECKING:
    from pid_lightning.training.modules.base import PiDModule


class Objective(Protocol):
    """How a module trains: the teacher's flow matching, or a distillation in its place."""

    automatic_optimization: bool

    def training_step(self, module: PiDModule, sample: Sample) -> Tensor | None:
        """One training step; returns a loss under automatic optimisation."""

    def configure_optimizers(self, module: PiDModule) -> Any:
        """What Lightning's hook of that name returns."""

    def num_denoiser_updates(self, module: PiDModule) -> int:
        """Optimiser steps the denoiser has taken."""


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
            rgb = denoiser.adapt(sample.latents, sample.latent_sigma, with_rgb=True).rgb
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
