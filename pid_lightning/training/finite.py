"""Stops a fit whose gradients are no longer finite, before it replaces a good checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from pid_lightning.checks import Diverged


class FiniteGradients:
    """Remembers the first step whose gradient norm was not finite, on its device, so that a GPU is
    waited for only where `check` is called."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # such a step, -1 if there was none
        self._row: Tensor | int = 0  # such steps, the last ones without a break

    def see(self, norm: Tensor, step: int, patience: int = 0) -> None:
        """Take note of the norm of the gradient of a step; forgive `patience` of them in a row."""
        self._row = torch.where(norm.isfinite(), 0, self._row + 1)
        first = torch.where(self._row > patience, step, -1)
        self._first = first if self._first is None else self._first.where(self._first >= 0, first)

    def check(self) -> None:
        """Raise `Diverged` if a norm was not finite."""
        step = -1 if self._first is None else int(self._first)
        if step >= 0:
            raise Diverged(
                f"the gradient of step {step} is not finite, so the run stops; its last checkpoint "
                "is from before. Start anew with a lower --model.training.learning_rate, or resume "
                "with --ckpt_path last and a --trainer.gradient_clip_val."
            )
