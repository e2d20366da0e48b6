"""Saves `last.ckpt` when a fit ends: after its last step, or when stopped after the current one."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from pid_lightning.checks import Mistake

NAME = "last.ckpt"


class LastCheckpoint(Callback):
    """Saves beside a run's other checkpoints, so that `--ckpt_path last` always finds its end.

    The first Ctrl-C, or SIGTERM (of a scheduler or a container), finishes the current step, saves
    and stops the run; a second Ctrl-C stops at once. With several processes that is the next logged
    step. Only a checkpoint taken between two steps resumes exactly, so gradient accumulation is
    completed first, also where `trainer.max_time` or another callback stops the run.
    """

    def __init__(self) -> None:
        self._asked_by: signal.Signals | None = None
        self._num_steps = 0
        self._is_between_steps = True
        self._is_stop_postponed = False
        self._is_saving = False
        self._saved_step: int | None = None
        self._saved_loops: dict[str, Any] | None = None  # how far they were then

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a fit whose checkpoints have a place of their own, see `check_place`."""
        check_place(trainer, trainer.ckpt_path)
        self._asked_by = self._saved_step = None
        self._is_saving = self._is_stop_postponed = False

    def _on_signal(self, number: int, frame: Any) -> None:
        self._asked_by = signal.Signals(number)
        again = ""
        if number == signal.SIGINT:
            again = " (Ctrl-C again stops at once)"
            signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\nstopping after a step{again}", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle both signals until Lightning gives back the handlers that it found; continue a
        resumed run's step count."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
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
        self._is_between_steps = trainer.global_step != self._num_steps
        self._num_steps = trainer.global_step
        if self._is_between_steps:
            if self._is_asked(trainer, trainer.global_step):
                self._stop(trainer)
            trainer.should_stop |= self._is_stop_postponed
            self._is_stop_postponed = False
            # Saved here, the last step of an epoch resumes with the next epoch; saved after
            # training, it would resume with one more batch of the old epoch.
            is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
            is_last_step = trainer.global_step == trainer.max_steps
            if is_last_step or (is_last_epoch and trainer.is_last_batch):
                self._save(trainer)
        self._save_before_stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and stop within a long validation, too: a scheduler does not wait for its end."""
        if self._is_between_steps and self._is_asked(trainer, batch_idx):
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where validation stops the run, as `EarlyStopping` does; save a last step again,
        with what callbacks learned from its validation."""
        if trainer.state.fn == "fit" and self._saved_step == trainer.global_step:
            self._save(trainer, again=True)
        self._save_before_stop(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a step that is saved again resume from the same place; warn of a checkpoint that does
        not resume exactly, which validation may bring about."""
        if self._is_saving:
            self._saved_loops = copy.deepcopy(self._saved_loops or checkpoint["loops"])
            checkpoint["loops"] = self._saved_loops
        if not self._is_between_steps and trainer.global_step == self._num_steps:
            rank_zero_warn(
                "This checkpoint was saved before accumulated gradients were used; a run that "
                "resumes from it lacks them. Set trainer.val_check_interval to a multiple of "
                "trainer.accumulate_grad_batches."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step if something else ended the run; stop what would follow, if asked."""
        self._save(trainer)
        if trainer.strategy.reduce_boolean_decision(self._asked_by is not None, all=False):
            self._stop(trainer)

    def _save_before_stop(self, trainer: Trainer) -> None:
        """Save where a callback stops the run; within an accumulation let it stop after its step.

        Lightning counts an epoch that it leaves early as complete, so a later checkpoint would
        resume with the next one.
        """
        if not trainer.should_stop:
            return
        if not self._is_between_steps:
            trainer.should_stop, self._is_stop_postponed = False, True
        elif trainer.fit_loop._can_stop_early:  # else `min_steps` or `min_epochs` go on
            self._save(trainer)

    def _is_asked(self, trainer: Trainer, number: int) -> bool:
        # Processes agree on logged steps only, since that waits for the GPU.
        every = trainer.log_every_n_steps if trainer.world_size > 1 else 1
        if number % max(every, 1):
            return False
        return trainer.strategy.reduce_boolean_decision(self._asked_by is not None, all=False)

    def _stop(self, trainer: Trainer) -> NoReturn:
        """Save and leave, in all processes alike."""
        path = self._save(trainer)
        if trainer.is_global_zero and path is not None:
            print(f"\nsaved {path}; continue with --ckpt_path last", flush=True)
        is_terminated = self._asked_by == signal.SIGTERM
        is_terminated = trainer.strategy.reduce_boolean_decision(is_terminated, all=False)
        raise SystemExit(128 + signal.SIGTERM) if is_terminated else KeyboardInterrupt

    def _save(self, trainer: Trainer, again: bool = False) -> Path | None:
        """Save this step, once; returns where, or None for a run without checkpoints."""
        folder = _find_folder(trainer)
        if folder is None:
            return None
        path = folder / NAME
        if self._saved_step == trainer.global_step and not again:
            return path
        # Tell it about this file, or it would save last-v1.ckpt beside it, or again at the end.
        saver = trainer.checkpoint_callback
        saver.last_model_path = saver._last_checkpoint_saved = str(path)
        self._saved_step = trainer.global_step
        self._saved_loops = self._saved_loops if again else None
        self._is_saving = True
        trainer.save_checkpoint(path, weights_only=False)
        self._is_saving = False
        return path


def check_place(trainer: Trainer, resumed: str | Path | None) -> None:
    """Refuse to replace another run's `last.ckpt`.

    Args:
        trainer: of the fit that begins.
        resumed: the checkpoint that the fit resumes, if any.

    Raises:
        Mistake: there is one, and neither this trainer nor the run that is resumed wrote it.
    """
    folder = _find_folder(trainer)
    path = folder and folder / NAME
    if not path or not path.exists() or str(path) == trainer.checkpoint_callback.last_model_path:
        return
    is_requeued = resumed is not None and Path(resumed).name.startswith("hpc_ckpt_")
    if is_requeued or (resumed and Path(resumed).resolve().is_relative_to(folder.resolve())):
        return
    raise Mistake(
        "ckpt_path",
        f"{path} is of an earlier run: resume that with --ckpt_path, or give this run a place of "
        "its own by trainer.logger.name or version, trainer.default_root_dir, or the dirpath of "
        "ModelCheckpoint.",
    )


def _find_folder(trainer: Trainer) -> Path | None:
    """Where checkpoints go, None for a run without; before setup only a private method knows."""
    saver = trainer.checkpoint_callback
    if not isinstance(saver, ModelCheckpoint) or trainer.fast_dev_run:
        return None
    return Path(saver._ModelCheckpoint__resolve_ckpt_dir(trainer))
