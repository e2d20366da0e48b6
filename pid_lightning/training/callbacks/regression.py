"""Regression: turns `fit` of any family into training of a few-step student without a teacher."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from pid_lightning.checks import Mistake
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.objective import FlowMatching
from pid_lightning.training.regression import RegressionObjective, RegressionSettings


class Regression(RegressionSettings, Callback):
    """Trains a student's pictures at its few times directly, see `RegressionObjective`.

    Its arguments are those of `RegressionSettings`.
    """

    def setup(self, trainer: Trainer, pl_module: PiDModule, stage: str) -> None:
        """Replace the module's objective, before a checkpoint is restored."""
        if stage != "fit":
            return
        training = pl_module.training_settings
        if training.train in ("rgb_head", "latents"):
            raise Mistake(
                "model.training.train",
                f"{training.train} makes no pictures to compare; set it to all.",
            )
        pl_module.objective = RegressionObjective(
            pl_module.denoiser, training, self, trainer.strategy.root_device
        )
        pl_module.student_times = tuple(self.student_times)
        self._let_estimate_learn(pl_module, self.latent_weight > 0)

    def teardown(self, trainer: Trainer, pl_module: PiDModule, stage: str) -> None:
        """Give the module its own objective again."""
        if stage == "fit":
            pl_module.objective = FlowMatching(pl_module.denoiser, pl_module.training_settings)
            self._let_estimate_learn(pl_module, False)

    def _let_estimate_learn(self, module: PiDModule, learns: bool) -> None:
        """Freeze the estimate of the clean latents, or let it learn by its loss."""
        native = module.denoiser.adapter.native
        if native is not None and native.denoise is not None:
            native.denoise.requires_grad_(learns)
