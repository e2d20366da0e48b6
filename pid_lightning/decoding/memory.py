"""The memory of freed CPU tensors: kept in the process for the next ones, or given back."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

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
