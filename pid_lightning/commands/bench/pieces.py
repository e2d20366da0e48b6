"""The pieces that `pid bench` measures: forward pass and decode, built for a network."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from pid_lightning.commands.bench import LEARNING
from pid_lightning.commands.bench.networks import Inputs
from pid_lightning.commands.bench.work import Networks, Work
from pid_lightning.decoding.latents import decode_latents
from pid_lightning.decoding.memory_estimate import num_bytes
from pid_lightning.decoding.plan import Plan
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files.models import ModelInfo


def gather(name: str, denoiser: nn.Module, info: ModelInfo) -> Networks:
    """The networks and optimisers for one kind of work; what it trains must be in fp32."""
    if name not in LEARNING:
        return Networks(denoiser.eval().requires_grad_(False))
    if name == "dmd2":
        from pid_lightning.commands.bench.distillation import gather_distillation

        return gather_distillation(denoiser, info)
    from pid_lightning.commands.bench.training import gather_training

    return gather_training(denoiser)


def assemble(
    name: str, networks: Networks, inputs: Inputs, info: ModelInfo, dtype: torch.dtype
) -> dict[str, Work]:
    """The pieces of one kind of work, keyed by the names of their rows."""
    if name == "dmd2":
        from pid_lightning.commands.bench.distillation import assemble_distillation

        return assemble_distillation(networks, inputs, info, dtype)
    if name == "train":
        from pid_lightning.commands.bench.training import assemble_training

        return assemble_training(networks, inputs, dtype)
    picture_bytes, denoiser = num_bytes([inputs.x0]), networks.denoiser
    condition = [v for v in (inputs.latents, inputs.latent_sigma, inputs.text) if v is not None]
    if name == "decode":
        run = partial(decode, denoiser, inputs, info)
        return {name: Work(run, networks, condition, picture_bytes)}
    run = partial(forward, denoiser, inputs)
    return {name: Work(run, networks, [inputs.eps, inputs.t, *condition], picture_bytes)}


@torch.no_grad()
def forward(denoiser: nn.Module, inputs: Inputs) -> Tensor:
    """Compute the condition and evaluate the network once, on noise."""
    condition = denoiser.condition(inputs.latents, inputs.latent_sigma, inputs.text)
    return denoiser(inputs.eps, inputs.t, condition)


def decode(denoiser: nn.Module, inputs: Inputs, info: ModelInfo) -> Tensor:
    """Decode with the student's own steps, or the published 4."""
    times = info.student_times or STUDENT_TIMES
    return decode_latents(
        denoiser,
        Plan.of(denoiser, inputs.latents, student_times=times),
        inputs.latents,
        inputs.latent_sigma,
        inputs.text,
        generator=torch.Generator(inputs.latents.device).manual_seed(0),
    )
