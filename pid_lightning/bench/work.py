"""The pieces of work that are measured, each a call on networks that stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pid_lightning import flow, losses
from pid_lightning.bench import LEARNING
from pid_lightning.bench.networks import Inputs
from pid_lightning.compilation import compile_for_inference
from pid_lightning.decoding import decode_latents
from pid_lightning.memory import num_bytes, weight_bytes
from pid_lightning.quantisation import quantise
from pid_lightning.sampling import STUDENT_TIMES
from pid_lightning.weights import ModelInfo

CLIP = 0.1
RGB_LOSS_WEIGHT = 0.8


@dataclass
class Networks:
    """Everything that lives from one call to the next; absent parts are None.

    Attributes:
        denoiser: what is evaluated, and trained.
        average: its exponential moving average.
        optimizer: of the denoiser.
        fake_score, teacher, discriminator: DMD2's.
        critics_optimizer: of fake score and discriminator.
    """

    denoiser: nn.Module
    average: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    fake_score: nn.Module | None = None
    teacher: nn.Module | None = None
    discriminator: nn.Module | None = None
    critics_optimizer: torch.optim.Optimizer | None = None

    def variant(self, way: str, activation_checkpointing: bool) -> Networks:
        """The same weights and optimisers, evaluated in one of `WAYS`."""
        twins = {}
        for name in ("denoiser", "fake_score", "teacher"):
            network = getattr(self, name)
            if network is None:
                continue
            twins[name] = copy.copy(network)  # shares its parameters
            twins[name].activation_checkpointing = activation_checkpointing
            if way != "eager" and self.optimizer is None:
                compile_for_inference(twins[name], way == "frozen", way == "cuda graph")
            elif way != "eager":
                twins[name].compile(dynamic=False, fullgraph=True)
        return Networks(**{**vars(self), **twins})

    def quantised(self, activations: bool) -> Networks:
        """The denoiser alone with linear layers in 8 bits."""
        denoiser = copy.deepcopy(self.denoiser)
        quantise(denoiser, activations)
        return Networks(denoiser)

    def in_windows(self, size: int) -> Networks:
        """The denoiser alone, its patches attending inside windows."""
        denoiser = copy.copy(self.denoiser)  # shares its parameters
        denoiser.attend_in_windows(size)
        return Networks(denoiser)

    def held_bytes(self) -> int:
        """Bytes of weights and optimisers' states."""
        states = [t for o in (self.optimizer, self.critics_optimizer) for t in state_tensors(o)]
        return sum(map(weight_bytes, self._networks())) + num_bytes(states)

    def read_bytes(self) -> int:
        """Bytes of the weights that a call computes with."""
        networks = [network for network in self._networks() if network is not self.average]
        return sum(map(weight_bytes, networks))

    def _networks(self) -> list[nn.Module]:
        return [part for part in vars(self).values() if isinstance(part, nn.Module)]


@dataclass
class Work:
    """One measured piece.

    Attributes:
        run: the call.
        networks: what it works with.
        inputs: what it works on.
        picture_bytes: of the picture that it writes.
        optimizer: what it steps, None where nothing learns.
        moves_average: whether the average follows.
    """

    run: Callable[[], object]
    networks: Networks
    inputs: list[Tensor]
    picture_bytes: int
    optimizer: torch.optim.Optimizer | None = None
    moves_average: bool = False

    def held_bytes(self) -> int:
        """Bytes that are there before and after each call."""
        return self.networks.held_bytes() + num_bytes(self.inputs)

    def traffic_bytes(self) -> int:
        """Bytes that memory moves at the least: every weight read once, inputs read and a picture
        written; of what learns, weights written, and optimiser's state and average read and
        written. Activations may all stay in caches."""
        total = self.networks.read_bytes() + num_bytes(self.inputs)
        total += self.picture_bytes
        if self.optimizer is not None:
            groups = self.optimizer.param_groups
            total += num_bytes(p for group in groups for p in group["params"])
            total += 2 * num_bytes(state_tensors(self.optimizer))
        if self.moves_average:
            total += 2 * num_bytes(self.networks.average.parameters())
        return total


def state_tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """What an optimiser keeps, once it has stepped."""
    states = () if optimizer is None else optimizer.state.values()
    return [t for state in states for t in state.values() if isinstance(t, Tensor)]


def gather(name: str, denoiser: nn.Module, info: ModelInfo) -> Networks:
    """What the work of that name needs beside its denoiser (fp32 where it learns)."""
    if name not in LEARNING:
        return Networks(denoiser.eval().requires_grad_(False))
    if name == "dmd2":
        from pid_lightning.bench.distillation import gather_distillation

        return gather_distillation(denoiser, info)
    return Networks(denoiser, duplicate(denoiser, torch.float32, False), adamw(denoiser))


def duplicate(network: nn.Module, dtype: torch.dtype, learns: bool) -> nn.Module:
    """A copy with weights in another type, also of weights without data."""
    # Given beforehand: `deepcopy` makes a fake tensor's copy of another fake mode.
    copies = {
        id(p): nn.Parameter(p.detach().to(dtype, copy=True), learns and p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, copies)


def adamw(denoiser: nn.Module) -> torch.optim.Optimizer:
    """The published recipe's optimiser of everything that learns."""
    learning = [p for p in denoiser.parameters() if p.requires_grad]
    return torch.optim.AdamW(learning, lr=1e-6, weight_decay=1e-3, fused=True)


def assemble(
    name: str, networks: Networks, inputs: Inputs, info: ModelInfo, dtype: torch.dtype
) -> dict[str, Work]:
    """The pieces of one kind of work, by the names of their rows."""
    if name == "dmd2":
        from pid_lightning.bench.distillation import assemble_distillation

        return assemble_distillation(networks, inputs, info, dtype)
    picture_bytes = num_bytes([inputs.x0])
    denoiser, optimizer = networks.denoiser, networks.optimizer
    if name == "train":
        return {
            name: Work(
                partial(training_step, networks, inputs, dtype),
                networks,
                inputs.tensors(),
                picture_bytes,
                optimizer,
                moves_average=True,
            )
        }
    condition = [v for v in (inputs.latents, inputs.latent_sigma, inputs.text) if v is not None]
    if name == "decode":
        run = partial(decode, denoiser, inputs, info)
        return {name: Work(run, networks, condition, picture_bytes)}
    run = partial(forward, denoiser, inputs)
    return {name: Work(run, networks, [inputs.eps, inputs.t, *condition], picture_bytes)}


@torch.no_grad()
def forward(denoiser: nn.Module, inputs: Inputs) -> Tensor:
    """The condition and one evaluation, on noise."""
    condition = denoiser.condition(inputs.latents, inputs.latent_sigma, inputs.text)
    return denoiser(inputs.eps, inputs.t, condition)


def decode(denoiser: nn.Module, inputs: Inputs, info: ModelInfo) -> Tensor:
    """A student's steps, as many as trained or 4."""
    return decode_latents(
        denoiser,
        inputs.latents,
        inputs.latent_sigma,
        student_times=info.student_times or STUDENT_TIMES,
        text=inputs.text,
        generator=torch.Generator(inputs.latents.device).manual_seed(0),
    )


def training_step(networks: Networks, inputs: Inputs, dtype: torch.dtype) -> None:
    """Flow matching, and the RGB head's loss where there is one: backward, clip, step, average."""
    denoiser = networks.denoiser
    with autocast(inputs.x0.device, dtype):
        x_t = flow.add_noise(inputs.x0, inputs.eps, inputs.t)
        # As in training, where a dropped caption leads to the learned null.
        keep_text = None if inputs.text is None else torch.ones_like(inputs.t, dtype=torch.bool)
        condition = denoiser.condition(
            inputs.latents, inputs.latent_sigma, inputs.text, keep_text=keep_text, with_rgb=True
        )
        velocity = denoiser(x_t, inputs.t, condition)
        loss = losses.flow_matching_loss(velocity, inputs.x0, inputs.eps)
        if condition.rgb is not None:
            loss = loss + RGB_LOSS_WEIGHT * losses.rgb_alignment_loss(
                condition.rgb, inputs.low_resolution, inputs.latent_sigma
            )
    learn(loss, networks.optimizer)
    move_average(networks)


def learn(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Backward, clip, step."""
    loss.backward()
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(learning, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def move_average(networks: Networks) -> None:
    """One update of the average."""
    currents = [p.detach() for p in networks.denoiser.parameters()]
    torch._foreach_lerp_(list(networks.average.parameters()), currents, 1e-3)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision, off for fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
