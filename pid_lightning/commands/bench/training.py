"""A training step as a benchmark: the package's own losses, without a trainer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from pid_lightning.commands.bench.networks import Inputs
from pid_lightning.commands.bench.work import Networks, Work, duplicate
from pid_lightning.decoding.memory_estimate import num_bytes
from pid_lightning.training.objective import FlowMatching
from pid_lightning.training.optimizers import make_optimizer
from pid_lightning.training.sample import Sample
from pid_lightning.training.settings import Training

CLIP = 0.1  # gradient norm limit of the published recipe


def gather_training(denoiser: nn.Module) -> Networks:
    """The denoiser, its average and its optimiser."""
    return Networks(denoiser, duplicate(denoiser, torch.float32, False), adamw(denoiser))


def assemble_training(networks: Networks, inputs: Inputs, dtype: torch.dtype) -> dict[str, Work]:
    """The training step, as the only piece."""
    run = partial(training_step, networks, sample_of(inputs), dtype)
    held = (networks, inputs.tensors(), num_bytes([inputs.x0]))
    return {"train": Work(run, *held, networks.optimizer, moves_average=True)}


def training_step(networks: Networks, sample: Sample, dtype: torch.dtype) -> None:
    """One flow-matching step: draws, loss, backward, clipping, optimiser and average."""
    with autocast(sample.x0.device, dtype):
        loss, _ = FlowMatching(networks.denoiser, Training()).losses(sample, "train")
    learn(loss, networks.optimizer)
    move_average(networks)


def sample_of(inputs: Inputs) -> Sample:
    """The inputs as `draw_sample` returns them; the benchmarks drop none of them."""
    batch_size = len(inputs.x0)
    kept = torch.ones(batch_size, dtype=torch.bool, device=inputs.x0.device)
    return Sample(
        inputs.x0,
        inputs.low_resolution,
        inputs.latents,
        inputs.latent_sigma,
        inputs.text,
        keep_latents=kept,
        keep_text=None if inputs.text is None else kept,
        numbers=list(range(batch_size)),
    )


def adamw(denoiser: nn.Module) -> torch.optim.Optimizer:
    """The published recipe's optimiser, with a negligible learning rate."""
    return make_optimizer(denoiser, Training(learning_rate=1e-6), fused=True)


def learn(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Run backward, clip the gradients and step."""
    loss.backward()
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(learning, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def move_average(networks: Networks) -> None:
    """Update the average once."""
    currents = [p.detach() for p in networks.denoiser.parameters()]
    torch._foreach_lerp_(list(networks.average.parameters()), currents, 1e-3)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision as Lightning sets it, without a cache of casts; disabled for fp32."""
    return torch.autocast(
        device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False
    )
