"""Both DMD2 steps as benchmarks: the package's own losses, without a trainer."""

from __future__ import annotations

import torch
from torch import nn

from pid_lightning.commands.bench.networks import Inputs
from pid_lightning.commands.bench.training import adamw, autocast, learn, move_average, sample_of
from pid_lightning.commands.bench.work import Networks, Work, duplicate
from pid_lightning.decoding.memory_estimate import num_bytes
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import Discriminator, PiD
from pid_lightning.nn.freezing import freeze_unused
from pid_lightning.training.callbacks.turns import resting
from pid_lightning.training.distillation import Distillation
from pid_lightning.training.settings import DistillationSettings


def settings_for(info: ModelInfo) -> DistillationSettings:
    """The defaults and one tap halfway up, as published.

    The student always uses its longest rollout, so that results show the largest cost and do not
    depend on a random draw.
    """
    return DistillationSettings(taps=(info.config.num_blocks // 2,), student_steps="last")


def gather_distillation(denoiser: nn.Module, info: ModelInfo) -> Networks:
    """Student, average, fake score, frozen teacher, discriminator and both optimisers."""
    settings = settings_for(info)
    if isinstance(denoiser, PiD):  # the plain transcription has no unused weights
        freeze_unused(denoiser)
    with next(denoiser.parameters()).device:
        discriminator = Discriminator(info.config.width, len(settings.taps))
    networks = Networks(
        denoiser,
        average=duplicate(denoiser, torch.float32, learns=False),
        optimizer=adamw(denoiser),
        fake_score=duplicate(denoiser, torch.float32, learns=True),
        teacher=duplicate(denoiser, getattr(torch, settings.teacher_dtype), learns=False),
        discriminator=discriminator,
    )
    networks.critics_optimizer = distillation_of(networks, info).make_critics_optimizer()
    return networks


def distillation_of(networks: Networks, info: ModelInfo) -> Distillation:
    """These networks as a distillation."""
    return Distillation(
        settings_for(info), networks.teacher, networks.fake_score, networks.discriminator
    )


def assemble_distillation(
    networks: Networks, inputs: Inputs, info: ModelInfo, dtype: torch.dtype
) -> dict[str, Work]:
    """The student step and the critic step."""
    distillation, sample = distillation_of(networks, info), sample_of(inputs)
    student = networks.denoiser

    def student_step() -> None:
        # The optimiser steps inside autocast, as under Lightning's manual optimisation, so the
        # casts that autocast caches live until the step is over.
        with resting(distillation), autocast(inputs.x0.device, dtype):
            learn(distillation.student_loss(student, sample, 0, 0)[0], networks.optimizer)
        move_average(networks)

    def critics_step() -> None:
        with resting(student), autocast(inputs.x0.device, dtype):
            learn(distillation.critic_loss(student, sample, 0)[0], networks.critics_optimizer)

    held = (networks, inputs.tensors(), num_bytes([inputs.x0]))
    return {
        "dmd2 student": Work(student_step, *held, networks.optimizer, moves_average=True),
        "dmd2 critics": Work(critics_step, *held, networks.critics_optimizer),
    }
