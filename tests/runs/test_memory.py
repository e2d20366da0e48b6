"""Memory in fresh processes: kept or given back as asked, measured at its peak, as estimated."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pid_lightning.decoding import memory
from pid_lightning.decoding.memory import PeakMemory

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
        pytest.param("kept", {"MALLOC_TRIM_THRESHOLD_": "65536"}, False, marks=pytest.mark.slow),
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


@pytest.mark.skipif(
    not memory._reset_high_water_mark(), reason="the system does not reset high-water marks"
)
@pytest.mark.parametrize(("resettable", "second"), [(True, 64), (False, 0)])
def test_peak_memory_sees_what_was_freed_again(resettable: bool, second: int) -> None:
    """Without a reset, only growth beyond earlier peaks."""
    # In a fresh process, since earlier tests may have left resident memory to reuse here.
    code = (
        "import torch; from pid_lightning.decoding import memory\n"
        f"if not {resettable}: memory._reset_high_water_mark = lambda: False\n"
        "with memory.PeakMemory(torch.device('cpu')):\n"
        "    torch.ones(1)\n"
        "for mebibytes in (128, 64):\n"
        "    with memory.PeakMemory(torch.device('cpu')) as measured:\n"
        "        torch.ones(mebibytes, 2**18)\n"
        "    assert 0 < measured.seconds < 10\n"
        "    print(measured.peak_bytes)"
    )
    # Of a shell, since a child begins with the high-water mark of the process that it is forked of.
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(line) / 2**20 for line in run.stdout.split()]
    assert peaks == pytest.approx([128, second], abs=6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_on_cuda_counts_tensors_and_waits_for_the_device():
    device = torch.device("cuda")
    kept = torch.ones(2**20, device=device)
    for mebibytes in (64, 16):
        before = torch.cuda.memory_allocated(device)
        with PeakMemory(device) as measured:
            torch.ones(mebibytes, 2**18, device=device)
        assert measured.peak_bytes == before + mebibytes * 2**20
    cycles = 200_000_000
    with PeakMemory(device) as measured:
        torch.cuda._sleep(cycles)
    assert measured.seconds > 0.02
    del kept


MEASURE = """
import json, sys, torch
sys.path.insert(0, "tests/support")
from decoders import decode, make
from pid_lightning import PiDDecoder
from pid_lightning.decoding.memory import PeakMemory
torch.set_num_threads(1)
sizes = {"width": 64, "num_heads": 4, "pixel_width": 8}
figures = []
changes = json.loads(sys.argv[1])
if changes == "native":
    decoder = PiDDecoder.from_pretrained(dtype=torch.float32)
else:
    decoder = make(sizes=sizes, image_size=None, **changes)
weights = sum(w.numel() * 4 for w in decoder.denoiser.parameters())
channels, cell = decoder.info.geometry.latent_channels, decoder.info.geometry.cell
decode(decoder, torch.randn(1, channels, 4, 4), steps=2)
for side, tile in ((384, None), (768, 256)):
    latents = torch.randn(1, channels, side // cell, side // cell)
    with PeakMemory(torch.device("cpu")) as measured:
        decode(decoder, latents, tile=tile, steps=3)
    figures.append((decoder.estimate_memory(side, side, tile) - weights, measured.peak_bytes))
print(json.dumps(figures))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a resettable high-water mark")
@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"student_times": None}, marks=pytest.mark.slow), "native"],
    ids=["student", "teacher", "bundled"],
)
def test_memory_is_what_was_estimated(changes: dict[str, Any] | str) -> None:
    # Return freed blocks to the system at once, so that resident memory is what tensors hold.
    settings = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps(changes)],
        env={**os.environ, **settings},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for estimated, measured in json.loads(done.stdout.splitlines()[-1]):
        assert estimated == pytest.approx(measured, rel=0.15)
