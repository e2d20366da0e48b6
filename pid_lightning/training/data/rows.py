"""A row's picture and caption: {"file": path in bytes} of a folder, {"image"} of a table."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import Any, BinaryIO

from torch import Tensor

from pid_lightning.pictures.pixels import UnusablePicture, read_pixels, read_size


class TooSmall(UnusablePicture):
    """A picture with a side below `image_size`."""


def check_picture(row: dict[str, Any], image_size: int) -> tuple[int, int]:
    """Width and height of a row's picture, by its header alone.

    Raises:
        UnusablePicture: there is no readable picture.
        TooSmall: it is smaller than `image_size`.
    """
    width, height = read_size(_file(row))
    if min(width, height) < image_size:
        raise TooSmall(f"{width} x {height}, below image_size {image_size}")
    return width, height


def decode(row: dict[str, Any], image_size: int) -> Tensor:
    """Decode a row's picture to uint8 (3, H, W).

    Raises:
        UnusablePicture: as `check_picture`, or the pixels are damaged.
    """
    check_picture(row, image_size)
    return read_pixels(_file(row))


def first_text(value: Any) -> str:
    """A caption, or the first of several; "" if there is none."""
    while isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) else ""


def _file(row: dict[str, Any]) -> str | BinaryIO:
    if "file" in row:
        return os.fsdecode(row["file"])
    content = _content(row["image"])
    return content if isinstance(content, str) else io.BytesIO(content or b"")


def _content(value: Any) -> bytes | str | None:
    """The first bytes in a value of any nesting, else its first text, which is a path."""
    if isinstance(value, bytes | str):
        return value or None
    if isinstance(value, dict):
        value = [value.get("bytes"), value.get("path"), *value.values()]
    elif not isinstance(value, list):
        return None
    elif value and isinstance(value[0], int):
        with suppress(TypeError, ValueError):
            return bytes(value)
    found = [content for part in value if (content := _content(part)) is not None]
    return next((c for c in found if isinstance(c, bytes)), found[0] if found else None)
