"""Training of a few-step student on photographs directly, by pixel and perceptual losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from pid_lightning.checks import Mistake, check_at_least, check_between
from pid_lightning.diffusion import flow, losses
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.diffusion.sampling import check_student_times
from pid_lightning.nn import Condition, PiD
from pid_lightning.pictures.lpips import LPIPS, lpips_network, lpips_vgg_network
from pid_lightning.training.objective import FlowMatching
from pid_lightning.training.sample import Sample
from pid_lightning.training.settings import Training


@dataclass(frozen=True)
class RegressionSettings:
    """Times and losses of a student that is trained directly.

    Args:
        student_times: pixel times of the student's steps, from noise to clean.
        last_share: fraction of the batches that train the last step; the others share the rest.
        pixel_weight: weight of the mean absolute error.
        alex_weight: weight of LPIPS with AlexNet.
        vgg_weight: weight of LPIPS with VGG16.
        vgg: ``.safetensors`` file of the weights of LPIPS with VGG16, which is not bundled.
        vgg_size: side of the random part of each picture that VGG16 sees, since it costs more than
            a small denoiser; null is all of it.
        latent_weight: weight of the error of the adapter's estimate of the clean latents, which
            is frozen at 0.

    Raises:
        Mistake: a value is out of range.
    """

    student_times: tuple[float, ...] = (0.999, 0.8, 0.5, 0.2)
    last_share: float = 0.4
    pixel_weight: float = 2.0
    alex_weight: float = 0.0
    vgg_weight: float = 0.0
    vgg: str | None = None
    vgg_size: int | None = None
    latent_weight: float = 0.0

    def __post_init__(self) -> None:
        check_student_times("Regression student_times", self.student_times)
        check_between("Regression last_share", self.last_share, 0, 1)
        for name in ("pixel", "alex", "vgg", "latent"):
            check_at_least(f"Regression {name}_weight", getattr(self, f"{name}_weight"), 0)
        if self.vgg_weight and self.vgg is None:
            raise Mistake(
                "Regression vgg",
                "is not given; name the file of LPIPS with VGG16, or set vgg_weight to 0.",
            )


class RegressionObjective(FlowMatching):
    """Compares the picture predicted at one of the student's times with the photograph.

    At the first time the network sees noise; at the others it sees its own picture of the first
    time, noised anew, so that a later step learns to improve on what an earlier one leaves. Batches
    share one time, the same on every process.

    Args:
        denoiser: the network that learns.
        training: its optimiser and seed.
        regression: its times and losses.
        device: of the perceptual networks.

    Raises:
        FileNotFoundError: there is no such file of LPIPS with VGG16.
    """

    def __init__(
        self,
        denoiser: PiD,
        training: Training,
        regression: RegressionSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(denoiser, training)
        self.regression = regression
        self.alex: LPIPS | None = lpips_network().to(device) if regression.alex_weight else None
        self.vgg: LPIPS | None = (
            lpips_vgg_network(regression.vgg).to(device) if regression.vgg_weight else None
        )

    def training_step(
        self, module: LightningModule, sample: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch and its parts."""
        regression, turn = self.regression, module.global_step
        (generator,) = sample_generators(self.settings.seed, "regression", [turn])
        adapted = sample.adapt(self.denoiser)
        condition = sample.condition_on(self.denoiser, adapted)
        x0 = self._predicted(sample, condition, generator)
        parts = {"pixel": F.l1_loss(x0, sample.x0)}
        if self.alex is not None:
            parts["alex"] = self.alex(x0, sample.x0).mean()
        if self.vgg is not None:
            place = self._place(x0, generator)
            parts["vgg"] = self.vgg(x0[place], sample.x0[place]).mean()
        if regression.latent_weight:
            estimate = adapted.latents
            parts["latent"] = losses.latent_loss(estimate, sample.clean, sample.latent_sigma)
        loss = sum(getattr(regression, f"{name}_weight") * part for name, part in parts.items())
        logged = {f"{name}_loss": part.detach() for name, part in parts.items()}
        logged["loss"] = loss.detach()
        return loss, logged

    def _predicted(
        self, sample: Sample, condition: Condition, generator: torch.Generator
    ) -> Tensor:
        """The student's picture (B, 3, H, W) at one of its times."""
        times = self.regression.student_times
        is_last, which = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        step = int(which * (len(times) - 1))
        if is_last < self.regression.last_share:
            step = len(times) - 1
        x_t = self._noise(sample, "first step")
        if step > 0:
            with torch.no_grad():
                first = self._picture(x_t, times[0], condition)
            t = first.new_full((len(first),), times[step])
            x_t = flow.add_noise(first, self._noise(sample, "later step"), t)
        return self._picture(x_t, times[step], condition)

    def _picture(self, x_t: Tensor, time: float, condition: Condition) -> Tensor:
        t = x_t.new_full((len(x_t),), time)
        return flow.x0_from_velocity(x_t, self.denoiser(x_t, t, condition), t)

    def _place(self, pictures: Tensor, generator: torch.Generator) -> tuple[Any, ...]:
        """Index of the random part of pictures (B, 3, H, W) that VGG16 sees."""
        size = self.regression.vgg_size
        if size is None:
            return (...,)
        places = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        sides = zip(places, pictures.shape[-2:], strict=True)
        starts = [int(place * (side - size + 1)) for place, side in sides]
        return (..., *(slice(start, start + size) for start in starts))
