"""The measured pieces of work: calls on networks that persist between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pid_lightning.decoding.memory_estimate import num_bytes, weight_bytes
from pid_lightning.nn.compilation import compile_for_inference
from pid_lightning.nn.quantisation import quantise


@dataclass
class Networks:
    """Everything that persists between calls; absent parts are None.

    Attributes:
        denoiser: the evaluated or trained network.
        average: its exponential moving average.
        optimizer: of the denoiser.
        fake_score, teacher, discriminator: DMD2's networks.
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
        """The same weights and optimisers, run in one of `WAYS`."""
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
        """The denoiser alone, with 8-bit linear layers."""
        denoiser = copy.deepcopy(self.denoiser)
        quantise(denoiser, activations)
        return Networks(denoiser)

    def in_windows(self, size: int) -> Networks:
        """The denoiser alone, with patch attention in windows."""
        denoiser = copy.copy(self.denoiser)  # shares its parameters
        denoiser.attend_in_windows(size)
        return Networks(denoiser)

    def held_bytes(self) -> int:
        """Bytes of weights and optimiser states."""
        states = [t for o in (self.optimizer, self.critics_optimizer) for t in state_tensors(o)]
        return sum(map(weight_bytes, self._networks())) + num_bytes(states)

    def read_bytes(self) -> int:
        """Bytes of the weights that a call reads."""
        networks = [network for network in self._networks() if network is not self.average]
        return sum(map(weight_bytes, networks))

    def _networks(self) -> list[nn.Module]:
        return [part for part in vars(self).values() if isinstance(part, nn.Module)]


@dataclass
class Work:
    """One measured piece.

    Attributes:
        run: the call to measure.
        networks: the networks it uses.
        inputs: the tensors it reads.
        picture_bytes: size of the picture it writes.
        optimizer: the optimiser it steps, None for inference.
        moves_average: whether it updates the average.
    """

    run: Callable[[], object]
    networks: Networks
    inputs: list[Tensor]
    picture_bytes: int
    optimizer: torch.optim.Optimizer | None = None
    moves_average: bool = False

    def held_bytes(self) -> int:
        """Bytes in use before and after each call."""
        return self.networks.held_bytes() + num_bytes(self.inputs)

    def traffic_bytes(self) -> int:
        """Minimum memory traffic in bytes: weights and inputs are read once and the picture is
        written; training also writes the weights, and reads and writes optimiser state and
        average. Activations may all stay in caches."""
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
    """The tensors of an optimiser's state, none before its first step."""
    states = () if optimizer is None else optimizer.state.values()
    return [t for state in states for t in state.values() if isinstance(t, Tensor)]


def duplicate(network: nn.Module, dtype: torch.dtype, learns: bool) -> nn.Module:
    """A copy with weights in another dtype; also works with fake tensors."""
    # Passed as the memo: `deepcopy` would move fake tensors to another fake mode.
    copies = {
        id(p): nn.Parameter(p.detach().to(dtype, copy=True), learns and p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, copies)
