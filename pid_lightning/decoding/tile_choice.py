"""Chooses the tile size of a decode: as requested, the trained size, or what memory allows."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Literal

from pid_lightning.checks import Mistake
from pid_lightning.decoding.memory import free_memory
from pid_lightning.decoding.memory_estimate import estimate_working_memory
from pid_lightning.diffusion.tiling import check_tile
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import PiD

TileChoice = int | Literal["auto"] | None

CALLER_LEVEL = 4  # stack level of the user's own call to PiDDecoder.decode, which calls this


def check_tile_choice(tile: TileChoice, step: int) -> None:
    """Raise `Mistake` unless a tile is an aligned number of pixels, ``"auto"`` or None."""
    if tile is None or tile == "auto":
        return
    if isinstance(tile, bool) or not isinstance(tile, Integral):
        raise Mistake("tile", f"{tile!r} must be a number of pixels, 'auto' or None.")
    check_tile(tile, step)


def choose_tile(
    denoiser: PiD, info: ModelInfo, height: int, width: int, tile: TileChoice, batch_size: int = 1
) -> int | None:
    """The side of the tiles for a picture of height x width pixels; None is the whole picture.

    ``"auto"`` takes tiles of the trained size for larger pictures and otherwise the whole picture;
    where memory is short, the side is halved until it fits. Warns of that, and of a given side that
    shows the network a size which it was not trained for.
    """
    if tile != "auto":
        seen, trained = max(height, width), info.image_size
        seen = seen if tile is None else min(seen, tile)
        if trained is not None and not trained <= 2 * seen <= 2 * trained:
            remedy = "tile='auto'" if seen > trained else "larger latents or tiles"
            warnings.warn(
                f"The network sees {seen} pixels a side but was trained on {trained}: expect blur "
                f"and wrong colours; {remedy} would avoid it.",
                stacklevel=CALLER_LEVEL,
            )
        return tile
    free, step = free_memory(denoiser.out.weight.device), denoiser.alignment
    tile = trained = trained_tile(denoiser, height, width, info.image_size)
    while free is not None:
        needed = estimate_working_memory(info, height, width, tile, denoiser.dtype, batch_size)
        smaller = (tile or max(height, width)) // (2 * step) * step
        if needed <= free or smaller < 2 * step:
            break
        tile = smaller
    if tile != trained:
        warnings.warn(
            f"Memory is short ({free / 2**30:.1f} GiB free), so smaller tiles of {tile} pixels are "
            "used: expect less coherent detail; free some memory to avoid it.",
            stacklevel=CALLER_LEVEL,
        )
    return tile


def trained_tile(denoiser: PiD, height: int, width: int, image_size: int | None) -> int | None:
    """The trained size as a tile if the picture is larger than that, else None."""
    if image_size is None or max(height, width) <= image_size:
        return None
    step = denoiser.alignment
    return max(image_size // step, 2) * step
