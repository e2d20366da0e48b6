"""EvaluatedModule: how a PiD is validated, tested and used for prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from pid_lightning.decoding.arguments import check_steps
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.latents import decode_latents
from pid_lightning.decoding.plan import Plan, num_sampling_steps
from pid_lightning.decoding.tile_choice import trained_tile
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.text import NoText, TextEncoder
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import PiD
from pid_lightning.training.objective import FlowMatching
from pid_lightning.training.predictions import PredictionWriter
from pid_lightning.training.report import Report
from pid_lightning.training.sample import draw_sample, encode_batch
from pid_lightning.training.settings import Evaluation, Training


class EvaluatedModule(LightningModule):
    """Validation, test and prediction of networks that a subclass builds.

    Attributes:
        encoder, text_encoder: frozen.
        denoiser: the trained network.
        denoiser_ema: its average, None without one.
        training_settings, evaluation: settings of the run.
        student_times: sampling times of a distilled student, None for a teacher.
        image_size: side in pixels of the training pictures, None if unknown.
        info: the description of its weights.
        init_from: name of the model that it started from, if any.
        num_trained_steps: steps that made the weights.
    """

    encoder: Encoder
    text_encoder: TextEncoder
    denoiser: PiD
    denoiser_ema: PiD | None
    training_settings: Training
    evaluation: Evaluation
    student_times: tuple[float, ...] | None
    image_size: int | None
    info: ModelInfo
    init_from: str | None
    num_trained_steps: int

    @property
    def scale(self) -> int:
        """Output side divided by the side of the encoder's input."""
        return self.denoiser.geometry.scale

    @property
    def averaged_denoiser(self) -> PiD:
        """The network for evaluation and export: the average if there is one."""
        return self.denoiser_ema if self.denoiser_ema is not None else self.denoiser

    def encode(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        """Clean normalised latents and caption features of pictures at the encoder's resolution."""
        return encode_batch(self.encoder, self.text_encoder, images, captions)

    def null_text(self, batch_size: int) -> Tensor | None:
        """Features of an empty caption (B, L, D_text), or None if the null is learned."""
        if self.denoiser.config.learned_null:
            return None
        return self.text_encoder.encode([""] * batch_size)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the flow-matching loss of the average, with the same random draws every time."""
        networks = (self.encoder, self.text_encoder, self.averaged_denoiser)
        sample = draw_sample(batch, "validate", *networks, self.training_settings)
        judged = FlowMatching(self.averaged_denoiser, self.training_settings)
        _, parts = judged.losses(sample, "validate")
        parts = {f"validate/{name}": value for name, value in parts.items()}
        self.log_dict(parts, batch_size=len(sample.x0), sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Tell loggers the step of a checkpoint that is only validated, which they take to be 0."""
        if self.trainer.state.fn == "validate":
            self.log("step", float(self.num_trained_steps), sync_dist=True)

    def decode(
        self,
        latents: Tensor,
        latent_sigma: Tensor,
        text: Tensor | None,
        generators: list[torch.Generator],
        steps: int | None = None,
    ) -> Tensor:
        """Pictures from latents by the averaged network and its own sampler.

        Pictures larger than the trained size are decoded in tiles of that size.
        """
        height, width = self.denoiser.geometry.output_size(latents)
        plan = Plan.of(
            self.denoiser,
            latents,
            student_times=self.student_times,
            time_shift=self.training_settings.time_shift,
            steps=self.evaluation.steps if steps is None else steps,
            tile=trained_tile(self.denoiser, height, width, self.image_size),
            guidance_scale=self.evaluation.guidance_scale,
        )
        null_text = self.null_text(len(latents)) if plan.guidance_scale != 1.0 else None
        return decode_latents(
            self.averaged_denoiser, plan, latents, latent_sigma, text, null_text, generators
        )

    def on_test_start(self) -> None:
        """Start the report."""
        check_steps(self.student_times, self.evaluation.steps)
        self.report: Report = Report(
            self.evaluation,
            self.training_settings,
            self.encoder,
            self.scale,
            self.encode,
            self.decode,
            self.device,
        )

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Decode the batch at every noise level, by PiD and by the native decoder."""
        self.report.add(batch, self.trainer.global_rank, self.trainer.world_size)

    def on_test_end(self) -> None:
        """Print the table and write it to the run's folder."""
        trainer = self.trainer
        weights_of = trainer.ckpt_path or self.init_from
        description = {
            "weights": None if weights_of is None else str(weights_of),
            "trained_steps": self.num_trained_steps,
            "sampling_steps": num_sampling_steps(self.student_times, self.evaluation.steps),
        }
        self.report.finish(trainer, description)

    def on_predict_start(self) -> None:
        """Create the writer of the outputs."""
        self.writer: PredictionWriter = PredictionWriter(
            PiDDecoder(self.averaged_denoiser, self.info, self.encoder),
            None if isinstance(self.text_encoder, NoText) else self.text_encoder,
            self.evaluation,
            self.training_settings.seed,
            self.init_from,
            self.trainer,
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Path]:
        """Decode pictures or latents; returns the files written.

        Raises:
            SIGTERMException: the process was asked to end.
        """
        if self.trainer.received_sigterm:  # Lightning asks in its other loops only
            raise SIGTERMException
        return self.writer.write(batch)

    def on_predict_end(self) -> None:
        """Tell of files that could not be decoded, now that the rest is."""
        self.writer.failures.tell()
