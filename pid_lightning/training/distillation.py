"""Distillation: the networks beside a few-step student, and the losses that train them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pid_lightning.decoding.latents import conditioned_velocity
from pid_lightning.diffusion import flow, losses, sampling
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.nn import Condition, Discriminator, PiD
from pid_lightning.nn.freezing import freeze_unused
from pid_lightning.training.sample import Sample
from pid_lightning.training.settings import DistillationSettings
from pid_lightning.training.stopwatch import Stopwatch

Losses = tuple[Tensor, dict[str, Tensor]]  # the sum to minimise, and what to log of it


class Distillation(nn.Module):
    """Distribution matching distillation (DMD2, arXiv 2405.14867).

    The student is no part of it but an argument of both losses: it is what a run trains, saves
    and exports, with or without a distillation. Every random draw is a function of the seed, its
    purpose and the sample's number, or the turn.

    Args:
        settings: see `DMD2`.
        teacher: frozen; in the dtype it runs in.
        fake_score: learns the score of the student's pictures.
        discriminator: learns to tell these from photographs, by the teacher's features.
        seed: of the run.
        null_text: features (1, L, D_text) of an empty caption, which guidance moves away from;
            None is the teacher's learned null.

    Attributes:
        settings, teacher, fake_score, discriminator, seed, null_text: as given.
        stopwatch: times each network's forward passes.
    """

    def __init__(
        self,
        settings: DistillationSettings,
        teacher: PiD,
        fake_score: PiD,
        discriminator: Discriminator,
        seed: int = 0,
        null_text: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.fake_score = fake_score
        self.discriminator = discriminator
        self.teacher: PiD = teacher.requires_grad_(False).eval()
        self.seed = seed
        self.register_buffer("null_text", null_text, persistent=False)
        self.stopwatch: Stopwatch = Stopwatch()

    @classmethod
    def begin(
        cls,
        settings: DistillationSettings,
        teacher: PiD,
        student: PiD,
        seed: int = 0,
        null_text: Tensor | None = None,
    ) -> Distillation:
        """Start from a teacher's weights, which student and fake score take.

        Args:
            student: a network like the teacher; what a distillation does not use is frozen.
            settings, teacher, seed, null_text: see `Distillation`; the teacher's dtype is set.
        """
        student.load_state_dict(teacher.state_dict())
        fake_score = copy.deepcopy(student).requires_grad_(True)
        for network in (student, fake_score):
            freeze_unused(network)
        # From the run's seed, not torch's, so that every number of processes gets the same weights.
        width, depth = teacher.config.width, settings.discriminator_depth
        discriminator = Discriminator(width, len(settings.taps), depth)
        discriminator.reset_parameters(*sample_generators(seed, "discriminator", [0]))
        # The student's adversarial loss backpropagates through the teacher's first blocks.
        teacher.activation_checkpointing = student.activation_checkpointing
        teacher = teacher.to(getattr(torch, settings.teacher_dtype))
        return cls(settings, teacher, fake_score, discriminator, seed, null_text)

    def make_critics_optimizer(self) -> torch.optim.Optimizer:
        """One AdamW for fake score and discriminator."""
        fake_score = [p for p in self.fake_score.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            [
                {"params": fake_score, "weight_decay": self.settings.fake_score_weight_decay},
                {"params": self.discriminator.parameters(), "weight_decay": 0.0},
            ],
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            fused=True,
        )

    def student_loss(self, student: PiD, sample: Sample, turn: int, num_updates: int) -> Losses:
        """Distribution matching plus adversarial loss (DMD2 paper, sections 4.1 to 4.3).

        Args:
            student: the network that learns; the others pass gradients on.
            sample: the batch.
            turn: number of the batch within the run, which draws the student's step.
            num_updates: steps the student has taken, for the warm-up of the adversarial loss.
        """
        with self.stopwatch.timed("student"):
            student_x0 = self._student_x0(student, sample, turn)
        t = self._times(sample, "student")
        x_t = flow.add_noise(student_x0, self._noise(sample, "student"), t)
        with self.stopwatch.timed("teacher"), torch.no_grad():
            condition = sample.condition(self.teacher)
            teacher_x0 = self._teacher_x0(x_t, t, condition, is_guided=sample.text is not None)
        with self.stopwatch.timed("fake_score"), torch.no_grad():
            fake = self.fake_score(x_t, t, sample.condition(self.fake_score))
            fake_x0 = flow.x0_from_velocity(x_t, fake, t)
        dmd = losses.dmd_loss(student_x0, teacher_x0, fake_x0)
        with self.stopwatch.timed("discriminator"):
            features = self.teacher.features(x_t, t, condition, self.settings.taps)
            generator = losses.generator_loss(self.discriminator(features))
        warm = min(1.0, (num_updates + 1) / max(1, self.settings.generator_warmup))
        gradient = losses.dmd_gradient(student_x0.detach(), teacher_x0, fake_x0)
        parts = {
            "dmd_loss": dmd.detach(),
            "generator_loss": generator.detach(),
            "dmd_gradient_norm": gradient.flatten(1).norm(dim=1).mean(),
        }
        return dmd + self.settings.generator_weight * warm * generator, parts

    def critic_loss(self, student: PiD, sample: Sample, turn: int) -> Losses:
        """The fake score's loss on the student's pictures, plus the discriminator's with R1.

        Args:
            student, sample, turn: see `student_loss`; here the student does not learn.
        """
        with self.stopwatch.timed("student"), torch.no_grad():
            student_x0 = self._student_x0(student, sample, turn)
        eps, t = self._noise(sample, "fake score"), self._times(sample, "fake score")
        with self.stopwatch.timed("fake_score"):
            x_t = flow.add_noise(student_x0, eps, t)
            velocity = self.fake_score(x_t, t, sample.condition(self.fake_score))
        fake_score = losses.fake_score_loss(velocity, student_x0, eps)

        t, eps = self._times(sample, "discriminator"), self._noise(sample, "discriminator")
        fake_x_t, real_x_t = (flow.add_noise(x0, eps, t) for x0 in (student_x0, sample.x0))
        moved_x_t = real_x_t + self.settings.r1_noise * self._noise(sample, "r1")
        with self.stopwatch.timed("teacher"), torch.no_grad():
            condition = sample.condition(self.teacher)
            fake, real, moved = (
                self.teacher.features(x_t, t, condition, self.settings.taps)
                for x_t in (fake_x_t, real_x_t, moved_x_t)
            )
        with self.stopwatch.timed("discriminator"):
            fake, real, moved = map(self.discriminator, (fake, real, moved))
        discriminator = losses.discriminator_loss(real, fake)
        r1 = losses.approximate_r1_loss(real, moved)
        parts = {
            "fake_score_loss": fake_score.detach(),
            "discriminator_loss": discriminator.detach(),
            "r1_loss": r1.detach(),
            "real_logit": real.detach().mean(),
            "fake_logit": fake.detach().mean(),
        }
        return fake_score + discriminator + self.settings.r1_weight * r1, parts

    def _student_x0(self, student: PiD, sample: Sample, turn: int) -> Tensor:
        """The student's picture from one of its times, which the batch shares, on every process;
        gradient flows through the last evaluation only."""
        times = self.settings.student_times
        step = len(times) - 1
        if self.settings.student_steps == "all":
            (generator,) = sample_generators(self.seed, "student time", [turn])
            step = int(torch.randint(step + 1, (), generator=generator))
        condition = sample.condition(student)
        t = sample.x0.new_full((len(sample.x0),), times[step])
        noise = self._noise(sample, "student input")
        if self.settings.student_input == "noised_data":
            x_t = flow.add_noise(sample.x0, noise, t)
        else:
            x_t = self._roll_out(student, sample, condition, noise, step)
        return flow.x0_from_velocity(x_t, student(x_t, t, condition), t)

    @torch.no_grad()
    def _roll_out(
        self, student: PiD, sample: Sample, condition: Condition, noise: Tensor, steps: int
    ) -> Tensor:
        """The student's state after `steps` of its stochastic steps from noise."""
        x = noise
        for i in range(steps):
            now, after = self.settings.student_times[i : i + 2]
            t = x.new_full((len(x),), now)
            x0 = flow.x0_from_velocity(x, student(x, t, condition), t)
            generators = sample_generators(self.seed, f"rollout {i}", sample.numbers, x.device)
            x = sampling.renoise(x0, after, generators)
        return x

    def _teacher_x0(self, x_t: Tensor, t: Tensor, condition: Condition, is_guided: bool) -> Tensor:
        null = self.null_text
        if null is not None:
            null = null.expand(len(x_t), -1, -1)
        scale = self.settings.guidance_scale if is_guided else 1.0
        velocity = conditioned_velocity(self.teacher, condition, null, scale)
        return flow.x0_from_velocity(x_t, velocity(x_t, t), t)

    def _times(self, sample: Sample, purpose: str) -> Tensor:
        """Logit-normal times (B,) without shift, clamped."""
        generators = sample_generators(self.seed, f"{purpose} times", sample.numbers)
        t = torch.cat([flow.sample_times(1, generator=generator) for generator in generators])
        return t.clamp(*self.settings.time_clamp).to(sample.x0.device, non_blocking=True)

    def _noise(self, sample: Sample, purpose: str) -> Tensor:
        device = sample.x0.device
        generators = sample_generators(self.seed, f"{purpose} noise", sample.numbers, device)
        return sampling.draw_noise(sample.x0.shape, generators, device)
