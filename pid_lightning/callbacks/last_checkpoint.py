"""`last.ckpt` whenever a fit ends: at its last step, or on Ctrl-C after the step in progress."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LastCheckpoint(Callback):
    """Saves beside the other checkpoints of a run, so that `--ckpt_path last` always finds its end.

    On the first Ctrl-C the step in progress is finished, saved and the run stops; the second stops
    at once. A checkpoint taken between two steps resumes exactly; one from within could not.
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
        """Where Ctrl-C was pressed, save and stop between two steps, on every process."""
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            path = self._save(trainer)
            if trainer.is_global_zero and path is not None:
                print(f"\nsaved {path}; continue with --ckpt_path last", flush=True)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, which need not be one that the run was told to save."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> Path | None:
        if trainer.checkpoint_callback is None or trainer.checkpoint_callback.dirpath is None:
            return None
        path = Path(trainer.checkpoint_callback.dirpath) / "last.ckpt"
        trainer.save_checkpoint(path)
        return path

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
