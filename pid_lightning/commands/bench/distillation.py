"""Both DMD2 steps as benchmarks: the callback's own losses, without a trainer."""

from __future__ import annotations

import torch
from torch import nn

from pid_lightning.commands.bench.networks import Inputs
from pid_lightning.commands.bench.training import autocast, learn, move_average, sample_of, stand_in
from pid_lightning.commands.bench.work import Networks, Work, duplicate
from pid_lightning.decoding.memory_estimate import num_bytes
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import Discriminator, PiD
from pid_lightning.nn.freezing import freeze_unused
from pid_lightning.training.callbacks.dmd2 import DMD2
from pid_lightning.training.callbacks.turns import resting


def distillation_of(info: ModelInfo) -> DMD2:
    """The callback with its defaults and one tap halfway up, as published.

    The student always uses its longest rollout, so that results show the largest cost and do not
    depend on a random draw.
    """
    return DMD2(teacher="", taps=(info.config.num_blocks // 2,), student_steps="last")


def gather_distillation(denoiser: nn.Module, info: ModelInfo) -> Networks:
    """Student, average, fake score, frozen teacher, discriminator and both optimisers."""
    dmd2 = distillation_of(info)
    if isinstance(denoiser, PiD):  # the plain transcription has no unused weights
        freeze_unused(denoiser)
    with next(denoiser.parameters()).device:
        discriminator = Discriminator(info.config.width, len(dmd2.taps))
    networks = Networks(
        denoiser,
        average=duplicate(denoiser, torch.float32, learns=False),
        fake_score=duplicate(denoiser, torch.float32, learns=True),
        teacher=duplicate(denoiser, dmd2.teacher_dtype, learns=False),
        discriminator=discriminator,
    )
    (networks.optimizer, networks.critics_optimizer), _ = dmd2.configure_optimizers(
        stand_in(networks)
    )
    return networks


def assemble_distillation(
    networks: Networks, inputs: Inputs, info: ModelInfo, dtype: torch.dtype
) -> dict[str, Work]:
    """The student step and the critic step."""
    dmd2, module, sample = distillation_of(info), stand_in(networks), sample_of(inputs)

    def student_step() -> None:
        # The optimiser steps inside autocast, as under Lightning's manual optimisation, so the
        # casts that autocast caches live until the step is over.
        critics = resting(networks.fake_score, networks.discriminator)
        with critics, autocast(inputs.x0.device, dtype):
            learn(dmd2._student_loss(module, sample)[0], networks.optimizer)
        move_average(networks)

    def critics_step() -> None:
        with resting(networks.denoiser), autocast(inputs.x0.device, dtype):
            learn(dmd2._critic_loss(module, sample)[0], networks.critics_optimizer)

    held = (networks, inputs.tensors(), num_bytes([inputs.x0]))
    return {
        "dmd2 student": Work(student_step, *held, networks.optimizer, moves_average=True),
        "dmd2 critics": Work(critics_step, *held, networks.critics_optimizer),
    }
