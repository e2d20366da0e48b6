"""Reads and writes pictures."""

from __future__ import annotations

import json
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pid_lightning import __version__
from pid_lightning.checks import Mistake, check_choice
from pid_lightning.files.atomic import replaced_file

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS: dict[str, tuple[str, dict[str, bool]]] = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True}),
}
WEBP_LONGEST_SIDE = 16383  # of the file format


class UnusablePicture(ValueError):
    """A picture that cannot be read or used; the message is the reason."""


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


def read_pixels(file: str | Path | BinaryIO) -> Tensor:
    """Read a picture as uint8 RGB (3, H, W), a view of (H, W, 3).

    EXIF orientation is applied, transparency is composited over white, and grey or 16-bit
    pictures are converted to 8-bit RGB.

    Raises:
        UnusablePicture: it is missing, damaged, too large or not a picture.
    """
    with _open(file) as picture:
        pixels = np.array(_to_rgb(picture))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_size(file: str | Path | BinaryIO) -> tuple[int, int]:
    """Read a picture's width and height from its header alone, before EXIF orientation.

    Raises:
        UnusablePicture: as `read_pixels`, as far as the header tells.
    """
    with _open(file) as picture:
        return picture.size


@contextmanager
def _open(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as picture:
            if picture.mode == "F":
                raise ValueError("32-bit float pixels have no fixed range")
            yield picture
    except UnidentifiedImageError as error:
        raise UnusablePicture("not a picture") from error
    # What Pillow raises on damaged files, depending on the format and the place.
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UnusablePicture(" ".join(str(error).split()).rstrip(".")) from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    # Pillow's own conversion clips 16-bit greys to white instead of scaling them.
    if picture.mode.startswith("I"):
        greys = np.asarray(picture).astype(np.float64).clip(0, 65535) / 257
        picture = Image.fromarray(greys.round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


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
    with replaced_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(description, encoding="utf-8")
