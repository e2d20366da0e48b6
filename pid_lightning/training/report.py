"""What `pid test` measures: PiD and the native decoder at every noise level of the latents."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.decoding.memory import PeakMemory
from pid_lightning.encoders.base import Encoder
from pid_lightning.nn import PiD
from pid_lightning.pictures.files import write_picture
from pid_lightning.pictures.grids import picture_grid
from pid_lightning.pictures.lpips import lpips_network
from pid_lightning.pictures.metrics import PictureMetrics, format_table, write_csv
from pid_lightning.pictures.resizing import enlarge_picture, reduce_picture
from pid_lightning.pictures.upscalers import Upscaler, read_upscaler
from pid_lightning.training.sample import add_evaluation_noise, evaluation_generators
from pid_lightning.training.settings import Evaluation, Training

Encode = Callable[[Tensor, list[str]], tuple[Tensor, Tensor | None]]
Decode = Callable[[Tensor, Tensor, Tensor | None, list[torch.Generator]], Tensor]

NUM_GRID_ROWS = 4  # pictures in the test grid


def read_baseline(evaluation: Evaluation, encoder: Encoder) -> Upscaler | None:
    """Load the upscaler that `test` applies to native decodes, None if none is configured.

    Raises:
        Mistake: the encoder has no native decoder, or the file holds another network.
        FileNotFoundError: the file does not exist.
    """
    if evaluation.baseline is None:
        return None
    if not encoder.has_decoder:
        raise Mistake(
            "model.evaluation.baseline",
            f"{encoder.latent_space} latents have no native decoder whose pictures the upscaler "
            "could enlarge; leave the baseline out.",
        )
    return read_upscaler(evaluation.baseline)


def check_evaluation(evaluation: Evaluation, encoder: Encoder, denoiser: PiD, stage: str) -> None:
    """Check that networks allow what is configured, before any work.

    Args:
        stage: ``"fit"``, which may end with a test, ``"validate"``, ``"test"`` or ``"predict"``.

    Raises:
        Mistake: guidance without text, a baseline that the encoder or the file does not allow, or
            damaged weights of LPIPS.
    """
    scale, samples = evaluation.guidance_scale, stage != "validate"
    if scale != 1 and samples and denoiser.text_embedding is None:
        raise Mistake(
            "model.evaluation.guidance_scale",
            f"{scale} guides by text, but this network has no text stream; set it to 1.",
        )
    if stage in ("fit", "test"):
        read_baseline(evaluation, encoder)
        lpips_network(evaluation.lpips)


@dataclass
class Report:
    """Measures PiD and the enlarged native decode at every noise level.

    A report replaces no earlier one: a second table is ``test_metrics_1.csv``.

    Args:
        evaluation: what is measured.
        training: the seed, and the frame of the latents' noise.
        encoder: the native decoder, where it has one.
        scale: output side divided by the side of the encoder's input.
        encode: pictures and captions to clean latents and text features.
        decode: latents, noise levels, text features and generators to pictures.
        device: of the metrics.
    """

    evaluation: Evaluation
    training: Training
    encoder: Encoder
    scale: int
    encode: Encode
    decode: Decode
    device: torch.device

    def __post_init__(self) -> None:
        self.metrics: PictureMetrics = PictureMetrics(
            lpips_network(self.evaluation.lpips), self.device
        )
        upscaler = read_baseline(self.evaluation, self.encoder)
        self.upscaler: Upscaler | None = None if upscaler is None else upscaler.to(self.device)
        self.grid_rows: list[list[Tensor]] = []

    def add(self, batch: dict[str, Any], rank: int = 0, num_ranks: int = 1) -> None:
        """Decode a batch at every noise level, by PiD and by the native decoder.

        The distributed sampler repeats pictures so that every process has the same number; the
        repeats are left out.
        """
        own = [i for i, n in enumerate(batch["number"].tolist()) if n % num_ranks == rank]
        if not own:
            return
        x0, numbers = batch["image"][own], batch["number"][own].tolist()
        low_resolution = reduce_picture(x0, self.scale)
        clean, text = self.encode(low_resolution, [batch["caption"][i] for i in own])
        wanted = range(min(len(x0), NUM_GRID_ROWS - len(self.grid_rows)))
        # Copies on the CPU: whole batches kept on the device would add to the next peak.
        kept: dict[str, list[Tensor]] = {}
        for sigma in self.evaluation.latent_sigmas:
            latents, latent_sigma = add_evaluation_noise(clean, sigma, numbers, self.training)
            generators = evaluation_generators(self.training.seed, "pixels", numbers, x0.device)
            for method, decode in self._methods(latent_sigma, text, generators).items():
                with PeakMemory(x0.device) as cost:
                    prediction = decode(latents)
                kept.setdefault(method, []).append(prediction[: len(wanted)].to("cpu", copy=True))
                self.metrics.update(
                    (method, sigma),
                    prediction,
                    x0,
                    low_resolution,
                    self.scale,
                    cost.seconds,
                    cost.peak_bytes,
                )
                del prediction
        seen = enlarge_picture(low_resolution[: len(wanted)], self.scale).cpu()
        for i in wanted:
            pictures = [picture[i] for pictures in kept.values() for picture in pictures]
            self.grid_rows.append([seen[i], *pictures, x0[i].to("cpu", copy=True)])

    def _methods(
        self, latent_sigma: Tensor, text: Tensor | None, generators: list[torch.Generator]
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """Functions from latents to pictures of full size, keyed by their names in the table."""
        native, upscaler, scale = self.encoder.decode, self.upscaler, self.scale
        methods = {"PiD": lambda z: self.decode(z, latent_sigma, text, generators)}
        if self.encoder.has_decoder:
            methods["native + bicubic"] = lambda z: enlarge_picture(native(z), scale)
        if upscaler is not None:
            methods[f"native + {upscaler.label(scale)}"] = lambda z: upscaler(native(z), scale)
        return methods

    def labels(self) -> list[str]:
        """Column names of the grid."""
        methods = ["PiD"] + ["native"] * self.encoder.has_decoder
        methods += [] if self.upscaler is None else [self.upscaler.label(self.scale)]
        sigmas = self.evaluation.latent_sigmas
        return ["input", *(f"{m} {s:g}" for m in methods for s in sigmas), "original"]

    def finish(self, trainer: Trainer, description: dict[str, Any]) -> None:
        """Print the table; write it, the grid and the scalars to the run's folder.

        Args:
            trainer: names the folder and the logger.
            description: of the weights and their steps, stored beside the pictures.
        """
        rows = self.metrics.compute()
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # reading it is a broadcast
        if not trainer.is_global_zero:
            return
        steps, labels = description["sampling_steps"], self.labels()
        print(f"\n{format_table(rows)}\n")
        print(f"sampling steps: {steps}; columns of the grid: {', '.join(labels)}")
        if self.upscaler is not None:
            how = self.upscaler.label(self.scale)
            print(f"baseline {self.evaluation.baseline}: native + {how}")
        if trainer.fast_dev_run:
            return
        table, pictures = _unused(folder / "test_metrics.csv", folder / "test_grid.png")
        write_csv(rows, table)
        settings = {
            "guidance_scale": self.evaluation.guidance_scale,
            "seed": self.training.seed,
            "size": list(self.grid_rows[0][-1].shape[-2:]),
        }
        grid = picture_grid(self.grid_rows, labels) * 2 - 1
        write_picture(grid, pictures, {"columns": labels, **description, **settings})
        if trainer.logger is not None:
            trainer.logger.log_metrics(_scalars(rows), step=description["trained_steps"])
        print(f"table    {table}")
        print(f"pictures {pictures}")


def _scalars(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        f"test/{row['method']}/{name}/sigma_{row['latent_sigma']:g}": row[name]
        for row in rows
        for name in ("psnr", "ssim", "lpips", "consistency", "seconds")
        if not isinstance(row[name], str)
    }


def _unused(*paths: Path) -> list[Path]:
    """The paths, or with the first number behind their names that none of them has yet."""
    for number in itertools.count():
        suffix = f"_{number}" if number else ""
        numbered = [path.with_stem(path.stem + suffix) for path in paths]
        if not any(path.exists() for path in numbered):
            return numbered
