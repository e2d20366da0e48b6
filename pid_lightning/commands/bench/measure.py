"""Time and peak memory of the same work in several modes, measured in turn."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pid_lightning.commands.bench.work import Mode, Work, forward
from pid_lightning.decoding.memory import PeakMemory
from pid_lightning.decoding.memory_estimate import peak_bytes
from pid_lightning.diffusion.flow import widest
from pid_lightning.nn import PiD
from pid_lightning.training.sample import Sample


def measure(
    modes: Mapping[Mode, Work], sample: Sample, device: torch.device, repeat: int
) -> dict[tuple[str, Mode], dict[str, Any]]:
    """Measure every call in every mode.

    The modes of a call take turns (A B A B ...), so that a machine slowing down favours none.

    Args:
        modes: the same work in each.
        sample: the batch to work on.
        device: where it is.
        repeat: timed calls in each mode.

    Returns:
        For every (call, mode): the median seconds, those of the first call, with compilation and
        warm-up, and the MiB that are held between calls (weights, optimiser states and inputs, not
        what a compiled graph keeps) and at the peak, None where that cannot be counted.
    """
    calls = {(name, m): call for m, w in modes.items() for name, call in w.calls(sample).items()}
    # All first calls precede any measurement: optimiser states are part of each peak.
    first = {key: time_call(call, device) for key, call in calls.items()}
    seconds: dict[tuple[str, Mode], list[float]] = {key: [] for key in calls}
    for name in dict.fromkeys(name for name, _ in calls):
        for _, mode in itertools.product(range(repeat), modes):
            seconds[name, mode].append(time_call(calls[name, mode], device))
    figures = {}
    for (name, mode), call in calls.items():
        held = modes[mode].held_bytes(sample) / 2**20
        hidden = mode.way == "compiled" and device.type == "cpu"  # operations inside of a graph
        figures[name, mode] = {
            "seconds": statistics.median(seconds[name, mode]),
            "first_seconds": first[name, mode],
            "held_mib": held,
            "peak_mib": None if hidden else held + _allocated_bytes(call, device) / 2**20,
        }
    return figures


def _allocated_bytes(call: Callable[[], object], device: torch.device) -> int:
    """What a call has at its peak beside what is there before, by a GPU's allocator, or on a CPU as
    outputs of operations."""
    if device.type == "cpu":
        return peak_bytes(call)
    before = torch.cuda.memory_allocated(device)
    with PeakMemory(device) as measured:
        call()
    return measured.peak_bytes - before


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle GPU to an idle GPU."""
    finish = torch.cuda.synchronize if device.type == "cuda" else int
    finish()
    start = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - start


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matmul, the best of 30."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    best = min(time_call(lambda: torch.mm(a, b, out=product), device) for _ in range(30))
    return 2 * side**3 / best


def exact_velocity(denoiser: PiD, sample: Sample) -> Tensor:
    """What `forward` returns with the same weights in fp64."""
    dtype = widest(denoiser.out.weight.device)
    wide = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in sample]
    return forward(copy.deepcopy(denoiser).to(dtype), Sample(*wide))


def relative_error(velocity: Tensor, exact: Tensor) -> float:
    """The largest absolute error divided by the largest exact magnitude."""
    return ((velocity.to(exact.dtype) - exact).abs().max() / exact.abs().max()).item()
