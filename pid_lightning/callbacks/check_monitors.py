"""Refuses a callback that watches a metric which is not logged."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

NUM_BATCHES = 50  # by then every metric of training has been logged


class CheckMonitors(Callback):
    """Finds misspelt metrics of `EarlyStopping`, `ModelCheckpoint` and the like before they are
    read: those of validation in the sanity check, those of training after 50 batches at most.

    Raises:
        ValueError: a metric "validate/..." or "train/..." is not logged. Others may be logged by
            other callbacks at any time.
    """

    def __init__(self) -> None:
        self._num_batches = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check metrics of validation, and of training unless nothing has trained yet."""
        if trainer.state.fn == "fit":
            _check(trainer, "validate/" if trainer.sanity_checking else ("validate/", "train/"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Check metrics of training after `NUM_BATCHES`."""
        self._num_batches += 1
        if self._num_batches == NUM_BATCHES:
            _check(trainer, "train/")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check metrics of training after a shorter epoch."""
        _check(trainer, "train/")


def _check(trainer: Trainer, prefixes: str | tuple[str, ...]) -> None:
    logged = sorted(name for name in trainer.callback_metrics if name.startswith(prefixes))
    for callback in trainer.callbacks:
        name = str(getattr(callback, "monitor", None))
        is_lenient = getattr(callback, "strict", True) is False
        if name.startswith(prefixes) and name not in logged and not is_lenient:
            raise ValueError(
                f"{type(callback).__name__}.monitor: {name!r} is not logged; choose one of "
                f"{', '.join(logged)}."
            )
