"""Saves `last.ckpt` when a fit ends: after its last step, or when stopped after the current one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(Callback):
    """Saves beside a run's other checkpoints, so that `--ckpt_path last` always finds its end.

    The first Ctrl-C, or SIGTERM (of a scheduler or a container), finishes the current step, saves
    and stops the run; a second Ctrl-C stops at once. With several processes that is the next logged
    step. Only a checkpoint taken between two steps resumes exactly, so gradient accumulation is
    completed first.
    """

    def __init__(self) -> None:
        self._asked_by: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._num_steps = 0
        self._saved_step: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle Ctrl-C during the fit.

        Raises:
            ValueError: another run's `last.ckpt` would be replaced.
        """
        path, resumed = self._path(trainer), trainer.ckpt_path
        if (
            path is not None
            and path.exists()
            and not (
                str(path) == trainer.checkpoint_callback.last_model_path
                or (resumed and Path(resumed).resolve().parent == path.resolve().parent)
            )
        ):
            raise ValueError(
                f"{path} is of an earlier run: resume that with --ckpt_path, or give this run a "
                "place of its own by trainer.logger.name or version, trainer.default_root_dir, or "
                "the dirpath of ModelCheckpoint."
            )
        self._asked_by = None
        self._handle(signal.SIGINT)

    def _handle(self, number: signal.Signals) -> None:
        self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._asked_by = signal.Signals(number)
        again = ""
        if number == signal.SIGINT:
            again = " (Ctrl-C again stops at once)"
            signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\nstopping after a step{again}", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle SIGTERM, whose handler Lightning has just set; continue a resumed step count."""
        self._handle(signal.SIGTERM)
        self._num_steps = trainer.global_step
        if isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            # On resuming it forgets that it saved this step, and would save again during the next
            # accumulation.
            trainer.checkpoint_callback._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save after the last step; after Ctrl-C or SIGTERM, save and stop."""
        is_between_steps = trainer.global_step != self._num_steps
        self._num_steps = trainer.global_step
        if not is_between_steps:
            return
        # Processes agree on logged steps only, since that waits for the GPU.
        every = trainer.log_every_n_steps if trainer.world_size > 1 else 1
        is_time = trainer.global_step % max(every, 1) == 0
        asked = self._asked_by is not None
        if is_time and trainer.strategy.reduce_boolean_decision(asked, all=False):
            path = self._save(trainer)
            if trainer.is_global_zero and path is not None:
                print(f"\nsaved {path}; continue with --ckpt_path last", flush=True)
            if self._asked_by == signal.SIGTERM:
                raise SystemExit(128 + signal.SIGTERM)
            raise KeyboardInterrupt
        # Saved here, the last step of an epoch resumes with the next epoch; saved after training,
        # it would resume with one more batch of the old epoch.
        is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.global_step == trainer.max_steps or (is_last_epoch and trainer.is_last_batch):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step if something else ended the run."""
        if self._saved_step != trainer.global_step:
            self._save(trainer)

    def _path(self, trainer: Trainer) -> Path | None:
        saver = trainer.checkpoint_callback
        if not isinstance(saver, ModelCheckpoint) or not saver.dirpath or trainer.fast_dev_run:
            return None
        return Path(saver.dirpath) / "last.ckpt"

    def _save(self, trainer: Trainer) -> Path | None:
        path, saver = self._path(trainer), trainer.checkpoint_callback
        if path is None:
            return None
        # Tell it about this file, or it would save last-v1.ckpt beside it, or again at the end.
        saver.last_model_path = saver._last_checkpoint_saved = str(path)
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(path, weights_only=False)
        return path

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
