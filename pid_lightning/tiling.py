"""A picture larger than a network was trained for: its velocity in tiles that overlap and blend.

There is one sampling loop and one noise for the whole picture; only the network's forward pass sees
tiles, at every step anew (the idea of MultiDiffusion, arXiv 2302.08113). Neighbours are averaged
before each step is taken, so that they never drift apart and no seam can form. To the network a
tile is a picture of its own, positions begin anew in each; but its latents pass the adapter
together with a margin of their surroundings (`decoding`), or it would take the tile's border for
the picture's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pid_lightning.sampling import Velocity


@dataclass(frozen=True)
class Tile:
    """A rectangle of the output and how much its velocity counts there.

    Attributes:
        rows, columns: where it lies, in output pixels.
        row_weights, column_weights: (h, 1) and (1, w); a pixel's weight is their product.
    """

    rows: slice
    columns: slice
    row_weights: Tensor
    column_weights: Tensor

    def widened(self, margin: int, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns with `margin` pixels more on each side that lies inside the picture."""
        return tuple(
            slice(max(span.start - margin, 0), min(span.stop + margin, length))
            for span, length in ((self.rows, height), (self.columns, width))
        )


class Tiles:
    """Overlapping tiles that cover a picture, their weights summing to one at every pixel.

    A side shorter than the tile is covered whole. Otherwise tiles lie as evenly as their
    alignment allows, the last one ending where the picture does, and each overlaps the next by at
    least `overlap`.

    Args:
        height, width: of the picture, in pixels, multiples of `step`.
        tile: side of a tile in pixels, a multiple of `step`.
        overlap: least overlap of neighbours, a multiple of `step`; None is `default_overlap`.
        step: pixels that tiles are aligned to: whole patches and whole latent cells.

    Raises:
        ValueError: a tile or an overlap that is not aligned or leaves no progress.
    """

    def __init__(
        self, height: int, width: int, tile: int, step: int, overlap: int | None = None
    ) -> None:
        if overlap is None:
            overlap = default_overlap(tile, step)
        if tile < 1 or tile % step or (tile < 2 * step and tile < max(height, width)):
            least = max(2, round(tile / step)) * step
            raise ValueError(
                f"tile: {tile} pixels must be a multiple of {step} (whole patches and latent "
                f"cells) and at least {2 * step}; take {least}."
            )
        if overlap % step or not 0 <= overlap < tile:
            raise ValueError(
                f"overlap: {overlap} must be a multiple of {step} from 0 to below the tile's "
                f"{tile} pixels."
            )
        self.height, self.width, self.step = height, width, step
        self.shape = (min(height, tile), min(width, tile))  # of every tile
        self._rows = _windows(height, tile, overlap, step)
        self._columns = _windows(width, tile, overlap, step)

    def __len__(self) -> int:
        return len(self._rows) * len(self._columns)

    def __iter__(self) -> Iterator[Tile]:
        for rows, row_weights in self._rows:
            for columns, column_weights in self._columns:
                yield Tile(rows, columns, row_weights[:, None], column_weights[None])


def default_overlap(tile: int, step: int) -> int:
    """A quarter of the tile in whole steps, one at least."""
    return max(1, tile // (4 * step)) * step


def _windows(length: int, tile: int, overlap: int, step: int) -> list[tuple[slice, Tensor]]:
    """Spans along one axis, and weights in fp64 that sum to one at every pixel."""
    tile = min(tile, length)
    num = 1 if tile == length else math.ceil((length - overlap) / (tile - overlap))
    room = (length - tile) // step
    starts = [round(i * room / max(num - 1, 1)) * step for i in range(num)]
    # sin^2 over the tile: no jump at its ends, and neighbours that overlap by half sum to one
    # already. It stays above zero, so that the picture's border, which only one tile covers, is
    # divided by something.
    rising = (torch.arange(tile, dtype=torch.float64) + 0.5) / tile
    window = (math.pi * rising).sin().square()
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += window
    spans = (slice(start, start + tile) for start in starts)
    return [(span, window / total[span]) for span in spans]


def blended_velocity(velocity_of: Callable[[Tile], Velocity], tiles: Tiles) -> Velocity:
    """The velocity of the whole picture as the weighted mean of its tiles' velocities.

    Holds one picture besides those of one tile, whatever the size.

    Args:
        velocity_of: the velocity function of a tile, asked for at every step.
        tiles: which cover the picture.
    """

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        blended = torch.zeros_like(x_t)
        for tile in tiles:
            place = (..., tile.rows, tile.columns)
            weights = (tile.row_weights * tile.column_weights).to(x_t.device, x_t.dtype)
            # Contiguous, or a compiled network would compile again for every picture's strides.
            blended[place].addcmul_(velocity_of(tile)(x_t[place].contiguous(), t), weights)
        return blended

    return velocity
