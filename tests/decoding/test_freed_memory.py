"""The C library keeps freed memory if asked to, and only then; asked again, it gives it back."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pid_lightning.decoding.memory import keep_freed_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident()
for _ in range(3):
    block = b"x" * 2**26
    held = resident()
    del block
left = resident()
return_freed_memory()
print(*((now - before) / 2**20 for now in (held, left, resident())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(
    ("asked", "chosen", "stays"),
    [
        ("kept", {}, True),
        ("default", {}, False),
        ("kept", {"MALLOC_TRIM_THRESHOLD_": "65536"}, False),
        ("kept", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=65536"}, False),
    ],
)
def test_a_freed_block_s_memory_stays_only_where_asked(asked, chosen, stays):
    ours = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, asked],
        env=environment | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    held, left, returned = map(float, done.stdout.split())
    assert held > 60  # MiB; the block has 64
    assert (left > 60) == stays
    assert returned < 10
