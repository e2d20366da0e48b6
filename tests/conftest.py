"""Options and fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# One thread here and in every process that a test starts: tiny networks gain nothing from more, and
# sums round differently with another number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

VECTORS = Path(__file__).parent / "vectors"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vectors",
        type=Path,
        default=VECTORS,
        help="folder of *.safetensors reference vectors (default: the repository's own)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vector_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--vectors")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise pytest.UsageError(f"--vectors {folder}: no *.safetensors files in this folder.")
        metafunc.parametrize("vector_file", files, ids=[file.stem for file in files])
