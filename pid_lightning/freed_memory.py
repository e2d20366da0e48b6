"""What a process does with the memory of freed tensors on a CPU: keep it for the next ones."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST_KEPT = 2**31 - 1  # bytes of freed memory that stay with the process
LARGEST_KEPT = 2**28  # bytes of a tensor whose memory stays
THRESHOLDS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}  # of the environment


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, up to 2 GiB of it.

    By default glibc gives every large tensor's memory back to the system, which hands it out page
    by page and zeroed again at the next step. It concerns the whole process, hence for programs to
    call, not for `import`. Nothing happens where the environment sets malloc's thresholds or the C
    library is another.
    """
    if "_threshold=" in os.environ.get("GLIBC_TUNABLES", "") or THRESHOLDS & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # One of them without the other would end glibc's own adaptation of both: slower than before.
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT):
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
