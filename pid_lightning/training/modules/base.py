"""PiDModule: the LightningModule of a denoiser and its encoder, which subclasses build."""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.taef2 import decoder_weights
from pid_lightning.encoders.text import NoText, TextEncoder, check_text
from pid_lightning.files import models as weights
from pid_lightning.nn import Geometry, PiD, PiDConfig
from pid_lightning.nn.freezing import freeze_untrained
from pid_lightning.training.checkpoints import (
    TRAINING_KEY,
    check_resumes,
    forgive_frozen,
    guard_checkpoints,
    name_as_here,
    name_plainly,
    optimizer_settings,
    read_run,
    read_start,
)
from pid_lightning.training.distillation import Distillation
from pid_lightning.training.finite import FiniteGradients
from pid_lightning.training.modules.evaluation import EvaluatedModule
from pid_lightning.training.objective import FlowMatching, Objective
from pid_lightning.training.optimizers import clip_gradients
from pid_lightning.training.report import check_evaluation
from pid_lightning.training.sample import draw_sample
from pid_lightning.training.settings import Evaluation, Training
from pid_lightning.training.side_stream import SideStream
from pid_lightning.training.strategies import check_strategy

SCALINGS = 40  # in a row; torch's scaler begins at 2^16 and halves, so that less is no remedy


class PiDModule(EvaluatedModule):
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
        distillation: the networks beside a student while `DMD2` trains it, else None.
        objective: computes the training step.
        student_times: sampling times of a distilled student, None for a teacher.
        image_size: side in pixels of the training pictures, None if unknown.

    Raises:
        Mistake: the arguments do not fit each other.
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
        self.encoder: Encoder = encoder.requires_grad_(False).eval()
        self.text_encoder: TextEncoder = (text or NoText()).requires_grad_(False).eval()
        self.encoder_arguments = encoder_arguments
        self.training_settings = training
        self.evaluation = evaluation
        self.init_from = init_from
        self.denoiser: PiD = PiD(
            denoiser, Geometry(encoder.latent_channels, encoder.latent_stride, scale)
        )
        self.denoiser.activation_checkpointing = training.activation_checkpointing
        self.denoiser_ema: PiD | None = None
        self.distillation: Distillation | None = None
        self.objective: Objective = FlowMatching(self.denoiser, training)
        self.student_times: tuple[float, ...] | None = None
        self.image_size: int | None = None
        self._num_past_steps: int | None = None  # of the last fit or checkpoint
        self._batch_end: float | None = None
        self._side_stream: SideStream | None = None  # on a GPU
        self._finite = FiniteGradients()
        if init_from == "":
            raise Mistake("model.init_from", "an empty name; name a model, or leave it out.")
        check_text(self.text_encoder, denoiser, training.caption_dropout)
        self._freeze_untrained()
        self.register_state_dict_post_hook(name_plainly)
        self.register_load_state_dict_pre_hook(name_as_here)
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
    def has_own_weights(self) -> bool:
        """Whether it was fitted or restored, so that `init_from` is past."""
        return self._num_past_steps is not None

    def setup(self, stage: str) -> None:
        """Check sizes and load pretrained weights, so that failures come before any work.

        Raises:
            Mistake: see `prepare` and `check_strategy`.
        """
        check_strategy(self.trainer.strategy)
        guard_checkpoints(self.trainer)
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
        if self.init_from is not None and not self.has_own_weights and not self.trainer.ckpt_path:
            self._start_from(self.init_from)
        if stage == "fit" and not self.has_own_weights:
            self._num_past_steps = 0

    def _start_from(self, path: str) -> None:
        fits = self.trainer.state.fn == "fit"
        found = read_start(path, self.info, self.denoiser, fits)
        self.denoiser.load_state_dict(self.denoiser.state_dict() | found.state)
        if not fits:
            self.student_times = found.info.student_times
        elif type(self.objective) is FlowMatching:  # else its callback has named them
            self.student_times = None
        if self.image_size is None:
            self.image_size = found.info.image_size

    def _load_native_decoder(self) -> None:
        """Give a new network's native decoder its published weights."""
        native = self.denoiser.adapter.native
        if native is not None and not self.has_own_weights:
            native.decoder.load_state_dict(decoder_weights())

    @property
    def num_trained_steps(self) -> int:
        """Steps that made the weights, also where a checkpoint is only tested or validated."""
        is_fit = self.trainer.state.fn == "fit"
        return self.trainer.global_step if is_fit else self._num_past_steps or 0

    def begin_average(self) -> None:
        """Attach `denoiser_ema`, a copy of the denoiser in fp32, unless there is one."""
        if self.denoiser_ema is None:
            average = copy.deepcopy(self.denoiser).float()
            average.activation_checkpointing = False
            self.denoiser_ema = average.requires_grad_(False)

    def begin_distillation(self, distillation: Distillation, objective: Objective) -> None:
        """Attach what distils the denoiser, in place of the teacher's objective."""
        self.distillation, self.objective = distillation, objective
        self.student_times = distillation.settings.student_times

    def _drop_what_no_callback_keeps(self) -> None:
        """Drop the average and the distillation of an earlier fit whose callbacks are gone."""
        kept = {n for one in self.trainer.callbacks for n in getattr(one, "attaches", ())}
        if "denoiser_ema" not in kept:
            self.denoiser_ema = None
        if self.distillation is not None and "distillation" not in kept:
            self.distillation, self.student_times = None, None
            self.objective = FlowMatching(self.denoiser, self.training_settings)
            self._freeze_untrained()  # a distillation freezes more

    def _freeze_untrained(self) -> None:
        settings = self.training_settings
        reads_null = isinstance(self.text_encoder, NoText) or settings.caption_dropout > 0
        freeze_untrained(self.denoiser, settings.train, reads_null)

    def prepare(self, data: Any, stage: str) -> None:
        """The part of `setup` that needs no trainer: the command line runs it before opening data.

        Raises:
            Mistake: crops that are not whole patches and latent cells; see `check_evaluation`.
            OSError: pretrained weights are not available.
        """
        if data is not None and stage != "predict":
            self.denoiser.check_size(data.image_size, data.image_size)
        if data is not None and stage == "fit":
            self.image_size = data.image_size
        check_evaluation(self.evaluation, self.encoder, self.denoiser, stage)
        self.encoder.load()
        self.text_encoder.load()

    def on_fit_start(self) -> None:
        """Log description and settings as hyper-parameters; compile if requested."""
        self._finite = FiniteGradients()
        if self.device.type == "cuda":
            self._side_stream = SideStream(self.device)
        if self.training_settings.compile:
            self.denoiser.compile(dynamic=False, fullgraph=True)
        if self.logger is not None:
            settings = dataclasses.asdict(self.training_settings)
            self.logger.log_hyperparams(self.info.to_plain() | {"training": settings})

    # Checkpoints: without frozen networks, self-describing, checked before loading.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model description in the checkpoint.

        Raises:
            Diverged: a gradient since the start was not finite, so that the weights are spoilt.
        """
        self._finite.check()
        checkpoint[weights.METADATA_KEY] = self.info.to_plain()
        checkpoint[TRAINING_KEY] = optimizer_settings(self.training_settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another model's checkpoint, and one of a fit with other callbacks; adopt its
        student times and, for evaluation, its average. Its tensors are then loaded strictly."""
        found = read_run(self.info, checkpoint)
        if self._trainer is not None and self.trainer.state.fn == "fit":  # None: loaded by hand
            averages = self.denoiser_ema is not None
            check_resumes(found, self.training_settings, self.student_times, averages)
            checkpoint["state_dict"] = found.state
        else:
            if found.is_averaged:
                self.begin_average()
            else:
                self.denoiser_ema = None
            ours = self.state_dict()  # of a distillation, what the checkpoint lacks is kept
            taken = {name: v for name, v in ours.items() if name.startswith("distillation.")}
            taken |= {name: v for name, v in found.state.items() if name in ours}
            checkpoint["state_dict"] = taken
        self.student_times = found.info.student_times
        if self.image_size is None:
            self.image_size = found.info.image_size
        self._num_past_steps = checkpoint.get("global_step", 0)

    # Training.

    @property
    def automatic_optimization(self) -> bool:
        """Whether Lightning steps the optimiser; the objective decides."""
        return self.objective.automatic_optimization

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """One step of the objective."""
        networks = (self.encoder, self.text_encoder, self.denoiser)
        draw = partial(draw_sample, batch, "train", *networks, self.training_settings)
        sample = draw() if self._side_stream is None else self._side_stream.run(draw)
        step = self.trainer.global_step
        loss, parts = self.objective.training_step(self, sample)
        for name in parts.keys() & {"gradient_norm", "critics_gradient_norm"}:
            self._watch(parts[name], step)
        self.log_dict({f"train/{k}": v for k, v in parts.items()}, batch_size=len(sample.x0))
        return loss

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

    def on_validation_end(self) -> None:
        """Exclude validation from the throughput."""
        self._batch_end = time.perf_counter()
        if self._side_stream is not None:
            self._side_stream.catch_up()

    def on_fit_end(self) -> None:
        """Remember the steps for tests to come."""
        self._num_past_steps = self.trainer.global_step

    def configure_optimizers(self) -> Any:
        """The optimisers and schedules of the objective."""
        return self.objective.configure_optimizers(fused=self.trainer.precision != "16-mixed")

    @property
    def num_denoiser_updates(self) -> int:
        """Optimiser steps the denoiser has taken in this run."""
        return self.objective.num_denoiser_updates(self.trainer.global_step)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer is configured and log the norm; a distillation does so itself."""
        norm = clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log("train/gradient_norm", norm)
        self._watch(norm, self.trainer.global_step)

    def _watch(self, norm: Tensor, step: int) -> None:
        """Stop where a gradient was not finite; looked at in logged steps and before saving."""
        is_scaled = self.trainer.precision == "16-mixed"  # such steps are skipped, and scaled less
        self._finite.see(norm, step, patience=SCALINGS if is_scaled else 0)
        if step % max(self.trainer.log_every_n_steps, 1) == 0:
            self._finite.check()
