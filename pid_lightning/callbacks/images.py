"""Pictures and gate curves for TensorBoard while a run trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from pid_lightning.modules.base import PiDModule
from pid_lightning.modules.evaluation import add_test_noise, test_generators
from pid_lightning.nn import SigmaGate
from pid_lightning.pictures import enlarge_picture, picture_grid, reduce_picture


class PictureGrids(Callback):
    """At each validation: a grid of what the encoder saw, the native decode, PiD at several noise
    levels and the original; and the mean gate at each injection against the noise level.

    Args:
        num_pictures: rows of the grid, from the first validation batch.
        latent_sigmas: noise levels of the grid's columns.
        steps: sampling steps; null is the module's own number.
    """

    def __init__(
        self,
        num_pictures: int = 2,
        latent_sigmas: tuple[float, ...] = (0.0, 0.4, 0.8),
        steps: int | None = None,
    ) -> None:
        self.num_pictures = num_pictures
        self.latent_sigmas = latent_sigmas
        self.steps = steps
        self._batch: dict[str, Any] | None = None

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: PiDModule,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batch."""
        if batch_idx == 0:
            self._batch = {key: values[: self.num_pictures] for key, values in batch.items()}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: PiDModule) -> None:
        """Draw and log."""
        if self._batch is None or trainer.sanity_checking or not trainer.loggers:
            return
        # Callbacks run outside the precision plugin's autocast.
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            grid, labels = self._grid(pl_module, self._batch)
            gates = self._gates(pl_module, self._batch)
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_image"):  # TensorBoard; others take scalars only
                logger.experiment.add_image("pictures: " + " | ".join(labels), grid, step)
            logger.log_metrics(gates, step=step)

    def _grid(self, module: PiDModule, batch: dict[str, Any]) -> tuple[Tensor, list[str]]:
        x0, numbers = batch["image"], batch["number"].tolist()
        low_resolution = reduce_picture(x0, module.scale)
        clean, text = module.encode(low_resolution, batch["caption"])
        columns = {"input": enlarge_picture(low_resolution, module.scale)}
        if module.encoder.has_decoder:
            columns["native 0"] = enlarge_picture(module.encoder.decode(clean), module.scale)
        for sigma in self.latent_sigmas:
            latents, latent_sigma = add_test_noise(module, clean, sigma, numbers)
            generators = test_generators(module, "pixels", numbers)
            columns[f"PiD {sigma:g}"] = module.decode(
                latents, latent_sigma, text, generators, self.steps
            )
        columns["original"] = x0
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        return picture_grid(rows, list(columns)), list(columns)

    def _gates(self, module: PiDModule, batch: dict[str, Any]) -> dict[str, float]:
        """Mean opening of each gate on noisy pictures at t = 0.5, by noise level."""
        x0, numbers = batch["image"], batch["number"].tolist()
        clean, text = module.encode(reduce_picture(x0, module.scale), batch["caption"])
        denoiser, found = module.averaged_denoiser, {}
        t = torch.full((len(x0),), 0.5, device=x0.device)
        for sigma in self.latent_sigmas:
            latents, latent_sigma = add_test_noise(module, clean, sigma, numbers)
            condition = denoiser.condition(latents, latent_sigma, text)
            openings: list[float] = []
            hooks = [gate.register_forward_hook(_record(openings)) for gate in denoiser.gates]
            denoiser(x0, t, condition)
            for hook in hooks:
                hook.remove()
            found |= {f"gates/injection_{i}/sigma_{sigma:g}": o for i, o in enumerate(openings)}
        return found


def _record(openings: list[float]) -> Callable[..., None]:
    """A forward hook of `SigmaGate` that notes the gate's mean opening."""

    def hook(gate: SigmaGate, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        tokens, _, openness = inputs
        openings.append(gate.opening(tokens, openness).float().mean().item())

    return hook
