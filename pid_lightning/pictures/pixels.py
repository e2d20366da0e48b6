"""Pixels of picture files as people see them: the one place that opens pictures.

Whatever else a file holds (EXIF, XMP, text, a profile), intact pixels are read: such extras may
turn them, where the orientation is legible, and tell their colours, where the profile is valid.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

PICTURE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"),
    *(".heic", ".heif"),
)
# By content, not by name. Pillow knows more, and starts Ghostscript to read one of them.
READ_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
HEIF_PLUGINS = ("pillow_heif", "pi_heif")  # used where the user has installed one
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # what pixels need
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_BITS, TIFF_WHITE_IS_ZERO, TIFF_SAMPLES = 258, 262, 339


class UnusablePicture(ValueError):
    """A picture that cannot be read or used; the message is the reason."""


def read_pixels(file: str | Path | BinaryIO) -> Tensor:
    """Read a picture as uint8 sRGB (3, H, W), a view of (H, W, 3).

    It is turned as its EXIF or XMP orientation says, a colour profile is converted to sRGB (but for
    one that is none), transparency is composited over white, greys of 16 and 32 bits are scaled.
    Of an animation it is the first frame.

    Raises:
        UnusablePicture: it is missing, damaged, too large, no regular file or not a picture.
    """
    with _open(file) as picture:
        pixels = np.array(_to_srgb(picture))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_size(file: str | Path | BinaryIO) -> tuple[int, int]:
    """Read a picture's width and height from its header alone, before it is turned.

    Raises:
        UnusablePicture: as `read_pixels`, as far as the header tells.
    """
    with _open(file) as picture:
        return picture.size


@contextmanager
def _open(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    try:
        if isinstance(file, str | Path):
            if not stat.S_ISREG(os.stat(file).st_mode):
                raise UnusablePicture("not a regular file")
            with open(file, "rb") as content, _identified(content) as picture:
                yield picture
        else:
            with _identified(file) as picture:
                yield picture
    except UnusablePicture:
        raise
    except UnidentifiedImageError as error:
        raise UnusablePicture("not a picture") from error
    # Decoders raise nearly anything on damaged files, down to KeyError and RecursionError.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UnusablePicture(reason) from error


def _identified(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=_formats())
    except ValueError:  # Pillow gives a picture up for its texts, or for a profile
        file.seek(0)
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            raise
        return Image.open(_bare_png(file), formats=["PNG"])


@functools.cache
def _formats() -> list[str]:
    for name in HEIF_PLUGINS:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name).register_heif_opener()
            break
    Image.init()
    return [name for name in READ_FORMATS if name in Image.OPEN]


def _bare_png(file: BinaryIO) -> BinaryIO:
    """A PNG without what its pixels do not need, from after its signature on."""
    bare = io.BytesIO()
    bare.write(b"\x89PNG\r\n\x1a\n")
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        content = file.read(length + 4)
        if kind in PNG_CHUNKS or (kind == b"eXIf" and length < 2**16):
            bare.write(head + content)
    bare.seek(0)
    return bare


def _to_srgb(picture: Image.Image) -> Image.Image:
    _load(picture)
    orientation = None
    if picture.format != "TIFF":  # which Pillow turns as it loads
        with suppress(Exception):  # EXIF holds anything
            orientation = picture.getexif().get(ExifTags.Base.Orientation)
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I"):
        picture = _scaled_greys(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        opacity = picture.getchannel("A")
        white = Image.new("RGB", picture.size, (255, 255, 255))
        picture = Image.composite(_in_srgb(picture.convert("RGB"), profile), white, opacity)
    else:
        if picture.mode not in ("L", "CMYK"):  # whose profiles speak of them
            picture = picture.convert("RGB")
        picture = _in_srgb(picture, profile).convert("RGB")
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def _load(picture: Image.Image) -> None:
    if picture.format == "TIFF":
        end = picture.load_end

        def turn() -> None:  # the end of loading, after the pixels, which stay if this fails
            try:
                end()
            except Exception:  # what Pillow raises of a broken EXIF is of many kinds
                with suppress(Exception):
                    ImageOps.exif_transpose(picture, in_place=True)

        picture.load_end = turn
    picture.load()
    if picture.mode == "F":
        raise UnusablePicture("32-bit float pixels have no fixed range")


def _scaled_greys(picture: Image.Image) -> Image.Image:
    """Greys of more than 8 bits as 8 bits, which Pillow would clip."""
    tags: dict[int, Any] = getattr(picture, "tag_v2", {})
    if tags.get(TIFF_SAMPLES, (1,))[0] == 2:
        raise UnusablePicture("signed pixels have no fixed range")
    most = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    greys = np.asarray(picture)
    if greys.dtype == np.int32 and most > 2**31:
        greys = greys.view(np.uint32)
    scaled = (greys.astype(np.float64) * (255 / most)).clip(0, 255).round().astype(np.uint8)
    # Pillow has turned these over itself where they have 8 bits.
    return Image.fromarray(255 - scaled if tags.get(TIFF_WHITE_IS_ZERO) == 0 else scaled)


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture with its profile's colours in sRGB; as it is without a valid profile."""
    if not profile:
        return picture
    with suppress(Exception):  # no profile, that of other channels, or Pillow without LittleCMS
        transform = _to_srgb_from(profile, picture.mode)
        return picture if transform is None else transform.apply(picture)
    return picture


@functools.lru_cache(maxsize=16)
def _to_srgb_from(profile: bytes, mode: str) -> Any:
    """The transform from a profile; None from sRGB itself, whose numbers it would round."""
    from PIL import ImageCms

    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    if mode == "RGB":
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(16, -1, 3)
        seen = np.asarray(transform.apply(Image.fromarray(colours)))
        if np.abs(seen.astype(int) - colours).max() <= 2:
            return None
    return transform
