"""Time and peak memory of the same work in several modes, measured in turn."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pid_lightning.commands.bench import COMPILED, GRAPH
from pid_lightning.commands.bench.networks import Inputs
from pid_lightning.commands.bench.pieces import forward
from pid_lightning.commands.bench.rates import time_call
from pid_lightning.commands.bench.work import Work
from pid_lightning.decoding.memory_estimate import peak_bytes
from pid_lightning.nn import PiD


@dataclass(frozen=True)
class Measured:
    """Results of one piece in one mode.

    Attributes:
        seconds: median of the calls after the first.
        first_seconds: of the first call, including compilation and warm-up.
        held_bytes: kept between calls: weights, optimiser states, inputs; not what a compiled
            graph keeps.
        peak_bytes: peak memory, including `held_bytes`; None where it cannot be counted.
    """

    seconds: float
    first_seconds: float
    held_bytes: int
    peak_bytes: int | None


def measure(
    modes: Mapping[str, Mapping[str, Work]], device: torch.device, repeat: int
) -> dict[tuple[str, str], Measured]:
    """Measure every piece in every mode, as {(piece, mode): results}.

    The modes of a piece take turns (A B A B ...), so that a machine slowing down favours none.

    Args:
        modes: {mode: {piece: work}}, the same pieces in each.
        device: where the work runs.
        repeat: timed calls per piece and mode.
    """
    pieces = list(next(iter(modes.values())))
    figures = {}
    # All first calls precede any measurement: optimiser states are part of each peak.
    first = {(p, m): time_call(modes[m][p].run, device) for p in pieces for m in modes}
    for piece in pieces:
        seconds = {mode: [] for mode in modes}
        for _ in range(repeat):
            for mode in modes:
                seconds[mode].append(time_call(modes[mode][piece].run, device))
        for mode in modes:
            work = modes[mode][piece]
            figures[piece, mode] = Measured(
                statistics.median(seconds[mode]),
                first[piece, mode],
                work.held_bytes(),
                peak_of(work, mode, device),
            )
    return figures


def peak_of(work: Work, mode: str, device: torch.device) -> int | None:
    """Peak bytes of one more call, including what this work keeps but not what other work keeps.

    On a GPU the allocator reports them, except those of a CUDA graph, which owns its memory; on a
    CPU the outputs of operations are counted, which a compiled graph hides.
    """
    if mode.startswith(GRAPH if device.type == "cuda" else COMPILED):
        return None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work.run()
        torch.cuda.synchronize(device)
        return work.held_bytes() + torch.cuda.max_memory_allocated(device) - before
    return work.held_bytes() + peak_bytes(work.run)


def exact_velocity(denoiser: PiD, inputs: Inputs) -> Tensor:
    """The velocity from the same weights in fp64."""
    wide = copy.deepcopy(denoiser).double()
    doubled = {k: None if v is None else v.double() for k, v in vars(inputs).items()}
    return forward(wide, Inputs(**doubled))


def relative_error(velocity: Tensor, exact: Tensor) -> float:
    """The largest absolute error divided by the largest exact magnitude."""
    return ((velocity.double() - exact).abs().max() / exact.abs().max()).item()
