"""Pictures arranged in a labelled grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def picture_grid(rows: Sequence[Sequence[Tensor]], labels: Sequence[str] | None = None) -> Tensor:
    """Arrange pictures in a grid on white, for TensorBoard or a file.

    Args:
        rows: rows of equally many pictures, all (3, h, w) of one size, in [-1, 1].
        labels: one line of text above each column; Pillow's built-in font covers Latin letters
            and digits.

    Returns:
        (3, H, W) float32 in [0, 1], on the CPU.
    """
    height, width = rows[0][0].shape[-2:]
    gap = max(2, min(height, width) // 64)
    bands = [] if labels is None else [_draw_labels(labels, width, gap)]
    for row in rows:
        cells = [(picture.detach().float().cpu().clamp(-1, 1) + 1) / 2 for picture in row]
        bands.append(_join(cells, gap, dim=2))
    return _join(bands, gap, dim=1)


def _join(parts: Sequence[Tensor], gap: int, dim: int) -> Tensor:
    shape = list(parts[0].shape)
    shape[dim] = gap
    spaced = [piece for part in parts for piece in (part.new_ones(shape), part)][1:]
    return torch.cat(spaced, dim=dim)


def _draw_labels(labels: Sequence[str], width: int, gap: int) -> Tensor:
    """A white band (3, h, W) with labels centred over columns of `width` pixels."""
    for size in range(max(9, min(width // 10, 64)), 7, -1):
        font = ImageFont.load_default(size=size)
        if max(font.getlength(label) for label in labels) <= width:
            break
    band_height = 2 * max(font.getbbox("Ag")[3], 1)
    cells = []
    for label in labels:
        cell = Image.new("L", (width, band_height), 255)
        ImageDraw.Draw(cell).text((width / 2, band_height / 2), label, 0, font, anchor="mm")
        cells.append(torch.from_numpy(np.array(cell)).float().expand(3, -1, -1) / 255)
    return _join(cells, gap, dim=2)
