"""Alternating training of student and critics under manual optimisation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn


class Turns:
    """Assigns each batch to one group of networks and steps only that group's optimiser.

    So `global_step` counts batches (or groups of accumulated batches), and `max_steps`,
    checkpoints and logging keep their meaning.

    Args:
        student_every: batches from one student turn to the next; the others train the critics.
    """

    def __init__(self, student_every: int) -> None:
        self.student_every = student_every
        self._trainer: Trainer | None = None
        self._clip: float | None = None
        self._clip_algorithm: str | None = None
        self._accumulate = 1
        self._seconds: dict[str, float] = {}
        self._is_timing = False

    def take_over(self, trainer: Trainer) -> None:
        """Take over clipping and accumulation, which Lightning refuses in manual optimisation.

        Raises:
            ValueError: scaled gradients, or a strategy that would wait for gradients of the
                resting networks.
        """
        if trainer.precision == "16-mixed":
            raise ValueError(
                "trainer.precision: DMD2 clips gradients itself, but 16-mixed scales them; use "
                "bf16-mixed or 32-true."
            )
        if trainer is self._trainer:  # fits again, its settings are here already
            return
        self._trainer = trainer
        # Does not apply: checkpoints here hold the weights after the step.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
        self._clip = trainer.gradient_clip_val
        self._clip_algorithm = trainer.gradient_clip_algorithm
        self._accumulate = trainer.accumulate_grad_batches
        trainer.gradient_clip_val = None
        trainer.accumulate_grad_batches = 1
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get(
            "find_unused_parameters"
        ):
            raise ValueError(
                "trainer.strategy: DMD2 alternates networks; with several processes, set it to "
                "ddp_find_unused_parameters_true."
            )

    def is_student(self, turn: int) -> bool:
        """Critics train first: a student step is only as good as the fake score."""
        return turn % self.student_every == self.student_every - 1

    def step(self, module: LightningModule, loss: Tensor, optimizer: int) -> bool:
        """Run backward; once the accumulation is complete, clip and step.

        Returns:
            Whether the optimiser stepped.
        """
        chosen, trainer = module.optimizers()[optimizer], module.trainer
        module.manual_backward(loss / self._accumulate)
        num_batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # As in automatic optimisation an epoch ends with a step, so that no partial group remains.
        is_last = trainer.is_last_batch or num_batches == trainer.num_training_batches
        if num_batches % self._accumulate and not is_last:
            return False
        module.configure_gradient_clipping(chosen, self._clip, self._clip_algorithm)
        chosen.step()
        chosen.zero_grad(set_to_none=True)
        return True

    @contextmanager
    def timed(self, network: str) -> Iterator[None]:
        """Add the block's duration to a network's forward time; with a GPU, which must be
        synchronised for that, only on logged batches."""
        if torch.cuda.is_available() and not self._is_timing:
            yield
            return
        start = _now()
        yield
        self._seconds[network] = self._seconds.get(network, 0.0) + _now() - start

    def shares_of_time(self, module: LightningModule) -> dict[str, float]:
        """Each network's share of the forward time since the last logged batch."""
        trainer = module.trainer
        every = max(trainer.log_every_n_steps, 1)
        due = trainer.global_step % every
        self._is_timing = due == every - 1
        if due or not self._seconds:
            return {}
        total = sum(self._seconds.values())
        shares = {f"time_share/{name}": s / total for name, s in self._seconds.items()}
        self._seconds.clear()
        return shares


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


def _now() -> float:
    """Clock in seconds, after queued GPU work has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
