"""Measured rates of this machine: operations per second in a dtype, and bytes per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """The best measured rates.

    Attributes:
        flops_per_second: of a large matmul.
        bytes_per_second: of a large copy, counting both reads and writes.
    """

    flops_per_second: float
    bytes_per_second: float

    def floor_seconds(self, flops: int, num_bytes: int) -> float:
        """Lower bound on the time for these operations and bytes (the roofline)."""
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of 30 matmuls and copies."""
    on_gpu = device.type == "cuda"
    side, length = (8192, 2**28) if on_gpu else (2048, 2**26)  # copies of 1 GiB and 256 MiB
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    best = min(time_call(lambda: torch.mm(a, b, out=product), device) for _ in range(30))
    source = torch.ones(length, device=device)
    target = torch.empty_like(source)
    copied = min(time_call(lambda: target.copy_(source), device) for _ in range(30))
    return Rates(2 * side**3 / best, 2 * length * source.element_size() / copied)


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU by events, synchronised before and after."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000
