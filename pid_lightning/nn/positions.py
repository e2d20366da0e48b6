"""Position tables of all sampling steps: rotations of text and patches, sines of the pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pid_lightning.nn import rope
from pid_lightning.nn.config import PiDConfig
from pid_lightning.nn.rope import Table

MAX_CACHED_SIZES = 8  # output sizes whose tables are kept

Tables = tuple[Table, Table, Table, Tensor, Tensor]


class PositionTables:
    """The tables of a `Condition` by output size; those of the newest sizes are kept."""

    def __init__(self, config: PiDConfig) -> None:
        self.config = config
        self.kept: dict[tuple[Any, ...], Tables] = {}

    def of(
        self, height: int, width: int, text_length: int, device: torch.device, dtype: torch.dtype
    ) -> Tables:
        """The tables for one output size in pixels, in the order of `Condition`'s fields."""
        size = (height, width, text_length, device, dtype)
        tables = self.kept.get(size)
        if tables is None:
            with torch.inference_mode(False):  # training may use them next
                tables = position_tables(self.config, *size)
            # A new dict, since other threads may be reading the old one.
            newest = list(self.kept.items())[1 - MAX_CACHED_SIZES :]
            self.kept = dict([*newest, (size, tables)])
        return tables


def position_tables(
    config: PiDConfig,
    height: int,
    width: int,
    text_length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tables:
    """The tables of a `Condition` for one output size, in the order of its fields."""
    grid = (height // config.patch_size, width // config.patch_size)
    reference = config.rope_reference
    if reference is not None:
        reference = tuple(side / config.patch_size for side in reference)
    head_dim = config.width // config.num_heads
    text = rope.text_angles(text_length, head_dim)
    patch = rope.patch_angles(*grid, head_dim, reference)
    pixel_head_dim = config.pixel_attention_width // config.pixel_num_heads
    pixel = rope.patch_angles(*grid, pixel_head_dim, reference)
    columns, rows = (_sine_cosine(side, config.pixel_width // 2) for side in (width, height))
    tables = (*map(rope.rotation, (text, patch, pixel)), columns, rows)
    return tree_map(lambda table: table.to(dtype).to(device), tables)


def _sine_cosine(length: int, width: int) -> Tensor:
    """Fixed positions (length, width) in fp64: `[sin, cos]`, frequencies `10000^(-i/(width/2))`."""
    num = width // 2
    steps = torch.arange(num, dtype=torch.float64, device="cpu")
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = positions[:, None] * 10_000.0 ** (-steps / num)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
