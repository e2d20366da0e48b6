"""A running average of the denoiser's weights, used for validation, tests, images and export."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.files.models import AVERAGE
from pid_lightning.training.modules.base import PiDModule


class EMA(Callback):
    """Averages `denoiser` in fp32 with the power profile of EDM2 (arXiv 2312.02696, equation 3).

    After the n-th denoiser update the average keeps `(1 - 1/n)^(power + 1)` of itself, so it
    spans a fixed fraction of the run, however long. Critic steps of a distillation leave the
    denoiser unchanged and do not count.

    The average is the module's submodule `denoiser_ema`, attached in `setup`, so that every
    strategy moves, saves and restores it.

    Args:
        power: 16.97 spans about 5 % of the run, 6.94 about 10 %.

    Raises:
        Mistake: `power` is not above 0.
    """

    attaches: tuple[str, ...] = ("denoiser_ema",)

    def __init__(self, power: float = 6.94) -> None:
        if power <= 0:
            raise Mistake("EMA power", f"{power} must be above 0; use 6.94 for 10 % of the run.")
        self.power = power
        self.num_updates: int = 0
        self._restored: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: PiDModule, stage: str) -> None:
        """Attach the average, in fp32 and without gradient.

        For a test, a checkpoint brings its own average and `init_from` has none.
        """
        if stage != "fit":
            return
        if trainer.global_step == 0:  # else the trainer goes on; a resumed run restores it
            self.num_updates = 0
        pl_module.begin_average()

    def on_fit_start(self, trainer: Trainer, pl_module: PiDModule) -> None:
        """Keep the average in fp32 where a precision setting cast the whole module."""
        pl_module.denoiser_ema.float()
        if self._restored:
            pl_module.denoiser_ema.load_state_dict(self._restored)
            self._restored = {}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: PiDModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep a resumed run's average from being rounded: Lightning casts the module to a
        precision like bf16-true after it has restored it."""
        if trainer.state.fn == "fit":
            state = checkpoint["state_dict"]
            own = [name for name in state if name.startswith(AVERAGE)]
            self._restored = {name.removeprefix(AVERAGE): state[name] for name in own}

    def on_train_start(self, trainer: Trainer, pl_module: PiDModule) -> None:
        """Start a new run's average from its initial weights, including those of `init_from`."""
        if self.num_updates == 0:
            self._blend(pl_module, 1.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: PiDModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if the denoiser was updated."""
        num_updates = pl_module.num_denoiser_updates
        if num_updates > self.num_updates:
            self.num_updates = num_updates
            self._blend(pl_module, 1 - (1 - 1 / num_updates) ** (self.power + 1))

    @torch.no_grad()
    def _blend(self, module: PiDModule, weight: float) -> None:
        averages = list(module.denoiser_ema.parameters())
        currents = [p.detach().float() for p in module.denoiser.parameters()]
        torch._foreach_lerp_(averages, currents, weight)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates; the average itself is in the module."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of updates."""
        self.num_updates = state_dict["num_updates"]
