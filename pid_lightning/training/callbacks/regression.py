"""Regression: turns `fit` of any family into training of a few-step student without a teacher."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from pid_lightning.checks import Mistake
from pid_lightning.nn.picture_discriminator import PictureDiscriminator
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.objective import FlowMatching
from pid_lightning.training.regression import RegressionObjective, RegressionSettings


class Regression(Callback):
    """Trains a student's pictures at its few times directly, see `RegressionObjective`.

    Args:
        student_times: pixel times of the student's steps, from noise to clean.
        last_share: fraction of the batches that train the last step; the others share the rest.
        pixel_weight: weight of the mean absolute error.
        alex_weight: weight of LPIPS with AlexNet.
        vgg_weight: weight of LPIPS with VGG16.
        vgg: ``.safetensors`` file of the weights of LPIPS with VGG16, which is not bundled.
        vgg_size: side of the random part of each picture that VGG16 sees, since it costs more than
            a small denoiser; null is all of it.
        latent_weight: weight of the error of the adapter's estimate of the clean latents, which
            is frozen at 0.
        adversarial_weight: weight of the verdict of a `PictureDiscriminator`, which learns beside
            the student and brings texture; 0 is without one.

    Raises:
        Mistake: a value is out of range.
    """

    def __init__(
        self,
        student_times: tuple[float, ...] = (0.999, 0.8, 0.5, 0.2),
        last_share: float = 0.4,
        pixel_weight: float = 2.0,
        alex_weight: float = 0.0,
        vgg_weight: float = 0.0,
        vgg: str | None = None,
        vgg_size: int | None = None,
        latent_weight: float = 0.0,
        adversarial_weight: float = 0.0,
    ) -> None:
        self.settings: RegressionSettings = RegressionSettings(
            tuple(student_times),
            last_share,
            pixel_weight,
            alex_weight,
            vgg_weight,
            vgg,
            vgg_size,
            latent_weight,
            adversarial_weight,
        )

    def setup(self, trainer: Trainer, pl_module: PiDModule, stage: str) -> None:
        """Replace the module's objective, before a checkpoint is restored."""
        if stage != "fit":
            return
        training = pl_module.training_settings
        if training.train in ("rgb_head", "latents"):
            raise Mistake(
                "training.train", f"{training.train} makes no pictures to compare; set it to all."
            )
        if self.settings.adversarial_weight:
            if not pl_module.denoiser.config.residual:
                raise Mistake(
                    "adversarial_weight",
                    "the discriminator compares with the enlarged native decode, which this "
                    "network does not add to; set denoiser.residual or leave the weight at 0.",
                )
            pl_module.picture_discriminator = PictureDiscriminator()
        pl_module.objective = RegressionObjective(
            pl_module.denoiser,
            training,
            self.settings,
            pl_module.picture_discriminator,
            trainer.strategy.root_device,
        )
        pl_module.student_times = self.settings.student_times
        self._let_estimate_learn(pl_module, self.settings.latent_weight > 0)

    def teardown(self, trainer: Trainer, pl_module: PiDModule, stage: str) -> None:
        """Give the module its own objective again."""
        if stage == "fit":
            pl_module.objective = FlowMatching(pl_module.denoiser, pl_module.training_settings)
            pl_module.picture_discriminator = None
            self._let_estimate_learn(pl_module, False)

    def _let_estimate_learn(self, module: PiDModule, learns: bool) -> None:
        """Freeze the estimate of the clean latents, or let it learn by its loss."""
        native = module.denoiser.adapter.native
        if native is not None and native.denoise is not None:
            native.denoise.requires_grad_(learns)
