"""Which tile a picture is decoded in: as asked for, of the trained size, or what memory allows."""

from __future__ import annotations

import warnings
from typing import Literal

from pid_lightning.decoding import trained_tile
from pid_lightning.memory import estimate_working_memory, free_memory
from pid_lightning.nn import PiD
from pid_lightning.weights import ModelInfo

TileChoice = int | Literal["auto"] | None

# Where a user's own call stands above a warning given here, through PiDDecoder.decode.
CALLER = 5


def choose_tile(
    denoiser: PiD, info: ModelInfo, height: int, width: int, tile: TileChoice, batch_size: int = 1
) -> int | None:
    """The side of the tiles for a picture of height x width pixels; None is the whole picture.

    ``"auto"`` is tiles of the trained size for a larger picture and the whole for others, and
    half of that as often as memory asks for it. Warns where the network will see a size it was
    not trained for.

    Raises:
        ValueError: a tile that is none of those.
    """
    if tile == "auto":
        return _fitting_tile(denoiser, info, height, width, batch_size)
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int)):
        raise ValueError(f"tile: {tile!r} is neither a number of pixels, 'auto' nor None.")
    trained, seen = info.image_size, max(height, width)
    seen = seen if tile is None else min(seen, tile)
    if trained is not None and not trained <= 2 * seen <= 2 * trained:
        cure = "tile='auto' avoids it" if seen > trained else "larger latents or tiles avoid it"
        warnings.warn(
            f"The network sees {seen} pixels a side but was trained on {trained}: expect blur and "
            f"wrong colours; {cure}.",
            stacklevel=CALLER,
        )
    return tile


def _fitting_tile(
    denoiser: PiD, info: ModelInfo, height: int, width: int, batch_size: int
) -> int | None:
    free = free_memory(denoiser.out.weight.device)
    step = denoiser.alignment
    tile = first = trained_tile(denoiser, height, width, info.image_size)
    while free is not None:
        needed = estimate_working_memory(info, height, width, tile, denoiser.dtype, batch_size)
        smaller = (tile or max(height, width)) // (2 * step) * step
        if needed <= free or smaller < 2 * step:
            break
        tile = smaller
    if tile != first:
        warnings.warn(
            f"Memory is short ({free / 2**30:.1f} GiB free), so this decodes in tiles of {tile} "
            "pixels, smaller than it would otherwise: expect less coherent detail.",
            stacklevel=CALLER + 1,
        )
    return tile
