"""Picture grids and gate curves for TensorBoard during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from pid_lightning.checks import Mistake, check_at_least, check_between
from pid_lightning.decoding.arguments import check_steps
from pid_lightning.decoding.latents import decode_latents
from pid_lightning.decoding.plan import TEACHER_STEPS, Plan
from pid_lightning.nn import SigmaGate
from pid_lightning.pictures.grids import picture_grid
from pid_lightning.pictures.resizing import enlarge_picture, reduce_picture
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.sample import add_evaluation_noise, evaluation_generators


class PictureGrids(Callback):
    """Logs a grid at each validation (encoder input, native decode, PiD at several noise levels,
    original), and the mean value of each gate at these noise levels.

    Args:
        num_pictures: rows of the grid, from the first validation batch.
        latent_sigmas: noise levels of the grid's columns.
        steps: sampling steps; null uses the module's own number.

    Raises:
        Mistake: a value is out of range, or, when a fit begins, not a step count of the network.
    """

    title = "pictures"

    def __init__(
        self,
        num_pictures: int = 2,
        latent_sigmas: tuple[float, ...] = (0.0, 0.4, 0.8),
        steps: int | None = None,
    ) -> None:
        check_at_least("PictureGrids num_pictures", num_pictures, 1)
        for sigma in latent_sigmas:
            check_between("PictureGrids latent_sigmas", sigma, 0, 1)
        self.num_pictures = num_pictures
        self.latent_sigmas = latent_sigmas
        self.steps = steps
        self._batch: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: PiDModule) -> None:
        """Check that the network can sample in `steps`."""
        check_steps(pl_module.student_times, self.steps)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: PiDModule,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first pictures, copied so that the rest of their batch is freed."""
        if batch_idx == 0:
            first = {key: values[: self.num_pictures] for key, values in batch.items()}
            self._batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in first.items()}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: PiDModule) -> None:
        """Log the grid and the gates."""
        batch, self._batch = self._batch, None
        if batch is None or trainer.sanity_checking or not trainer.loggers:
            return
        x0, numbers = batch["image"], batch["number"].tolist()
        # Callbacks run outside the precision plugin's autocast.
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            low_resolution = reduce_picture(x0, pl_module.scale)
            clean, text = pl_module.encode(low_resolution, batch["caption"])
            columns = {"input": enlarge_picture(low_resolution, pl_module.scale)}
            columns |= self.columns(pl_module, clean, text, numbers) | {"original": x0}
            scalars = self.scalars(pl_module, x0, clean, text, numbers)
        if not trainer.is_global_zero:
            return
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        grid = picture_grid(rows, list(columns))
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_image"):  # TensorBoard; others take scalars only
                logger.experiment.add_image(self.title, grid, pl_module.num_trained_steps)
            logger.log_metrics(scalars, step=pl_module.num_trained_steps)

    def columns(
        self, module: PiDModule, clean: Tensor, text: Tensor | None, numbers: list[int]
    ) -> dict[str, Tensor]:
        """Labelled columns of pictures (B, 3, H, W) between the input and the original."""
        found, settings = {}, module.training_settings
        if module.encoder.has_decoder:
            found["native 0"] = enlarge_picture(module.encoder.decode(clean), module.scale)
        for sigma in self.latent_sigmas:
            latents, latent_sigma = add_evaluation_noise(clean, sigma, numbers, settings)
            generators = evaluation_generators(settings.seed, "pixels", numbers, clean.device)
            found[f"PiD {sigma:g}"] = module.decode(
                latents, latent_sigma, text, generators, self.steps
            )
        return found

    def scalars(
        self, module: PiDModule, x0: Tensor, clean: Tensor, text: Tensor | None, numbers: list[int]
    ) -> dict[str, float]:
        """Mean value of each gate at t = 0.5, by injection and noise level."""
        denoiser, settings, found = module.averaged_denoiser, module.training_settings, {}
        t = torch.full((len(x0),), 0.5, device=x0.device)
        for sigma in self.latent_sigmas:
            latents, latent_sigma = add_evaluation_noise(clean, sigma, numbers, settings)
            condition = denoiser.condition(latents, latent_sigma, text)
            values: list[float] = []
            hooks = [gate.register_forward_hook(_record(values)) for gate in denoiser.gates]
            denoiser.forward(x0, t, condition)  # a compiled call would skip the hooks
            for hook in hooks:
                hook.remove()
            found |= {f"gates/injection_{i}/sigma_{sigma:g}": v for i, v in enumerate(values)}
        return found


class DistillationGrids(PictureGrids):
    """The grid of a distillation, from clean latents: the teacher at 25 and 4 steps, and the
    student at each of `student_steps` that it was trained for.

    Args:
        num_pictures: rows of the grid, from the first validation batch.
        student_steps: step counts of the student's columns.

    Raises:
        Mistake: a value is out of range; in a fit, it is no distillation.
    """

    title = "distillation"

    def __init__(self, num_pictures: int = 2, student_steps: tuple[int, ...] = (4, 2, 1)) -> None:
        super().__init__(num_pictures)
        for steps in student_steps:
            check_at_least("DistillationGrids student_steps", steps, 1)
        self.student_steps = student_steps

    def on_fit_start(self, trainer: Trainer, pl_module: PiDModule) -> None:
        """Check that there is a teacher to show."""
        if pl_module.distillation is None:
            raise Mistake(
                "trainer.callbacks",
                "DistillationGrids shows the teacher of a distillation; add DMD2, or remove it.",
            )

    def columns(
        self, module: PiDModule, clean: Tensor, text: Tensor | None, numbers: list[int]
    ) -> dict[str, Tensor]:
        """The columns of teacher and student."""
        latent_sigma = torch.zeros(len(clean), device=clean.device)
        found, seed = {}, module.training_settings.seed
        for steps in (TEACHER_STEPS, 4):
            teacher, shift = module.distillation.teacher, module.training_settings.time_shift
            plan = Plan.of(teacher, clean, student_times=None, time_shift=shift, steps=steps)
            generators = evaluation_generators(seed, "pixels", numbers, clean.device)
            found[f"teacher {steps}"] = decode_latents(
                teacher, plan, clean, latent_sigma, text, generator=generators
            )
        for steps in self.student_steps:
            if steps > len(module.student_times):
                continue
            generators = evaluation_generators(seed, "pixels", numbers, clean.device)
            found[f"student {steps}"] = module.decode(clean, latent_sigma, text, generators, steps)
        return found

    def scalars(
        self, module: PiDModule, x0: Tensor, clean: Tensor, text: Tensor | None, numbers: list[int]
    ) -> dict[str, float]:
        """No scalars."""
        return {}


def _record(values: list[float]) -> Callable[..., None]:
    """A forward hook of `SigmaGate` that records the gate's mean value."""

    def hook(gate: SigmaGate, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        tokens, _, shared_logit = inputs
        values.append(gate.value(tokens, shared_logit).float().mean().item())

    return hook
