"""PiDModule: the LightningModule of a denoiser and its encoder, which subclasses build."""

from __future__ import annotations

import dataclasses
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from pid_lightning.decoding.latents import decode_latents, output_size
from pid_lightning.decoding.tile_choice import trained_tile
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.taef2 import decoder_weights
from pid_lightning.encoders.text import NoText, TextEncoder, check_text
from pid_lightning.files import models as weights
from pid_lightning.nn import Geometry, PiD, PiDConfig
from pid_lightning.nn.freezing import freeze_untrained
from pid_lightning.pictures.lpips import lpips_network
from pid_lightning.training.checkpoints import (
    FROZEN,
    OPTIMIZER_SETTINGS,
    TRAINING_KEY,
    forgive_frozen,
    initialise_from,
    prepare_restoring,
)
from pid_lightning.training.objective import FlowMatching, Objective
from pid_lightning.training.optimizers import make_optimizer, make_schedule
from pid_lightning.training.predictions import PredictionWriter
from pid_lightning.training.report import Report, read_baseline
from pid_lightning.training.sample import draw_sample
from pid_lightning.training.settings import Evaluation, Training
from pid_lightning.training.side_stream import SideStream


class PiDModule(LightningModule):
    """Training, validation, test and prediction of a `PiD` behind a frozen encoder.

    A subclass builds its encoder and passes on everything else.

    Args:
        encoder: maps pictures to latents; its latents determine the adapter's sizes.
        encoder_arguments: plain values that rebuild it, stored in self-describing files.
        scale: output side divided by the side of the encoder's input.
        denoiser: sizes of the network.
        text: caption features; None conditions on a learned null.
        training: training settings.
        evaluation: sampling and test settings.
        init_from: a checkpoint, model file, bundled name or hub id to start from; in another
            latent space or at another scale, only its backbone is used.

    Attributes:
        denoiser: the trained network.
        denoiser_ema: its average if the `EMA` callback is used, else None.
        ema_callback: the `EMA` that updates it, None for a restored average.
        student_times: sampling times of a distilled student, None for a teacher.
        objective: computes the training step; a distillation callback replaces it.
        has_own_weights: whether it was fitted or restored, so that `init_from` is past.
    """

    def __init__(
        self,
        encoder: Encoder,
        encoder_arguments: dict[str, Any],
        scale: int,
        denoiser: PiDConfig,
        text: TextEncoder | None,
        training: Training,
        evaluation: Evaluation,
        init_from: str | None,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.text_encoder = (text or NoText()).requires_grad_(False).eval()
        self.encoder_arguments = encoder_arguments
        self.training_settings = training
        self.evaluation = evaluation
        self.init_from = init_from
        self.denoiser = PiD(
            denoiser, Geometry(encoder.latent_channels, encoder.latent_stride, scale)
        )
        self.denoiser.activation_checkpointing = training.activation_checkpointing
        self.denoiser_ema: PiD | None = None
        self.ema_callback: Callback | None = None
        self.student_times: tuple[float, ...] | None = None
        self.image_size: int | None = None
        self.objective: Objective = FlowMatching()
        self.has_own_weights = False
        self._num_past_steps = 0  # of the last fit or checkpoint
        self._batch_end: float | None = None
        self._side_stream: SideStream | None = None
        if init_from == "":
            raise ValueError("init_from: an empty name; name a model, or leave it out.")
        check_text(self.text_encoder, denoiser, training.caption_dropout)
        self._freeze_untrained()
        self.register_load_state_dict_post_hook(forgive_frozen)

    # Description and setup.

    @property
    def info(self) -> weights.ModelInfo:
        """The description of this module's weights."""
        return weights.ModelInfo(
            family=type(self).__name__,
            encoder=self.encoder_arguments,
            latent_space=self.encoder.latent_space,
            geometry=self.denoiser.geometry,
            image_size=self.image_size,
            latent_sigma_max=self.training_settings.latent_sigma_max,
            noise_frame=self.training_settings.noise_frame,
            student_times=self.student_times,
            config=self.denoiser.config,
            time_shift=self.training_settings.time_shift,
        )

    @property
    def scale(self) -> int:
        """Output side divided by the side of the encoder's input."""
        return self.denoiser.geometry.scale

    @property
    def averaged_denoiser(self) -> PiD:
        """The network for evaluation and export: the average if there is one."""
        return self.denoiser_ema if self.denoiser_ema is not None else self.denoiser

    def setup(self, stage: str) -> None:
        """Check sizes and load pretrained weights, so that failures come before any work.

        Raises:
            ValueError: see `prepare` and `check_strategy`.
        """
        check_strategy(self.trainer.strategy)
        self.prepare(self.trainer.datamodule, stage)
        if stage == "fit":
            self._drop_what_no_callback_keeps()
        # Intended: the module copies batches instead of the data module, see `side_stream`.
        warnings.filterwarnings("ignore", "You have overridden `transfer_batch_to_device`")
        if self.trainer.precision == "bf16-mixed":  # matmuls run in bf16 anyway, at half the memory
            self.encoder.bfloat16()
            self.text_encoder.bfloat16()
        if self.trainer.precision == "64-true":  # Lightning casts after it restores a checkpoint
            self.double()
        self._load_native_decoder()
        restores = self.has_own_weights or self.trainer.ckpt_path is not None
        if self.init_from is not None and not restores:
            initialise_from(self, self.init_from)
        self.has_own_weights |= stage == "fit"

    def _load_native_decoder(self) -> None:
        """Give a new network's native decoder its published weights."""
        native = self.denoiser.adapter.native
        if native is not None and not self.has_own_weights:
            native.decoder.load_state_dict(decoder_weights())

    @property
    def num_trained_steps(self) -> int:
        """Steps that made the weights, also where a checkpoint is only tested or validated."""
        is_fit = self.trainer.state.fn == "fit"
        return self.trainer.global_step if is_fit else self._num_past_steps

    def _drop_what_no_callback_keeps(self) -> None:
        """Drop the average and the distillation of an earlier fit whose callbacks are gone."""
        if self.ema_callback not in self.trainer.callbacks:
            self.denoiser_ema = None
        if isinstance(self.objective, Callback) and self.objective not in self.trainer.callbacks:
            self.objective, self.student_times = FlowMatching(), None
            del self.fake_score, self.discriminator, self.teacher
            self._freeze_untrained()  # DMD2 froze more

    def _freeze_untrained(self) -> None:
        settings = self.training_settings
        reads_null = isinstance(self.text_encoder, NoText) or settings.caption_dropout > 0
        freeze_untrained(self.denoiser, settings.train, reads_null)

    def prepare(self, data: Any, stage: str) -> None:
        """The part of `setup` that needs no trainer: the command line runs it before opening data.

        Raises:
            ValueError: crops that are not whole patches and latent cells, guidance without text,
                a baseline that the encoder or the file does not allow, or damaged weights of
                LPIPS.
            OSError: pretrained weights are not available.
        """
        if data is not None and stage != "predict":
            self.denoiser.check_size(data.image_size, data.image_size)
        if data is not None and stage == "fit":
            self.image_size = data.image_size
        guided = self.evaluation.guidance_scale != 1
        if guided and stage != "validate" and self.denoiser.text_embedding is None:
            raise ValueError(
                f"evaluation.guidance_scale: {self.evaluation.guidance_scale} guides by text, but "
                "this network has no text stream; set it to 1."
            )
        if stage in ("fit", "test"):  # a fit may end with a test, hours later
            read_baseline(self)
            lpips_network(self.evaluation.lpips)
        self.encoder.load()
        self.text_encoder.load()

    def on_fit_start(self) -> None:
        """Log description and settings as hyper-parameters; compile if requested."""
        if self.device.type == "cuda":
            self._side_stream = SideStream(self.device)
        if self.training_settings.compile:
            self.denoiser.compile(dynamic=False, fullgraph=True)
        if self.logger is not None:
            settings = dataclasses.asdict(self.training_settings)
            self.logger.log_hyperparams(self.info.to_plain() | {"training": settings})

    # Checkpoints: without frozen networks, self-describing, checked before loading.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The state without the frozen networks."""
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if name.startswith(FROZEN)]:
            del state[name]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model description in the checkpoint."""
        checkpoint[weights.METADATA_KEY] = self.info.to_plain()
        settings = dataclasses.asdict(self.training_settings)
        checkpoint[TRAINING_KEY] = {name: settings[name] for name in OPTIMIZER_SETTINGS}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another model's checkpoint; adopt its student times and its average."""
        prepare_restoring(self, checkpoint)
        self._num_past_steps = checkpoint.get("global_step", 0)

    # Training.

    @property
    def automatic_optimization(self) -> bool:
        """Whether Lightning steps the optimiser; the objective decides."""
        return self.objective.automatic_optimization

    @torch.no_grad()
    def encode(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        """Clean normalised latents and caption features of pictures at the encoder's resolution."""
        # Cloned because the adapter's backward pass cannot save inference tensors.
        with torch.inference_mode():
            latents = self.encoder.encode(images)
            text = self.text_encoder.encode(captions)
        return latents.clone(), None if text is None else text.clone()

    def null_text(self, batch_size: int) -> Tensor | None:
        """Features of an empty caption (B, L, D_text), or None if the null is learned."""
        if self.denoiser.config.learned_null:
            return None
        return self.text_encoder.encode([""] * batch_size)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """One step of the objective."""
        draw = partial(draw_sample, self, batch, "train")
        sample = draw() if self._side_stream is None else self._side_stream.run(draw)
        return self.objective.training_step(self, sample)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Copy a batch to the device; in training, on the side stream."""
        copy = partial(super().transfer_batch_to_device, batch, device, dataloader_idx)
        beside = self._side_stream is not None and self.trainer.training
        return self._side_stream.run(copy) if beside else copy()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Log throughput: global batch size over the seconds since the last batch ended."""
        now, num_images = time.perf_counter(), len(batch["image"]) * self.trainer.world_size
        if self._batch_end is not None:
            # A tensor on the CPU: Lightning would move a number to the GPU, and wait for it.
            rate = torch.tensor(num_images / (now - self._batch_end))
            self.log("train/images_per_second", rate)
        self._batch_end = now

    def on_validation_epoch_end(self) -> None:
        """Tell loggers the step of a checkpoint that is only validated, which they take to be 0."""
        if self.trainer.state.fn == "validate":
            self.log("step", float(self.num_trained_steps), sync_dist=True)

    def on_validation_end(self) -> None:
        """Exclude validation from the throughput."""
        self._batch_end = time.perf_counter()
        if self._side_stream is not None:
            self._side_stream.catch_up()

    def on_fit_end(self) -> None:
        """Remember the steps for tests to come."""
        self._num_past_steps = self.trainer.global_step

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the flow-matching loss of the average, with the same random draws every time."""
        sample = draw_sample(self, batch, "validate")
        _, parts = FlowMatching().losses(self, self.averaged_denoiser, sample, "validate")
        parts = {f"validate/{name}": value for name, value in parts.items()}
        self.log_dict(parts, batch_size=len(sample.x0), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """The optimisers and schedules of the objective."""
        return self.objective.configure_optimizers(self)

    @property
    def num_denoiser_updates(self) -> int:
        """Optimiser steps the denoiser has taken in this run."""
        return self.objective.num_denoiser_updates(self)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the gradient norm, then clip as the trainer is configured.

        Lightning refuses to clip for fused optimisers, which unscale fp16 gradients themselves;
        here they are only used when gradients are not scaled.
        """
        learning = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
        is_own = any(p is learning[0] for p in self.denoiser.parameters())
        self.log("train/gradient_norm" if is_own else "train/critics_gradient_norm", norm)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(learning, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(learning, gradient_clip_val, norm)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The configured optimiser for the trainable parameters of the denoiser."""
        fused = self.trainer.precision != "16-mixed"
        return make_optimizer(self.denoiser, self.training_settings, fused)

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Linear warm-up, then constant or a cosine to 0 (see `Training`)."""
        settings = self.training_settings
        return make_schedule(optimizer, settings.warmup_steps, settings.decay_steps)

    # Sampling: test and prediction.

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
        height, width = output_size(self.denoiser, latents)
        guided = self.evaluation.guidance_scale != 1.0
        return decode_latents(
            self.averaged_denoiser,
            latents,
            latent_sigma,
            student_times=self.student_times,
            time_shift=self.training_settings.time_shift,
            steps=self.evaluation.steps if steps is None else steps,
            text=text,
            null_text=self.null_text(len(latents)) if guided else None,
            guidance_scale=self.evaluation.guidance_scale,
            generator=generators,
            tile=trained_tile(self.denoiser, height, width, self.image_size),
        )

    def on_test_start(self) -> None:
        """Start the report."""
        self.report = Report(self)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Decode the batch at every noise level, by PiD and by the native decoder.

        The distributed sampler repeats pictures so that every process has the same number; the
        repeats are left out.
        """
        rank, num_ranks = self.trainer.global_rank, self.trainer.world_size
        own = [i for i, n in enumerate(batch["number"].tolist()) if n % num_ranks == rank]
        if own:
            self.report.add(
                {
                    key: values[own] if isinstance(values, Tensor) else [values[i] for i in own]
                    for key, values in batch.items()
                }
            )

    def on_test_end(self) -> None:
        """Print the table and write it to the run's folder."""
        self.report.finish()

    def on_predict_start(self) -> None:
        """Create the writer of the outputs."""
        self.writer = PredictionWriter(self)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Path]:
        """Decode pictures or latents; returns the files written.

        Raises:
            SIGTERMException: the process was asked to end.
        """
        if self.trainer.received_sigterm:  # Lightning asks in its other loops only
            raise SIGTERMException
        return self.writer.write(batch)


def check_strategy(strategy: Strategy) -> None:
    """Raise ValueError for FSDP."""
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "trainer.strategy: FSDP is not supported, since it would cut the network and its "
            "average at different places, and takes no frozen encoder in bf16; use ddp, with "
            "training.activation_checkpointing if memory is short."
        )
