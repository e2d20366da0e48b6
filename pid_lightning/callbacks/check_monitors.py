"""Refuses a callback that watches a metric which is not logged."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class CheckMonitors(Callback):
    """Finds misspelt metrics of `EarlyStopping`, `ModelCheckpoint` and the like at the first
    validation, which usually is the sanity check before training."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what callbacks watch with what was logged.

        Raises:
            ValueError: a metric was not logged; before training, those of training may be missing.
        """
        if trainer.state.fn != "fit":  # which logs more than validation alone
            return
        logged = trainer.callback_metrics
        known = {None, "epoch", "step", *logged}  # ModelCheckpoint counts the two itself
        for callback in trainer.callbacks:
            name = getattr(callback, "monitor", None)
            is_early = trainer.sanity_checking and str(name).startswith("train/")
            if name not in known and not is_early:
                raise ValueError(
                    f"{type(callback).__name__}.monitor: {name!r} is not logged; choose one of "
                    f"{', '.join(sorted(logged))}."
                )
