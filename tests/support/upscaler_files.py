"""A tiny random RRDBNet, the network of Real-ESRGAN, in the layouts of its files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, GROWTH, NUM_BLOCKS = 6, 32, 2  # spandrel knows the published growth alone


def numbered() -> dict[str, torch.Tensor]:
    """Random tensors named `{i}.weight` and `{i}.bias`, in the order of the forward pass."""
    dense = [(WIDTH + i * GROWTH, GROWTH) for i in range(4)] + [(WIDTH + 4 * GROWTH, WIDTH)]
    shapes = [(3, WIDTH), *dense * 3 * NUM_BLOCKS, *[(WIDTH, WIDTH)] * 4, (WIDTH, 3)]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (inputs, outputs) in enumerate(shapes):
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
        tensors[f"{i}.weight"] = weight / (9 * inputs) ** 0.5
        tensors[f"{i}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    return tensors


def published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in the published layout."""
    body = [
        f"body.{b}.rdb{r}.conv{c}"
        for b in range(NUM_BLOCKS)
        for r in range(1, 4)
        for c in range(1, 6)
    ]
    last = ["conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    names = ["conv_first", *body, *last]
    return {f"{names[int(k.split('.')[0])]}.{k.split('.')[1]}": v for k, v in tensors.items()}


def write(path: Path) -> Path:
    """A file in the numbered layout."""
    save_file(numbered(), path)
    return path
