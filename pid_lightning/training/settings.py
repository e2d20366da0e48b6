"""Settings of a run: how it trains, how it distils and how it is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from pid_lightning.checks import Mistake, check_at_least, check_between, check_choice
from pid_lightning.diffusion.noising import Frame
from pid_lightning.diffusion.sampling import STUDENT_TIMES, check_student_times
from pid_lightning.nn import PiDConfig

TrainedPart = Literal["all", "adapter", "rgb_head", "latents"]
OptimizerName = Literal["adamw", "muon"]
StudentInput = Literal["rollout", "noised_data"]
StudentSteps = Literal["all", "last"]
TeacherDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Training:
    """How the denoiser trains. The defaults are those of the published teacher.

    Attributes:
        train: ``"all"``; ``"adapter"`` freezes the backbone and trains adapter and gates;
            ``"rgb_head"`` trains the adapter through its RGB head alone, without running the
            backbone: a first stage from scratch that sees many more latents in the same time;
            ``"latents"`` does the same for the adapter's estimate of the clean latents.
        optimizer: ``"adamw"``, or ``"muon"`` (Muon for matrices, AdamW for the rest), which
            needs several times fewer steps from scratch.
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay.
        warmup_steps: optimiser steps over which the learning rate rises linearly from 0.
        decay_steps: optimiser step at which a cosine from the end of warm-up reaches 0; null
            keeps the learning rate constant. Set it to the length of the whole run.
        time_shift: shift of the training times and of the teacher's solver; null derives it from
            the output size (`flow.resolution_shift`).
        time_std: standard deviation of the training times' logits before the shift; values above 1
            draw more times near 0 and 1, where sampling ends and begins.
        latent_sigma_max: highest noise level of the latents.
        latent_sigma_probability: fraction of samples with noisy latents.
        noise_frame: frame of this noise, ``"flow"`` or ``"variance_preserving"`` (SDXL).
        caption_dropout: fraction of samples whose text is replaced by the null.
        latent_dropout: fraction of samples without latents; 1 trains an unconditional backbone.
        rgb_loss_weight: weight of the RGB head's loss, if the adapter has one.
        activation_checkpointing: recompute blocks in the backward pass: slower, far less memory.
        compile: compile the denoiser: the first step takes a minute or two, later ones are faster.
        seed: of all random draws in training and evaluation.

    Raises:
        Mistake: a value is out of range.
    """

    train: TrainedPart = "all"
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 5e-5
    weight_decay: float = 1e-3
    warmup_steps: int = 2000
    decay_steps: int | None = None
    time_shift: float | None = None
    time_std: float = 1.0
    latent_sigma_max: float = 0.8
    latent_sigma_probability: float = 0.75
    noise_frame: Frame = "flow"
    caption_dropout: float = 0.1
    latent_dropout: float = 0.0
    rgb_loss_weight: float = 0.8
    activation_checkpointing: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("model.training.train", self.train, get_args(TrainedPart))
        check_choice("model.training.optimizer", self.optimizer, get_args(OptimizerName))
        check_choice("model.training.noise_frame", self.noise_frame, get_args(Frame))
        for name in ("learning_rate", "weight_decay", "warmup_steps", "rgb_loss_weight"):
            check_at_least(f"model.training.{name}", getattr(self, name), 0)
        for name in ("latent_sigma_max", "latent_sigma_probability"):
            check_between(f"model.training.{name}", getattr(self, name), 0, 1)
        for name in ("caption_dropout", "latent_dropout"):
            check_between(f"model.training.{name}", getattr(self, name), 0, 1)
        for name in ("time_std", "time_shift"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise Mistake(f"model.training.{name}", f"{value} must be above 0.")
        if self.compile and self.train in ("rgb_head", "latents"):
            raise Mistake(
                "model.training.compile",
                f"with train {self.train} the backbone, the only compiled part, is not run; set "
                "compile to false.",
            )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise Mistake(
                "model.training.decay_steps",
                f"{self.decay_steps} must be above warmup_steps ({self.warmup_steps}), or null "
                "for a constant learning rate.",
            )


@dataclass(frozen=True)
class Evaluation:
    """How `validate`, `test` and `predict` sample, and what `test` measures.

    Attributes:
        latent_sigmas: noise levels of the latents that `test` reports.
        steps: sampling steps; null uses a student's own number, or 25 for a teacher.
        guidance_scale: scale of the teacher's text guidance; 1 disables it.
        lpips: local file of LPIPS weights (.safetensors); null is the bundled AlexNet's.
        baseline: local file of an upscaler, as Real-ESRGAN, that spandrel knows; `test` then also
            reports the cascade of native decoder and upscaler.
        predict_sigma: noise level in `predict`, added to encoded pictures and assumed for given
            latents; 0 is clean.

    Raises:
        Mistake: a value is out of range.
    """

    latent_sigmas: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8])
    steps: int | None = None
    guidance_scale: float = 1.0
    lpips: str | None = None
    baseline: str | None = None
    predict_sigma: float = 0.0

    def __post_init__(self) -> None:
        if not self.latent_sigmas:
            raise Mistake("model.evaluation.latent_sigmas", "none are given; give at least one.")
        for sigma in self.latent_sigmas:
            check_between("model.evaluation.latent_sigmas", sigma, 0, 1)
        check_between("model.evaluation.predict_sigma", self.predict_sigma, 0, 1)
        if self.steps is not None:
            check_at_least("model.evaluation.steps", self.steps, 1)


@dataclass(frozen=True)
class DistillationSettings:
    """How a distillation trains; the attributes are the arguments of `DMD2`.

    Raises:
        Mistake: a value is out of range.
    """

    student_times: tuple[float, ...] = STUDENT_TIMES
    student_every: int = 6
    student_input: StudentInput = "rollout"
    student_steps: StudentSteps = "all"
    guidance_scale: float = 3.0
    generator_weight: float = 0.05
    generator_warmup: int = 100
    r1_weight: float = 200.0
    r1_noise: float = 0.1
    time_clamp: tuple[float, float] = (0.02, 0.99)
    taps: tuple[int, ...] = (7,)
    discriminator_depth: int = 1
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    fake_score_weight_decay: float = 1e-3
    teacher_dtype: TeacherDtype = "bfloat16"

    def __post_init__(self) -> None:
        check_choice("DMD2 student_input", self.student_input, get_args(StudentInput))
        check_choice("DMD2 student_steps", self.student_steps, get_args(StudentSteps))
        check_choice("DMD2 teacher_dtype", self.teacher_dtype, get_args(TeacherDtype))
        check_at_least("DMD2 student_every", self.student_every, 2)  # the others train critics
        check_at_least("DMD2 discriminator_depth", self.discriminator_depth, 1)
        for name in ("guidance_scale", "generator_weight", "generator_warmup", "r1_weight"):
            check_at_least(f"DMD2 {name}", getattr(self, name), 0)
        for name in ("r1_noise", "learning_rate", "fake_score_weight_decay"):
            check_at_least(f"DMD2 {name}", getattr(self, name), 0)
        check_student_times("DMD2 student_times", self.student_times)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise Mistake("DMD2 betas", f"{self.betas} must lie in [0, 1).")
        if not 0 < self.time_clamp[0] < self.time_clamp[1] <= 1:
            raise Mistake(
                "DMD2 time_clamp",
                f"{self.time_clamp} must be two rising times in (0, 1], as 0.02, 0.99.",
            )

    def check_networks(self, teacher: PiDConfig, image_size: int | None) -> None:
        """Check `taps` and `discriminator_depth`.

        Args:
            teacher: sizes of the teacher.
            image_size: side of the training pictures in pixels, None if unknown.

        Raises:
            Mistake: the teacher lacks a tapped block, or the discriminator is too deep.
        """
        if not self.taps or not all(0 <= tap < teacher.num_blocks for tap in self.taps):
            raise Mistake(
                "DMD2 taps",
                f"{self.taps} must be one or more of the teacher's blocks, 0 to "
                f"{teacher.num_blocks - 1}; use for example [{teacher.num_blocks // 2}].",
            )
        side = (image_size or 2**30) // teacher.patch_size
        if side >> self.discriminator_depth < 1:
            raise Mistake(
                "DMD2 discriminator_depth",
                f"{self.discriminator_depth} halves {side} patches a side to none; use at most "
                f"{max(side.bit_length() - 1, 1)}, or larger pictures.",
            )
