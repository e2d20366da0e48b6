"""Reads and writes pictures."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pid_lightning import __version__
from pid_lightning.checks import Mistake, check_choice
from pid_lightning.files.atomic import replaced_file
from pid_lightning.pictures.pixels import PICTURE_SUFFIXES, UnusablePicture, read_pixels

FORMATS: dict[str, tuple[str, dict[str, bool]]] = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True}),
}
WEBP_LONGEST_SIDE = 16383  # of the file format


def read_picture(path: str | Path) -> Tensor:
    """Read a picture file as (3, H, W) float32 in [-1, 1], see `read_pixels`.

    Raises:
        Mistake: no such file, or it is damaged, too large or not a picture.
    """
    try:
        pixels = read_pixels(path)
    except UnusablePicture as error:
        raise Mistake(
            "inputs",
            f"{path} cannot be read as a picture ({error}); give an intact "
            f"{', '.join(PICTURE_SUFFIXES)} file.",
        ) from error
    return pixels.contiguous().float() / 127.5 - 1


def write_picture(image: Tensor, path: str | Path, metadata: dict[str, Any]) -> None:
    """Write a picture, and its metadata with the versions that made it as JSON beside it
    (``NAME.png``, ``NAME.json``).

    Each file appears complete or not at all; missing folders are created.

    Args:
        image: (3, H, W) in [-1, 1], finite; values outside are clamped.
        path: ends in ``.png``, or in ``.webp`` (written lossless).
        metadata: plain values (numbers, strings, lists, dicts).

    Raises:
        Mistake: another suffix, or too large for WebP.
        OSError: the files cannot be written; existing ones stay intact.
    """
    path = Path(path)
    check_choice("path", path.suffix.lower(), FORMATS)
    file_format, options = FORMATS[path.suffix.lower()]
    if file_format == "WEBP" and max(image.shape) > WEBP_LONGEST_SIDE:
        raise Mistake(
            "format", f"webp is limited to {WEBP_LONGEST_SIDE} pixels a side; use png for {path}."
        )
    pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    versions = {
        "pid_lightning": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    description = json.dumps({**metadata, "versions": versions}, indent=2) + "\n"
    with replaced_file(path) as temporary:
        picture.save(temporary, format=file_format, **options)
        # It appears first, so that no picture lacks what tells whether it is to be made anew.
        with replaced_file(path.with_suffix(".json")) as beside:
            beside.write_text(description, encoding="utf-8")
