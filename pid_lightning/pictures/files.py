"""Read, write, resize and arrange pictures."""

from __future__ import annotations

import json
import os
import platform
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from pid_lightning.files.atomic import replaced_file
from pid_lightning.version import __version__

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LATENTS_SUFFIX = ".safetensors"
WEBP_LONGEST_SIDE = 16383  # of the file format
# What Pillow raises on damaged files, depending on the format and the place.
PICTURE_DAMAGE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


def read_picture(path: str | Path) -> Tensor:
    """Read a picture file as (3, H, W) float32 in [-1, 1].

    EXIF orientation is applied, transparency is composited over white, and grey or 16-bit
    pictures are converted to 8-bit RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or not a picture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"picture {path} does not exist or is not a file: check the path.")
    try:
        with Image.open(path) as file:
            picture = to_rgb(file)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} is too large: at most {2 * Image.MAX_IMAGE_PIXELS} pixels are read; reduce it "
            "or cut it."
        ) from error
    except PICTURE_DAMAGE as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{path} cannot be read as a picture ({reason}): give an intact "
            f"{', '.join(PICTURE_SUFFIXES)} file."
        ) from error
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB, upright: EXIF orientation applied, transparency composited over white."""
    picture = ImageOps.exif_transpose(picture)
    # Pillow's own conversion clips 16-bit greys to white instead of scaling them.
    if picture.mode.startswith("I"):
        greys = np.asarray(picture).astype(np.float64).clip(0, 65535) / 257
        picture = Image.fromarray(greys.round().astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("32-bit float pixels have no fixed range")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def write_picture(image: Tensor, path: str | Path, metadata: dict) -> None:
    """Write a picture, and its metadata with the versions that made it as JSON beside it
    (``NAME.png``, ``NAME.json``).

    Each file appears complete or not at all; missing folders are created.

    Args:
        image: (3, H, W) in [-1, 1]; values outside are clamped.
        path: ends in ``.png``, or in ``.webp`` (written lossless).
        metadata: plain values (numbers, strings, lists, dicts).

    Raises:
        ValueError: another suffix or shape, non-finite values, or too large for WebP.
        OSError: the files cannot be written; existing ones stay intact.
    """
    path = Path(path)
    file_format = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower())
    if file_format is None:
        raise ValueError(f"cannot write {path}: the file name must end in .png or .webp.")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"cannot write {path}: a picture is (3, H, W), not {tuple(image.shape)}.")
    if not image.isfinite().all():
        raise ValueError(
            f"{path} was not written because its pixels are not all finite: check the weights, and "
            "decode in bf16 or fp32 instead of fp16."
        )
    if file_format == "WEBP" and max(image.shape[1:]) > WEBP_LONGEST_SIDE:
        raise ValueError(
            f"cannot write {path}: WebP is limited to {WEBP_LONGEST_SIDE} pixels a side; use .png."
        )
    pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    versions = {
        "pid_lightning": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    description = json.dumps({**metadata, "versions": versions}, indent=2) + "\n"
    options = {"lossless": True} if file_format == "WEBP" else {}
    with replaced_file(path) as temporary:
        picture.save(temporary, format=file_format, **options)
    with replaced_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(description, encoding="utf-8")


def reduce_picture(images: Tensor, factor: int) -> Tensor:
    """Downsample by an integer factor with an antialiased bicubic filter.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        factor: at least 1, dividing H and W.

    Returns:
        (B, 3, H/factor, W/factor) clamped to [-1, 1], computed in fp32, in the dtype of `images`.

    Raises:
        ValueError: the factor is not a valid integer.
    """
    _check_factor(factor)
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"pictures of {height} x {width} pixels cannot be reduced by {factor}: "
            f"both sides must be multiples of {factor}."
        )
    size = (height // factor, width // factor)
    reduced = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
    return reduced.clamp(-1, 1).to(images.dtype)


def enlarge_picture(images: Tensor, factor: int) -> Tensor:
    """Upsample by an integer factor with a bicubic filter, the baseline of every decoder.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        factor: integer, at least 1.

    Returns:
        (B, 3, H*factor, W*factor) clamped to [-1, 1], computed in fp32, in the dtype of `images`.

    Raises:
        ValueError: the factor is not a valid integer.
    """
    _check_factor(factor)
    size = (images.shape[-2] * factor, images.shape[-1] * factor)
    enlarged = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False)
    return enlarged.clamp(-1, 1).to(images.dtype)


def _check_factor(factor: int) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ValueError(f"scale: {factor!r} must be an integer of at least 1.")


def pad_picture(images: Tensor, multiple: int) -> Tensor:
    """Grow images (B, 3, H, W) at the right and bottom to sides that are multiples of `multiple`.

    Border pixels are repeated; cropping the output restores the picture's shape.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def picture_grid(rows: Sequence[Sequence[Tensor]], labels: Sequence[str] | None = None) -> Tensor:
    """Arrange pictures in a grid on white, for TensorBoard or a file.

    Args:
        rows: rows of equally many pictures, all (3, h, w) of one size, in [-1, 1].
        labels: one line of text above each column; Pillow's built-in font covers Latin letters
            and digits.

    Returns:
        (3, H, W) float32 in [0, 1], on the CPU.

    Raises:
        ValueError: rows of different lengths, pictures of different sizes, or none at all.
    """
    sizes = {tuple(picture.shape) for row in rows for picture in row}
    lengths = {len(row) for row in rows}
    if len(sizes) != 1 or len(lengths) != 1:
        raise ValueError(
            f"a grid needs pictures of one size in rows of one length, not sizes {sorted(sizes)} "
            f"in rows of {sorted(lengths)}: enlarge the smaller pictures first."
        )
    if labels is not None and len(labels) != len(rows[0]):
        raise ValueError(f"a grid of {len(rows[0])} columns cannot take {len(labels)} labels.")
    _, height, width = sizes.pop()
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


def find_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """Collect picture and latent files (``.safetensors``) from files and folders, sorted by path.

    Subfolders and hidden files are skipped.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no input, a file is of an unknown kind, nothing was named, or
            two inputs share a name (outputs are named after inputs).
    """
    found: dict[Path, Path] = {}
    for name in paths:
        if not str(name):
            raise ValueError("input: an empty name was given; name a picture, file or folder.")
        path = Path(os.path.expanduser(name))
        files = [path]
        if path.is_dir():
            files = [file for file in path.iterdir() if file.is_file() and _is_input(file)]
        elif not path.exists():
            raise FileNotFoundError(f"input {path} does not exist: check the path.")
        elif not _is_input(path):
            raise ValueError(
                f"input {path} is neither a picture ({', '.join(PICTURE_SUFFIXES)}) nor a "
                f"{LATENTS_SUFFIX} file of latents, or it is hidden (its name begins with a dot)."
            )
        if not files:
            raise ValueError(
                f"folder {path} holds no picture ({', '.join(PICTURE_SUFFIXES)}) and no "
                f"{LATENTS_SUFFIX} file of latents (subfolders are not searched)."
            )
        found.update({file.resolve(): file for file in files})
    if not found:
        raise ValueError("no input was named: give at least one picture, latent file or folder.")
    inputs = sorted(found.values())
    by_name: dict[str, Path] = {}
    for file in inputs:
        twin = by_name.setdefault(file.stem, file)
        if twin is not file:
            raise ValueError(
                f"inputs {twin} and {file} would both be written as {file.stem}: rename one, or "
                "decode them separately."
            )
    return inputs


def _is_input(path: Path) -> bool:
    known = (*PICTURE_SUFFIXES, LATENTS_SUFFIX)
    return path.suffix.lower() in known and not path.name.startswith(".")
