"""Turns: the objective of a distillation, whose batches train the student or the critics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from pid_lightning.nn import PiD
from pid_lightning.training.distillation import Distillation
from pid_lightning.training.optimizers import clip_gradients, make_optimizer, make_schedule
from pid_lightning.training.sample import Sample
from pid_lightning.training.settings import Training


class Turns:
    """Gives each batch to the student or to the critics, and steps only their optimiser.

    So `global_step` counts batches (or groups of accumulated batches), and `max_steps`,
    checkpoints and logging keep their meaning.

    Args:
        student: the network that is distilled.
        distillation: the networks beside it and the losses.
        settings: the student's optimiser and schedule.

    Attributes:
        num_student_updates: steps the student has taken.
    """

    automatic_optimization = False

    def __init__(self, student: PiD, distillation: Distillation, settings: Training) -> None:
        self.student = student
        self.distillation = distillation
        self.settings = settings
        self.num_student_updates: int = 0
        self._trainer: Trainer | None = None
        self._clip: tuple[float | None, str | None] = (None, None)
        self._accumulate = 1

    def take_over(self, trainer: Trainer) -> None:
        """Take over clipping and accumulation, which Lightning refuses in manual optimisation."""
        if trainer is self._trainer:  # fits again, its settings are here already
            return
        self._trainer = trainer
        # Does not apply: checkpoints here hold the weights after the step.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
        self._clip = (trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        self._accumulate = trainer.accumulate_grad_batches
        trainer.gradient_clip_val = None
        trainer.accumulate_grad_batches = 1

    def is_student(self, turn: int) -> bool:
        """Critics train first: a student step is only as good as the fake score."""
        every = self.distillation.settings.student_every
        return turn % every == every - 1

    def training_step(
        self, module: LightningModule, sample: Sample
    ) -> tuple[None, dict[str, Tensor | float]]:
        """Train the student or the critics on this batch; only one optimiser steps."""
        turn = module.global_step
        self.distillation.stopwatch.is_running = _is_logged(module, turn + 1)
        if self.is_student(turn):
            with resting(self.distillation):
                loss, parts = self.distillation.student_loss(
                    self.student, sample, turn, self.num_student_updates
                )
                norm = self._step(module, loss, optimizer=0)
            if norm is not None:
                parts["gradient_norm"] = norm
                module.lr_schedulers().step()
                self.num_student_updates += 1
        else:
            with resting(self.student):
                loss, parts = self.distillation.critic_loss(self.student, sample, turn)
                norm = self._step(module, loss, optimizer=1)
            if norm is not None:
                parts["critics_gradient_norm"] = norm
        if _is_logged(module, module.global_step):
            shares = self.distillation.stopwatch.take_shares()
            parts |= {f"time_share/{name}": share for name, share in shares.items()}
        return None, parts

    def _step(self, module: LightningModule, loss: Tensor, optimizer: int) -> Tensor | None:
        """Run backward; once the accumulation is complete, clip, step and return the norm."""
        chosen, trainer = module.optimizers()[optimizer], module.trainer
        module.manual_backward(loss / self._accumulate)
        num_batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # As in automatic optimisation an epoch ends with a step, so that no partial group remains.
        is_last = trainer.is_last_batch or num_batches == trainer.num_training_batches
        if num_batches % self._accumulate and not is_last:
            return None
        norm = clip_gradients(chosen, *self._clip)
        chosen.step()
        chosen.zero_grad(set_to_none=True)
        return norm

    def configure_optimizers(self, fused: bool) -> tuple[list[Any], list[Any]]:
        """The student's optimiser and schedule, and one optimiser for both critics."""
        settings = self.settings
        student = make_optimizer(self.student, settings, fused)
        schedule = make_schedule(student, settings.warmup_steps, settings.decay_steps)
        critics = self.distillation.make_critics_optimizer()
        # Stepped by hand; the interval is that at which `LearningRateMonitor` logs it.
        return [student, critics], [{"scheduler": schedule, "interval": "step"}]

    def num_denoiser_updates(self, global_step: int) -> int:
        """The number of student steps."""
        return self.num_student_updates


@contextmanager
def resting(*networks: nn.Module) -> Iterator[None]:
    """Networks that pass gradients on but accumulate none."""
    frozen = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _is_logged(module: LightningModule, step: int) -> bool:
    return step % max(module.trainer.log_every_n_steps, 1) == 0
