"""Warns before training of a callback that watches a metric which validation does not log."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class CheckMonitors(Callback):
    """Finds misspelt metrics of `EarlyStopping`, `ModelCheckpoint` and the like in the sanity
    check.

    It only warns, since other callbacks may log such a metric later. If none does, the run stops
    when the metric is first read.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what callbacks watch with what the sanity check logged."""
        if not trainer.sanity_checking:
            return
        logged = sorted(name for name in trainer.callback_metrics if name.startswith("validate/"))
        for callback in trainer.callbacks:
            name = str(getattr(callback, "monitor", None))
            if name.startswith("validate/") and name not in logged:
                rank_zero_warn(
                    f"{type(callback).__name__}.monitor: validation has not logged {name!r}, only "
                    f"{', '.join(logged)}; unless a callback logs it, the run will stop."
                )
