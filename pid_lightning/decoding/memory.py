"""The memory of freed CPU tensors: kept in the process for the next ones, or given back."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_KEPT_BYTES = 2**31 - 1  # freed memory that stays with the process
MAX_KEPT_TENSOR = 2**28  # bytes of the largest tensor whose memory stays
THRESHOLDS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}  # environment variables


def keep_freed_memory() -> None:
    """Let the C library keep up to 2 GiB of freed memory.

    By default glibc returns every large tensor's memory to the system, which hands it out page by
    page, zeroed again, at the next step. The setting affects the whole process: call it from
    programs, not at import. Does nothing if the environment sets malloc's thresholds or the C
    library is not glibc.
    """
    if "_threshold=" in os.environ.get("GLIBC_TUNABLES", "") or THRESHOLDS & os.environ.keys():
        return
    mallopt = _c_function("mallopt")
    # Setting one alone would end glibc's own adaptation of both and be slower than the default.
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, MAX_KEPT_TENSOR):
        mallopt(M_TRIM_THRESHOLD, MAX_KEPT_BYTES)


def return_freed_memory() -> None:
    """Give freed memory back to the system now, so that what is used next can be measured.

    Does nothing if the C library is not glibc.
    """
    malloc_trim = _c_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _c_function(name: str) -> Any:
    """A function of the C library on Linux, None if it has no such function."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


class PeakMemory:
    """Context manager that measures the `seconds` and `peak_bytes` of a block.

    On CUDA, `peak_bytes` is the peak memory of all tensors on the device, including weights, and
    the device is synchronised at both ends. Elsewhere it is how far the resident memory of the
    process rose above its value at the start, without weights already loaded; freed memory is
    returned to the system before, where the C library is glibc. Linux lets a process reset its
    high-water mark (``/proc/self/clear_refs``); elsewhere the growth of `ru_maxrss` is used, which
    never falls, so a block that needs less than an earlier one reads 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device: torch.device = torch.device(device)
        self.seconds = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            return_freed_memory()
            self._resettable = _reset_high_water_mark()
            self._start_bytes = _high_water_mark(self._resettable)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds: float = time.perf_counter() - self._start
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak_bytes: int = _high_water_mark(self._resettable) - self._start_bytes


def _reset_high_water_mark() -> bool:
    """Set the peak of resident memory to its current value; returns whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark(resettable: bool) -> int:
    """Peak resident memory in bytes since the last reset, or of the process's lifetime."""
    if resettable:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":  # has no such mark
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int | None:
    """Bytes that a decode could still allocate on a device; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    line = next(s for s in meminfo.read_text().splitlines() if s.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
