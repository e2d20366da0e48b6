"""Rotary position tables (arXiv 2104.09864): text positions in 1-D, patches in 2-D.

Published weights rotate the channel pairs (2i, 2i+1) of a head; here pair i is (i, i + d/2), which
rotates whole contiguous halves. Attention does not depend on the order of a head's channels, so
`published_layout.py` permutes the rows of q and k once and every dot product stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]  # cos and sin of the angles of N positions, each (N, d/2)

THETA = 10_000.0
EXTENT = 16.0  # patch coordinates span [0, 16] at every size


def _frequencies(num: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(num, dtype=torch.float64, device="cpu") / num)


def _axis_angles(length: int, head_dim: int, reference: float | None) -> Tensor:
    """Angles (length, d/4) along one axis; NTK scaling has no effect at length `reference`."""
    theta = THETA
    axis_dim = head_dim // 2
    if reference is not None and axis_dim > 2:  # of 2 channels, the only frequency is 1
        theta *= (length / reference) ** (axis_dim / (axis_dim - 2))
    positions = torch.linspace(0, EXTENT, length, dtype=torch.float64, device="cpu")
    return positions[:, None] * _frequencies(head_dim // 4, theta)


def patch_angles(
    height: int, width: int, head_dim: int, reference: tuple[float, float] | None = None
) -> Tensor:
    """Angles of a height x width grid of patches, row by row.

    Args:
        height: rows of patches.
        width: columns of patches.
        head_dim: channels d of an attention head, a multiple of 4.
        reference: (rows, columns) at which NTK scaling has no effect; None is plain RoPE.

    Returns:
        (height*width, d/2) in fp64, on the CPU since not every accelerator has fp64; even entries
        depend on the column, odd ones on the row.
    """
    rows_at, columns_at = reference or (None, None)
    x = _axis_angles(width, head_dim, columns_at)  # (w, d/4)
    y = _axis_angles(height, head_dim, rows_at)  # (h, d/4)
    x = x[None].expand(height, -1, -1)
    y = y[:, None].expand(-1, width, -1)
    return torch.stack((x, y), dim=-1).reshape(height * width, head_dim // 2)


def text_angles(length: int, head_dim: int) -> Tensor:
    """Angles (length, d/2) in fp64, on the CPU, of text positions 0, 1, ..., length - 1."""
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    return positions[:, None] * _frequencies(head_dim // 2, THETA)


def rotation(angles: Tensor) -> Table:
    """The table of angles (N, d/2)."""
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate channel pairs (i, i + d/2) of x (..., N, d) by the table's angles (N, d/2)."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
