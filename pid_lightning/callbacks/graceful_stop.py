"""Ctrl-C: the step in progress is finished and saved before the run ends."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class GracefulStop(Callback):
    """On the first Ctrl-C finish the step, save `last.ckpt` and stop; the second stops at once.

    A checkpoint taken between two steps resumes exactly; one from within a step could not.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C for the length of the fit."""
        self._asked = False
        self._previous = signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        self._asked = True
        print("\nstopping after this step (Ctrl-C again stops at once)", flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save and stop between two steps, on every process."""
        if not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        checkpoints = trainer.checkpoint_callback
        folder = Path(checkpoints.dirpath if checkpoints else trainer.default_root_dir)
        trainer.save_checkpoint(folder / "last.ckpt")
        if trainer.is_global_zero:
            print(f"\nsaved {folder / 'last.ckpt'}; continue with --ckpt_path last", flush=True)
        raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
