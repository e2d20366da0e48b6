"""DMD2: turns `fit` of any family into distillation of its teacher to a few steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from pid_lightning.checks import check_at_least, check_choice
from pid_lightning.decoding.arguments import check_steps
from pid_lightning.decoding.latents import conditioned_velocity
from pid_lightning.diffusion import flow, losses, sampling
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.files import models as weights
from pid_lightning.files.hub import find_model
from pid_lightning.nn import Condition, Discriminator, PiD
from pid_lightning.nn.freezing import freeze_unused
from pid_lightning.training.callbacks.turns import Turns, resting
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.sample import Sample

STUDENT_INPUTS = ("rollout", "noised_data")
STUDENT_STEPS = ("all", "last")
TEACHER_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CRITIC_SETTINGS = ("learning_rate", "betas", "fake_score_weight_decay")  # their optimiser's


class DMD2(Callback):
    """Distribution matching distillation (DMD2, arXiv 2405.14867) as the module's objective.

    The student is `module.denoiser`. Student, frozen teacher and fake score start from the same
    weights. One of `student_every` batches trains the student; the others train the fake score on
    the student's outputs and a discriminator on the teacher's features. One batch is one
    `global_step`; `training.learning_rate`, its schedule and `EMA` apply to the student and count
    its steps.

    Args:
        teacher: a run with the same config (a checkpoint, or the folder, for its newest one), a
            model file, a bundled name or a hub id.
        student_times: pixel times of the student's steps, from noise to clean.
        student_every: batches from one student step to the next.
        student_input: ``"rollout"``, the student's own steps from noise without gradient, or
            ``"noised_data"``, noised real images.
        student_steps: ``"all"`` trains a random step of the student each time, ``"last"`` only the
            final one. All steps share one fake score: if the first ones stay blurred, as with a
            small student, it drives the last one to overcompensate.
        guidance_scale: text guidance of the teacher; it has no effect without text.
        generator_weight: weight of the adversarial loss in the student's loss.
        generator_warmup: student steps over which that weight rises linearly.
        r1_weight: weight of the approximate R1 penalty.
        r1_noise: standard deviation of the noise that R1 adds.
        time_clamp: smallest and largest time at which scores are compared and trained.
        taps: teacher blocks (0-based) whose features the discriminator sees.
        discriminator_depth: number of strided convolutions in the discriminator.
        learning_rate: of fake score and discriminator.
        betas: of their AdamW.
        fake_score_weight_decay: of the fake score.
        teacher_dtype: dtype of the frozen teacher's weights.

    Raises:
        ValueError: settings out of range, or a teacher that does not match the config or was
            itself distilled.
    """

    automatic_optimization = False

    def __init__(
        self,
        teacher: str,
        student_times: tuple[float, ...] = sampling.STUDENT_TIMES,
        student_every: int = 6,
        student_input: str = "rollout",
        student_steps: str = "all",
        guidance_scale: float = 3.0,
        generator_weight: float = 0.05,
        generator_warmup: int = 100,
        r1_weight: float = 200.0,
        r1_noise: float = 0.1,
        time_clamp: tuple[float, float] = (0.02, 0.99),
        taps: tuple[int, ...] = (7,),
        discriminator_depth: int = 1,
        learning_rate: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        fake_score_weight_decay: float = 1e-3,
        teacher_dtype: str = "bfloat16",
    ) -> None:
        check_choice("DMD2 student_input", student_input, STUDENT_INPUTS)
        check_choice("DMD2 student_steps", student_steps, STUDENT_STEPS)
        check_choice("DMD2 teacher_dtype", teacher_dtype, TEACHER_DTYPES)
        check_at_least("DMD2 student_every", student_every, 2)  # the other batches train critics
        for name, value, least in (
            ("generator_weight", generator_weight, 0),
            ("r1_weight", r1_weight, 0),
            ("r1_noise", r1_noise, 0),
            ("discriminator_depth", discriminator_depth, 1),
            ("learning_rate", learning_rate, 0),
            ("guidance_scale", guidance_scale, 0),
            ("generator_warmup", generator_warmup, 0),
            ("fake_score_weight_decay", fake_score_weight_decay, 0),
        ):
            check_at_least(f"DMD2 {name}", value, least)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"DMD2 betas: {betas} must lie in [0, 1).")
        if not student_times or list(student_times) != sorted(set(student_times), reverse=True):
            raise ValueError(
                f"DMD2 student_times: {student_times} must decrease, for example [0.9, 0.5]."
            )
        if not all(0 < t <= 1 for t in student_times):
            raise ValueError(f"DMD2 student_times: {student_times} must lie in (0, 1].")
        if not 0 < time_clamp[0] < time_clamp[1] <= 1:
            raise ValueError(
                f"DMD2 time_clamp: {time_clamp} must be two rising times in (0, 1], as 0.02, 0.99."
            )
        self.teacher = teacher
        self.student_times = tuple(student_times)
        self.student_input = student_input
        self.student_steps = student_steps
        self.guidance_scale = guidance_scale
        self.generator_weight = generator_weight
        self.generator_warmup = generator_warmup
        self.r1_weight = r1_weight
        self.r1_noise = r1_noise
        self.time_clamp = tuple(time_clamp)
        self.taps = taps
        self.discriminator_depth = discriminator_depth
        self.learning_rate = learning_rate
        self.betas = tuple(betas)
        self.fake_score_weight_decay = fake_score_weight_decay
        self.teacher_dtype = TEACHER_DTYPES[teacher_dtype]
        self.turns = Turns(student_every)
        self.num_student_updates = 0
        self._fingerprint = ""

    # Setup.

    def setup(self, trainer: Trainer, pl_module: PiDModule, stage: str) -> None:
        """Attach the networks before Lightning wraps, moves, saves and restores the module."""
        if stage != "fit":
            return
        self.turns.take_over(trainer)
        if trainer.global_step == 0:  # else the trainer goes on; a resumed run restores it
            self.num_student_updates = 0
        pl_module.student_times = self.student_times
        if pl_module.objective is self:  # fitted before, in the same process
            return
        if pl_module.training_settings.train == "rgb_head":
            raise ValueError("training.train: rgb_head makes no pictures to distil; set it to all.")
        pl_module.prepare(trainer.datamodule, stage)  # tells the size of the pictures
        teacher = self.open_teacher(pl_module)
        rank_zero_info(f"DMD2 teacher: {find_model(self.teacher)}")
        self._fingerprint = weights.fingerprint(teacher)
        pl_module.denoiser.load_state_dict(teacher.state_dict())
        pl_module.fake_score = copy.deepcopy(pl_module.denoiser).requires_grad_(True)
        # From the run's seed, not torch's, so that every number of processes gets the same weights.
        seed = pl_module.training_settings.seed
        pl_module.discriminator = Discriminator(
            teacher.config.width, len(self.taps), self.discriminator_depth
        )
        pl_module.discriminator.reset_parameters(*sample_generators(seed, "discriminator", [0]))
        # The student's adversarial loss backpropagates through the teacher's first blocks.
        teacher.activation_checkpointing = pl_module.denoiser.activation_checkpointing
        pl_module.teacher = teacher.to(self.teacher_dtype).requires_grad_(False).eval()
        for network in (pl_module.denoiser, pl_module.fake_score):
            freeze_unused(network)
        pl_module.objective = self

    def on_fit_start(self, trainer: Trainer, pl_module: PiDModule) -> None:
        """Compile fake score and teacher if the student is compiled."""
        if pl_module.training_settings.compile:
            for network in (pl_module.fake_score, pl_module.teacher):
                network.compile(dynamic=False, fullgraph=True)

    def open_teacher(self, module: PiDModule) -> PiD:
        """Load the teacher and check it against `module`.

        Raises:
            ValueError: the teacher is another model, is itself distilled or lacks a tapped block,
                the discriminator is too deep, the student has fewer than `evaluation.steps`, or
                `init_from` is given too.
            OSError: the teacher is neither a local model nor on the hub.
        """
        if module.init_from is not None and not module.has_own_weights:
            raise ValueError(
                f"init_from: {module.init_from} is not used, since DMD2 starts the student from "
                f"its teacher ({self.teacher}); leave it out."
            )
        try:
            teacher, info = weights.load_model(find_model(self.teacher))
        except OSError as error:
            raise OSError(f"DMD2 teacher: {error}") from error
        differences = module.info.differences(info)
        if differences:
            raise ValueError(
                f"DMD2 teacher: {self.teacher} does not match this config "
                f"({'; '.join(differences)}); give a teacher trained with it."
            )
        if info.student_times is not None:
            raise ValueError(
                f"DMD2 teacher: {self.teacher} is itself a distilled student; give its teacher."
            )
        check_steps(self.student_times, module.evaluation.steps)
        num_blocks = info.config.num_blocks
        if not self.taps or not all(0 <= tap < num_blocks for tap in self.taps):
            raise ValueError(
                f"DMD2 taps: {self.taps} must be one or more of the teacher's blocks, 0 to "
                f"{num_blocks - 1}; use for example [{num_blocks // 2}]."
            )
        side = (module.image_size or 2**30) // info.config.patch_size
        if side >> self.discriminator_depth < 1:
            raise ValueError(
                f"DMD2 discriminator_depth: {self.discriminator_depth} halves {side} patches a "
                f"side to none; use at most {max(side.bit_length() - 1, 1)}, or larger pictures."
            )
        return teacher

    def configure_optimizers(self, module: PiDModule) -> tuple[list[Any], list[Any]]:
        """The student's optimiser and schedule, and one optimiser for both critics."""
        student = module.make_optimizer()
        critics = torch.optim.AdamW(
            [
                {
                    "params": [p for p in module.fake_score.parameters() if p.requires_grad],
                    "weight_decay": self.fake_score_weight_decay,
                },
                {"params": module.discriminator.parameters(), "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=self.betas,
            fused=True,
        )
        # Stepped by hand; the interval is that at which `LearningRateMonitor` logs it.
        schedule = {"scheduler": module.make_schedule(student), "interval": "step"}
        return [student, critics], [schedule]

    def num_denoiser_updates(self, module: PiDModule) -> int:
        """The number of student steps."""
        return self.num_student_updates

    def state_dict(self) -> dict[str, Any]:
        """The student's step count, the teacher's fingerprint and the critics' settings."""
        return {
            "num_student_updates": self.num_student_updates,
            "teacher": self._fingerprint,
            "critics": {name: getattr(self, name) for name in CRITIC_SETTINGS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step count; a resumed fit must have the same teacher, a test has none.

        Raises:
            ValueError: another teacher, or settings that the critics' optimiser would not take.
        """
        if self._fingerprint and state_dict["teacher"] != self._fingerprint:
            raise ValueError(
                f"DMD2 teacher: {self.teacher} is not the teacher that this checkpoint was "
                "distilled from; give the same one to resume."
            )
        for name, stored in state_dict.get("critics", {}).items():
            if self._fingerprint and getattr(self, name) != stored:
                raise ValueError(
                    f"DMD2 {name}: {getattr(self, name)}, but {stored} in the run that is resumed, "
                    "whose optimiser keeps it; give that."
                )
        self.num_student_updates = state_dict["num_student_updates"]

    # One batch.

    def training_step(self, module: PiDModule, sample: Sample) -> None:
        """Train the student or the critics on this batch; only one optimiser steps."""
        is_student = self.turns.is_student(module.trainer.global_step)
        critics = (module.fake_score, module.discriminator)
        with resting(*(critics if is_student else (module.denoiser,))):
            loss, parts = (self._student_loss if is_student else self._critic_loss)(module, sample)
            stepped = self.turns.step(module, loss, optimizer=0 if is_student else 1)
        if is_student and stepped:
            module.lr_schedulers().step()
            self.num_student_updates += 1
        parts |= self.turns.shares_of_time(module)
        module.log_dict({f"train/{k}": v for k, v in parts.items()}, batch_size=len(sample.x0))

    def _student_loss(self, module: PiDModule, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """Distribution matching plus adversarial loss (DMD2 paper, sections 4.1 to 4.3)."""
        with self.turns.timed("student"):
            student_x0 = self._student_x0(module, sample)
        t = self._times(module, sample, "student")
        x_t = flow.add_noise(student_x0, self._noise(module, sample, "student"), t)
        with self.turns.timed("teacher"), torch.no_grad():
            condition = sample.condition(module.teacher)
            teacher_x0 = self._teacher_x0(module, x_t, t, condition, sample)
        with self.turns.timed("fake_score"), torch.no_grad():
            fake = module.fake_score(x_t, t, sample.condition(module.fake_score))
            fake_x0 = flow.x0_from_velocity(x_t, fake, t)
        dmd = losses.dmd_loss(student_x0, teacher_x0, fake_x0)
        with self.turns.timed("discriminator"):
            logits = module.discriminator(module.teacher.features(x_t, t, condition, self.taps))
        generator = losses.generator_loss(logits)
        warm = min(1.0, (self.num_student_updates + 1) / max(1, self.generator_warmup))
        gradient = losses.dmd_gradient(student_x0.detach(), teacher_x0, fake_x0)
        parts = {
            "dmd_loss": dmd.detach(),
            "generator_loss": generator.detach(),
            "dmd_gradient_norm": gradient.flatten(1).norm(dim=1).mean(),
        }
        return dmd + self.generator_weight * warm * generator, parts

    def _critic_loss(self, module: PiDModule, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """Fake score loss on the student's pictures, plus discriminator loss with R1."""
        with self.turns.timed("student"), torch.no_grad():
            student_x0 = self._student_x0(module, sample)
        eps = self._noise(module, sample, "fake score")
        t = self._times(module, sample, "fake score")
        with self.turns.timed("fake_score"):
            velocity = module.fake_score(
                flow.add_noise(student_x0, eps, t), t, sample.condition(module.fake_score)
            )
        fake_score = losses.fake_score_loss(velocity, student_x0, eps)

        t = self._times(module, sample, "discriminator")
        eps = self._noise(module, sample, "discriminator")
        fake_x_t, real_x_t = (flow.add_noise(x0, eps, t) for x0 in (student_x0, sample.x0))
        moved_x_t = real_x_t + self.r1_noise * self._noise(module, sample, "r1")
        with self.turns.timed("teacher"), torch.no_grad():
            condition = sample.condition(module.teacher)
            fake, real, moved = (
                module.teacher.features(x_t, t, condition, self.taps)
                for x_t in (fake_x_t, real_x_t, moved_x_t)
            )
        with self.turns.timed("discriminator"):
            fake, real, moved = map(module.discriminator, (fake, real, moved))
        discriminator = losses.discriminator_loss(real, fake)
        r1 = losses.approximate_r1_loss(real, moved)
        parts = {
            "fake_score_loss": fake_score.detach(),
            "discriminator_loss": discriminator.detach(),
            "r1_loss": r1.detach(),
            "real_logit": real.detach().mean(),
            "fake_logit": fake.detach().mean(),
        }
        return fake_score + discriminator + self.r1_weight * r1, parts

    def _student_x0(self, module: PiDModule, sample: Sample) -> Tensor:
        """The student's picture from one of its times.

        The batch shares one time, the same on every process; gradient flows through the last
        evaluation only.
        """
        seed, turn = module.training_settings.seed, module.trainer.global_step
        step = len(self.student_times) - 1
        if self.student_steps == "all":
            (generator,) = sample_generators(seed, "student time", [turn])
            step = int(torch.randint(step + 1, (), generator=generator))
        condition = sample.condition(module.denoiser)
        now = self.student_times[step]
        t = sample.x0.new_full((len(sample.x0),), now)
        noise = self._noise(module, sample, "student input")
        if self.student_input == "noised_data":
            x_t = flow.add_noise(sample.x0, noise, t)
        else:
            x_t = self._roll_out(module, sample, condition, noise, step)
        return flow.x0_from_velocity(x_t, module.denoiser(x_t, t, condition), t)

    @torch.no_grad()
    def _roll_out(
        self, module: PiDModule, sample: Sample, condition: Condition, noise: Tensor, steps: int
    ) -> Tensor:
        """The student's state after `steps` of its stochastic steps from noise."""
        x, seed = noise, module.training_settings.seed
        for i in range(steps):
            now, after = self.student_times[i : i + 2]
            t = x.new_full((len(x),), now)
            x0 = flow.x0_from_velocity(x, module.denoiser(x, t, condition), t)
            generators = sample_generators(seed, f"rollout {i}", sample.numbers, x.device)
            x = sampling.renoise(x0, after, generators)
        return x

    def _teacher_x0(
        self, module: PiDModule, x_t: Tensor, t: Tensor, condition: Condition, sample: Sample
    ) -> Tensor:
        guided = self.guidance_scale != 1.0 and sample.text is not None
        velocity = conditioned_velocity(
            module.teacher,
            condition,
            module.null_text(len(x_t)) if guided else None,
            self.guidance_scale if guided else 1.0,
        )
        return flow.x0_from_velocity(x_t, velocity(x_t, t), t)

    def _times(self, module: PiDModule, sample: Sample, purpose: str) -> Tensor:
        """Logit-normal times (B,) without shift, clamped."""
        seed = module.training_settings.seed
        generators = sample_generators(seed, f"{purpose} times", sample.numbers)
        t = torch.cat([flow.sample_times(1, generator=generator) for generator in generators])
        return t.clamp(*self.time_clamp).to(sample.x0.device, non_blocking=True)

    def _noise(self, module: PiDModule, sample: Sample, purpose: str) -> Tensor:
        seed, device = module.training_settings.seed, sample.x0.device
        generators = sample_generators(seed, f"{purpose} noise", sample.numbers, device)
        return sampling.draw_noise(sample.x0.shape, generators, device)
