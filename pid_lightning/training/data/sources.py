"""Sources of pictures and captions: folders, parquet files and hub data sets."""

from __future__ import annotations

import glob
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor

from pid_lightning.pictures.files import PICTURE_DAMAGE, PICTURE_SUFFIXES, to_rgb

if TYPE_CHECKING:
    import datasets

BUNDLED_PHOTOS = Path(__file__).parents[2] / "assets" / "photos"
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


class UnusablePicture(ValueError):
    """A picture that cannot be read or is smaller than the crop; the message is the reason."""


@dataclass
class Split:
    """Rows {"image": {"path", "bytes"}, "caption"?, "name"?}, and their pixels if cached."""

    rows: datasets.Dataset | datasets.IterableDataset
    pixels: list[Tensor] | None = None

    def select(self, indices: list[int]) -> Split:
        pixels = None if self.pixels is None else [self.pixels[i] for i in indices]
        return Split(self.rows.select(indices), pixels)


def _open(image: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])


def check_header(image: dict[str, Any] | None, image_size: int) -> tuple[int, int]:
    """Width and height of {"path", "bytes"}, read from the header alone.

    Raises:
        UnusablePicture: no picture, float pixels, or smaller than `image_size`.
    """
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise UnusablePicture("no picture")
    try:
        with _open(image) as picture:
            width, height, mode = *picture.size, picture.mode
    except PICTURE_DAMAGE:
        raise UnusablePicture("not a readable picture") from None
    if mode == "F":
        raise UnusablePicture("32-bit float pixels have no fixed range")
    if min(width, height) < image_size:
        raise UnusablePicture(f"{width} x {height}, below image_size {image_size}")
    return width, height


def decode(image: dict[str, Any] | None, image_size: int) -> Tensor:
    """Decode {"path", "bytes"} to an upright uint8 RGB picture (3, H, W).

    Raises:
        UnusablePicture: as `check_header`, or the pixels are damaged.
    """
    from torchvision.transforms.v2 import functional

    check_header(image, image_size)
    try:
        with _open(image) as picture:
            return functional.pil_to_tensor(to_rgb(picture))
    except PICTURE_DAMAGE:
        raise UnusablePicture("damaged pixels") from None


def none_left(num_skipped: int, image_size: int) -> str:
    """Error message for a source without a usable picture."""
    if not num_skipped:
        return "data.num_val: no picture is left to train on; lower it, or give more pictures."
    return (
        f"data.path: none of {num_skipped} pictures is usable at image_size {image_size}: "
        "give readable pictures with both sides at least that long, or lower image_size."
    )


def open_source(
    path: str,
    image_size: int,
    cache_bytes: int,
    streaming: bool,
    image_column: str,
    caption_column: str | None,
) -> dict[str, Callable[[], Split]]:
    """Find the splits of a source ("train", "val", "test"), each as a function that reads it.

    Arguments are those of `ImageData`.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: a folder is to be streamed, or no split has a known name.
    """
    path = os.path.expanduser(path)
    root = BUNDLED_PHOTOS if path == "bundled" else Path(path)
    if root.is_dir() and not any(root.glob("*.parquet")):
        if streaming:
            raise ValueError(
                f"data.streaming: {path} is a folder of pictures; only parquet files and hub data "
                "can be streamed, leave it out."
            )
        folders = {SPLIT_NAMES[d.name]: d for d in root.iterdir() if d.name in SPLIT_NAMES}
        return {
            name: partial(read_folder, root, folder, image_size, cache_bytes)
            for name, folder in (folders or {"train": root}).items()
        }
    tables = load_tables(path, streaming)
    known = {SPLIT_NAMES[name]: t for name, t in tables.items() if name in SPLIT_NAMES}
    if not known and len(tables) > 1:
        raise ValueError(
            f"data.path: {path} has splits {list(tables)}, none is named train; rename one."
        )
    known = known or {"train": next(iter(tables.values()))}
    return {
        name: partial(as_rows, table, path, image_column, caption_column)
        for name, table in known.items()
    }


def caption_beside(file: Path) -> str | None:
    """Read the caption in NAME.txt beside a file NAME.*; None if there is none.

    Raises:
        ValueError: the text is not UTF-8.
    """
    text = file.with_suffix(".txt")
    try:
        return text.read_text("utf-8-sig").strip() if text.is_file() else None
    except UnicodeDecodeError:
        raise ValueError(f"caption {text} is not UTF-8 text: save it as UTF-8.") from None


def read_captions(folder: Path) -> dict[Path, str]:
    """Read captions from every metadata.jsonl under `folder`, keyed by picture path.

    Raises:
        ValueError: a file is not UTF-8, or a line is not an object with "file_name".
    """
    captions = {}
    for file in sorted(folder.rglob("metadata.jsonl")):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8 text: save it as UTF-8.") from None
        for number, line in enumerate(text.split("\n"), 1):
            try:
                entry = json.loads(line) if line.strip() else {"file_name": "", "text": ""}
                caption = entry.get("text") or ""
                if not isinstance(caption, str):
                    raise TypeError
                captions[file.parent / entry["file_name"]] = caption
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{file}, line {number}: each line must be a JSON object with "
                    '"file_name" and, for the caption, "text" (a string).'
                ) from None
    return captions


def read_folder(root: Path, folder: Path, image_size: int, cache_bytes: int) -> Split:
    """Open all usable pictures under `folder`, sorted by path.

    All headers are read, and all pixels too if they fit into `cache_bytes`. Captions come from
    NAME.txt beside a picture, else from a metadata.jsonl under `root`.

    Raises:
        ValueError: there are no pictures, none is usable, or a metadata.jsonl is malformed.
    """
    import datasets

    files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in PICTURE_SUFFIXES]
    files = [f for f in files if not f.name.startswith(".")]
    if not files:
        suffixes = ", ".join(PICTURE_SUFFIXES)
        raise ValueError(f"data.path: there are no pictures ({suffixes}) in {folder} or below it.")
    images = [{"path": str(f), "bytes": None} for f in files]
    found = _each(check_header, images, image_size)
    num_bytes = [0 if isinstance(f, UnusablePicture) else 3 * f[0] * f[1] for f in found]
    cached = sum(num_bytes) <= cache_bytes
    if cached:  # one buffer, shared with worker processes
        places = torch.empty(sum(num_bytes), dtype=torch.uint8).split(num_bytes)
        found = _each(_decode_into, list(zip(images, places, strict=True)), image_size)
    kept = [i for i, f in enumerate(found) if not isinstance(f, UnusablePicture)]
    skipped = [
        f"{file.relative_to(folder)} ({reason})"
        for file, reason in zip(files, found, strict=True)
        if isinstance(reason, UnusablePicture)
    ]
    if not kept:
        raise ValueError(none_left(len(files), image_size))
    if skipped:
        more = f", and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        listed = ", ".join(skipped[:10]) + more
        rank_zero_warn(f"{len(skipped)} of {len(files)} pictures in {folder} skipped: {listed}.")
    captions, rows = read_captions(root), []
    stems = Counter(f.stem for f in files)
    for i in kept:
        file, caption = files[i], caption_beside(files[i])
        if caption is None:
            caption = captions.get(file, "")
        inner = file.relative_to(folder).with_suffix("")
        name = file.stem if stems[file.stem] == 1 else "__".join(inner.parts)
        rows.append({"image": images[i], "caption": caption, "name": name})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    return Split(table, [found[i] for i in kept] if cached else None)


def _decode_into(image_and_place: tuple[dict[str, Any], Tensor], image_size: int) -> Tensor:
    image, place = image_and_place
    picture = decode(image, image_size)
    return place.copy_(picture.flatten()).view(picture.shape)


def _each(read: Callable[..., Any], arguments: list[Any], image_size: int) -> list[Any]:
    """Map `read` over the arguments in threads; unusable pictures yield their error."""

    def attempt(argument: Any) -> Any:
        try:
            return read(argument, image_size)
        except UnusablePicture as reason:
            return reason

    with ThreadPoolExecutor() as pool:
        return list(pool.map(attempt, arguments))


def load_tables(path: str, streaming: bool) -> dict[str, Any]:
    """Load parquet files or a hub data set, as a dictionary of its splits.

    Raises:
        FileNotFoundError: there is no such data, or no network.
    """
    import datasets

    missing = (
        f"data.path: {path!r} is no folder of pictures, no parquet file and no available data set "
        "of the Hugging Face hub: check the path, or the network for owner/name ids."
    )
    files = sorted(glob.glob(path, recursive=True)) if path.endswith(".parquet") else []
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).parent.exists()
    try:
        if files:
            return datasets.load_dataset("parquet", data_files=files, streaming=streaming)
        if Path(path).is_dir() or is_hub_id:
            return datasets.load_dataset(path, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(f"{missing} ({error})") from error
    raise FileNotFoundError(missing)


def as_rows(table: Any, path: str, image_column: str, caption_column: str | None) -> Split:
    """Rename a table's columns to "image" and, if wanted, "caption"; pictures stay encoded.

    Raises:
        ValueError: there is no such column, or one of another type.
    """
    import datasets

    wanted = {image_column: "image"} | ({caption_column: "caption"} if caption_column else {})
    columns = table.column_names or list(next(iter(table)))
    for column, name in wanted.items():
        if column not in columns:
            raise ValueError(
                f"data.{name}_column: {path} has no column {column!r}; choose from {columns}."
            )
    text = ("string", "large_string", "string_view")
    accepted = {
        "caption": (*text, "null"),
        "image": (*text, "binary", "large_binary", "binary_view"),
    }
    for column, name in wanted.items():
        kind = (table.features or {}).get(column)  # a stream may not know them
        if name == "caption":
            kind = getattr(kind, "feature", kind)  # of each of several captions
        is_value = isinstance(kind, datasets.Value)
        if kind is None or (name == "image" and not is_value):  # `cast_column` knows the others
            continue
        if not is_value or kind.dtype not in accepted[name]:
            raise ValueError(
                f"data.{name}_column: {column!r} of {path} holds {kind}, no {name}s; choose from "
                f"{columns}."
            )
    # First: any other step on a stream of decoded pictures would decode and compress them again.
    table = table.cast_column(image_column, datasets.Image(decode=False))
    table = table.select_columns(list(wanted))
    return Split(table.rename_columns({old: new for old, new in wanted.items() if old != new}))


def hold_out(split: Split, num_held: int) -> tuple[Split, Split]:
    """Split off `num_held` pictures, spread evenly (of a stream, the first); returns (rest, held).

    Raises:
        ValueError: nothing would be left.
    """
    if not hasattr(split.rows, "select"):
        return Split(split.rows.skip(num_held)), Split(split.rows.take(num_held))
    total = len(split.rows)
    if num_held >= total:
        raise ValueError(
            f"data.num_val: {num_held} held-out pictures leave none of {total} to train on; "
            "lower it, or sort the pictures into sub-folders train/, val/ and test/."
        )
    held = [(2 * i + 1) * total // (2 * num_held) for i in range(num_held)]
    trained = sorted(set(range(total)) - set(held))
    return split.select(trained), split.select(held)
