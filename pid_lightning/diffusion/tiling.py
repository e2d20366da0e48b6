"""Tiled velocities for pictures larger than the network was trained for: tiles overlap and blend.

There is one sampling loop and one noise for the whole picture; only the network's forward pass is
tiled, at every step (the idea of MultiDiffusion, arXiv 2302.08113). Overlapping tiles are averaged
before each step, so they never drift apart and no seam can form. To the network a tile is a picture
of its own, with positions starting at zero; but its latents pass through the adapter with a margin
of their surroundings (`decoding`), or the adapter would take the tile's border for the picture's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pid_lightning.checks import check_between, check_multiple
from pid_lightning.diffusion.sampling import Velocity

ALIGNED = "whole patches and latent cells"


@dataclass(frozen=True)
class Tile:
    """A rectangle of the output and the weights of its velocity.

    Attributes:
        rows, columns: position in output pixels.
        row_weights, column_weights: (h, 1) and (1, w); a pixel's weight is their product.
    """

    rows: slice
    columns: slice
    row_weights: Tensor
    column_weights: Tensor

    def widened(self, margin: int, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns extended by `margin` pixels on each side, within the picture."""
        return tuple(
            slice(max(span.start - margin, 0), min(span.stop + margin, length))
            for span, length in ((self.rows, height), (self.columns, width))
        )


class Tiles:
    """Overlapping tiles that cover a picture, with weights that sum to one at every pixel.

    A side shorter than the tile is covered by one tile. Otherwise tiles are spaced as evenly as
    their alignment allows, the last one ends at the picture's border, and neighbours overlap by at
    least `overlap`.

    Args:
        height, width: size of the picture in pixels, multiples of `step`.
        tile: side of a tile in pixels, a multiple of `step`.
        overlap: minimum overlap of neighbours, a multiple of `step`; None is `default_overlap`.
        step: alignment of the tiles in pixels: whole patches and whole latent cells.

    Raises:
        Mistake: the tile or the overlap is not aligned, or the overlap is not below the tile.
    """

    def __init__(
        self, height: int, width: int, tile: int, step: int, overlap: int | None = None
    ) -> None:
        if overlap is None:
            overlap = default_overlap(tile, step)
        check_tile(tile, step)
        check_multiple("overlap", overlap, step, ALIGNED, least=0)
        check_between("overlap", overlap, 0, tile - step)
        self.height = height
        self.width = width
        self.step = step
        self.shape: tuple[int, int] = (min(height, tile), min(width, tile))  # of every tile
        self._rows = _windows(height, tile, overlap, step)
        self._columns = _windows(width, tile, overlap, step)

    def __len__(self) -> int:
        return len(self._rows) * len(self._columns)

    def __iter__(self) -> Iterator[Tile]:
        for rows, row_weights in self._rows:
            for columns, column_weights in self._columns:
                yield Tile(rows, columns, row_weights[:, None], column_weights[None])


def check_tile(tile: int, step: int) -> None:
    """Raise `Mistake` unless tiles of this side in pixels are aligned and can overlap."""
    check_multiple("tile", tile, step, ALIGNED, least=2)


def default_overlap(tile: int, step: int) -> int:
    """A quarter of the tile in whole steps, at least one step."""
    return max(1, tile // (4 * step)) * step


def _windows(length: int, tile: int, overlap: int, step: int) -> list[tuple[slice, Tensor]]:
    """Spans along one axis, and weights in fp64 that sum to one at every pixel."""
    tile = min(tile, length)
    num = 1 if tile == length else math.ceil((length - overlap) / (tile - overlap))
    room = (length - tile) // step
    starts = [round(i * room / max(num - 1, 1)) * step for i in range(num)]
    # sin^2 over the tile: no jump at its ends, and neighbours that overlap by half already sum to
    # one. It stays above zero, so the division is safe at the picture's border, which only one tile
    # covers.
    rising = (torch.arange(tile, dtype=torch.float64) + 0.5) / tile
    window = (math.pi * rising).sin().square()
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += window
    spans = (slice(start, start + tile) for start in starts)
    return [(span, window / total[span]) for span in spans]


def blended_velocity(velocity_of: Callable[[Tile], Velocity], tiles: Tiles) -> Velocity:
    """The velocity of the whole picture as the weighted mean of its tiles' velocities.

    Besides one tile's tensors it only holds one picture, whatever the size.

    Args:
        velocity_of: makes the velocity function of a tile; called for each tile at every step.
        tiles: the tiles that cover the picture.
    """

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        blended = torch.zeros_like(x_t)
        for tile in tiles:
            place = (..., tile.rows, tile.columns)
            # Contiguous, or a compiled network would be recompiled for every picture's strides.
            tile_velocity = velocity_of(tile)(x_t[place].contiguous(), t)
            rows, columns = (
                weights.to(x_t.dtype).to(x_t.device, non_blocking=True)
                for weights in (tile.row_weights, tile.column_weights)
            )
            blended[place].addcmul_(tile_velocity, rows * columns)
            del tile_velocity  # or it would be there while the next one is computed
        return blended

    return velocity
