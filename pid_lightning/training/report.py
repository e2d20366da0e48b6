"""What `pid test` measures: PiD and the native decoder at every noise level of the latents."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pid_lightning.decoding.arguments import check_steps
from pid_lightning.decoding.latents import num_sampling_steps
from pid_lightning.decoding.memory import PeakMemory
from pid_lightning.pictures.files import write_picture
from pid_lightning.pictures.grids import picture_grid
from pid_lightning.pictures.lpips import lpips_network
from pid_lightning.pictures.metrics import PictureMetrics, format_table, write_csv
from pid_lightning.pictures.real_esrgan import Upscaler, read_upscaler, upscaler_label
from pid_lightning.pictures.resizing import enlarge_picture, reduce_picture
from pid_lightning.training.sample import add_evaluation_noise, evaluation_generators

if TYPE_CHECKING:
    from pid_lightning.training.modules.base import PiDModule

NUM_GRID_ROWS = 4  # pictures in the test grid


def read_baseline(module: PiDModule) -> Upscaler | None:
    """Load the upscaler that `test` applies to native decodes, None if none is configured.

    Raises:
        ValueError: the encoder has no native decoder, or the file holds another network.
        FileNotFoundError: the file does not exist.
    """
    path = module.evaluation.baseline
    if path is None:
        return None
    if not module.encoder.has_decoder:
        raise ValueError(
            f"evaluation.baseline: {module.encoder.latent_space} latents have no native decoder "
            "whose pictures Real-ESRGAN could enlarge; leave the baseline out."
        )
    return read_upscaler(path)


class Report:
    """Measures PiD and the enlarged native decode at every noise level.

    A report replaces no earlier one: a second table is ``test_metrics_1.csv``.

    Args:
        module: the module to test, with its evaluation settings.
    """

    def __init__(self, module: PiDModule) -> None:
        self.module = module
        check_steps(module.student_times, module.evaluation.steps)
        lpips = lpips_network(module.evaluation.lpips)
        self.metrics = PictureMetrics(lpips, module.device)
        upscaler = read_baseline(module)
        self.upscaler = None if upscaler is None else upscaler.to(module.device)
        self.grid_rows: list[list[Tensor]] = []

    @property
    def folder(self) -> Path:
        """Where the report is written: the run's own folder."""
        trainer = self.module.trainer
        return Path(trainer.log_dir or trainer.default_root_dir)

    def add(self, batch: dict[str, Any]) -> None:
        """Decode a batch at every noise level, by PiD and by the native decoder."""
        module, x0 = self.module, batch["image"]
        numbers = batch["number"].tolist()
        low_resolution = reduce_picture(x0, module.scale)
        clean, text = module.encode(low_resolution, batch["caption"])
        wanted = range(min(len(x0), NUM_GRID_ROWS - len(self.grid_rows)))
        # Copies on the CPU: whole batches kept on the device would add to the next peak.
        kept: dict[str, list[Tensor]] = {}
        for sigma in module.evaluation.latent_sigmas:
            latents, latent_sigma = add_evaluation_noise(module, clean, sigma, numbers)
            generators = evaluation_generators(module, "pixels", numbers)
            for method, decode in self._methods(latent_sigma, text, generators).items():
                with PeakMemory(x0.device) as cost:
                    prediction = decode(latents)
                kept.setdefault(method, []).append(prediction[: len(wanted)].to("cpu", copy=True))
                self.metrics.update(
                    (method, sigma),
                    prediction,
                    x0,
                    low_resolution,
                    module.scale,
                    cost.seconds,
                    cost.peak_bytes,
                )
                del prediction
        seen = enlarge_picture(low_resolution[: len(wanted)], module.scale).cpu()
        for i in wanted:
            pictures = [picture[i] for pictures in kept.values() for picture in pictures]
            self.grid_rows.append([seen[i], *pictures, x0[i].to("cpu", copy=True)])

    def _methods(
        self, latent_sigma: Tensor, text: Tensor | None, generators: list[torch.Generator]
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """Functions from latents to pictures of full size, keyed by their names in the table."""
        module, upscaler = self.module, self.upscaler
        native, scale = module.encoder.decode, module.scale
        methods = {"PiD": lambda z: module.decode(z, latent_sigma, text, generators)}
        if module.encoder.has_decoder:
            methods["native + bicubic"] = lambda z: enlarge_picture(native(z), scale)
        if upscaler is not None:
            methods[f"native + {upscaler_label(scale)}"] = lambda z: upscaler(native(z), scale)
        return methods

    def labels(self) -> list[str]:
        """Column names of the grid."""
        methods = ["PiD"] + ["native"] * self.module.encoder.has_decoder
        methods += ["Real-ESRGAN"] * (self.upscaler is not None)
        sigmas = self.module.evaluation.latent_sigmas
        return ["input", *(f"{m} {s:g}" for m in methods for s in sigmas), "original"]

    def finish(self) -> None:
        """Print the table; write it, the grid and the scalars to the run's folder."""
        rows = self.metrics.compute()
        trainer, folder = self.module.trainer, self.folder  # reading it is a broadcast
        if not trainer.is_global_zero:
            return
        steps = num_sampling_steps(self.module.student_times, self.module.evaluation.steps)
        print(f"\n{format_table(rows)}\n")
        print(f"sampling steps: {steps}; columns of the grid: {', '.join(self.labels())}")
        if self.upscaler is not None:
            how = upscaler_label(self.module.scale)
            print(f"baseline {self.module.evaluation.baseline}: native + {how}")
        if trainer.fast_dev_run:
            return
        table, pictures = _unused(folder / "test_metrics.csv", folder / "test_grid.png")
        write_csv(rows, table)
        grid = picture_grid(self.grid_rows, self.labels()) * 2 - 1
        write_picture(grid, pictures, {"columns": self.labels(), **self._description(steps)})
        if trainer.logger is not None:
            self._log_scalars(rows)
        print(f"table    {table}")
        print(f"pictures {pictures}")

    def _description(self, steps: int) -> dict[str, Any]:
        """What was tested, to be stored beside the pictures."""
        module, trainer = self.module, self.module.trainer
        weights = trainer.ckpt_path or module.init_from
        return {
            "weights": None if weights is None else str(weights),
            "trained_steps": module.num_trained_steps,
            "sampling_steps": steps,
            "guidance_scale": module.evaluation.guidance_scale,
            "seed": module.training_settings.seed,
            "size": list(self.grid_rows[0][-1].shape[-2:]),
        }

    def _log_scalars(self, rows: list[dict[str, Any]]) -> None:
        scalars = {
            f"test/{row['method']}/{name}/sigma_{row['latent_sigma']:g}": row[name]
            for row in rows
            for name in ("psnr", "ssim", "lpips", "consistency", "seconds")
            if not isinstance(row[name], str)
        }
        module = self.module
        module.logger.log_metrics(scalars, step=module.num_trained_steps)


def _unused(*paths: Path) -> list[Path]:
    """The paths, or with the first number behind their names that none of them has yet."""
    for number in itertools.count():
        suffix = f"_{number}" if number else ""
        numbered = [path.with_stem(path.stem + suffix) for path in paths]
        if not any(path.exists() for path in numbered):
            return numbered
