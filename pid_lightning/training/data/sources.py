"""Which rows there are: folders of pictures, parquet files and hub data sets, and their splits."""

from __future__ import annotations

import glob
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.files import ASSETS
from pid_lightning.pictures.pixels import (
    PICTURE_SUFFIXES,
    UnusablePicture,
    read_pixels,
    read_size,
)

if TYPE_CHECKING:
    import datasets

BUNDLED_PHOTOS = ASSETS / "photos"
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
TEXT = ("string", "large_string", "string_view")
COLUMN_TYPES: dict[str, tuple[str, ...]] = {  # of parquet; `datasets.Image` reads the others
    "caption": (*TEXT, "null"),
    "image": (*TEXT, "binary", "large_binary", "binary_view"),
}


@dataclass
class Split:
    """Rows {"image": {"path", "bytes"}, "caption"?, "name"?}, and their pixels if cached."""

    rows: datasets.Dataset | datasets.IterableDataset
    pixels: list[Tensor] | None = None

    @property
    def is_stream(self) -> bool:
        """Whether rows come one after the other, and their number is not known."""
        return not hasattr(self.rows, "select")

    def select(self, indices: list[int]) -> Split:
        """The rows at these indices."""
        pixels = None if self.pixels is None else [self.pixels[i] for i in indices]
        return Split(self.rows.select(indices), pixels)

    def hold_out(self, num_held: int, least: int) -> tuple[Split, Split]:
        """Hold out rows, spread evenly (of a stream, the first); returns (rest, held out).

        Args:
            num_held: how many.
            least: how many are needed.

        Raises:
            Mistake: they are fewer than needed, or all.
        """
        total = math.inf if self.is_stream else len(self.rows)
        if not least <= num_held < total:
            raise Mistake(
                "data.num_val",
                f"{num_held} pictures cannot be held out of {total}: at least {least} must be, and "
                "one must be left to train on; change it, or give splits named train and val.",
            )
        if self.is_stream:
            return Split(self.rows.skip(num_held)), Split(self.rows.take(num_held))
        held = [(2 * i + 1) * total // (2 * num_held) for i in range(num_held)]
        return self.select(sorted(set(range(total)) - set(held))), self.select(held)


def check_picture(image: dict[str, Any] | None, image_size: int) -> tuple[int, int]:
    """Width and height of a row's {"path", "bytes"}, by its header alone.

    Raises:
        UnusablePicture: there is no readable picture, or it is smaller than `image_size`.
    """
    width, height = read_size(_file(image))
    if min(width, height) < image_size:
        raise UnusablePicture(f"{width} x {height}, below image_size {image_size}")
    return width, height


def decode(image: dict[str, Any] | None, image_size: int) -> Tensor:
    """Decode a row's {"path", "bytes"} to a uint8 picture (3, H, W).

    Raises:
        UnusablePicture: as `check_picture`, or the pixels are damaged.
    """
    check_picture(image, image_size)
    return read_pixels(_file(image))


def _file(image: dict[str, Any] | None) -> str | BinaryIO:
    path, content = (image["path"], image["bytes"]) if image else (None, None)
    return path if path and content is None else io.BytesIO(content or b"")


def fail_without_pictures(option: str, num_skipped: int, image_size: int) -> NoReturn:
    """Tell that no picture of a source is usable.

    Raises:
        Mistake: always.
    """
    raise Mistake(
        option,
        f"none of {num_skipped} pictures is usable at image_size {image_size}; give "
        f"{', '.join(PICTURE_SUFFIXES)} files with both sides at least that long, or lower "
        "image_size or num_val.",
    )


@dataclass
class Source:
    """Where pictures come from; `option` names `path` in messages, the others are as in
    `ImageData`."""

    option: str
    path: str
    image_size: int
    cache_bytes: int
    streaming: bool
    image_column: str
    caption_column: str | None
    _splits: dict[str, Split] = field(default_factory=dict)

    def read(self, *names: str) -> Split:
        """Read the first of some splits that there is, once.

        Raises:
            Mistake: there is none, or no picture in it is usable.
        """
        name = next((name for name in names if name in self.readers), None)
        if name is None:
            raise Mistake(
                self.option,
                f"{self.path} has the splits {', '.join(self.readers)}, none named {names[0]}; "
                "rename one, or put all pictures in one folder.",
            )
        if name not in self._splits:
            self._splits[name] = self.readers[name]()
        return self._splits[name]

    @cached_property
    def readers(self) -> dict[str, Callable[[], Split]]:
        """Functions that read the splits: "train", "val" and "test", and others under their own
        names. A source without any is "train".

        Raises:
            Mistake: there is no such source.
        """
        path = os.path.expanduser(self.path)
        root = BUNDLED_PHOTOS if path == "bundled" else Path(path)
        if path and root.is_dir() and not any(root.glob("*.parquet")) and not self.streaming:
            folders = {SPLIT_NAMES[d.name]: d for d in root.iterdir() if d.name in SPLIT_NAMES}
            folders = folders or {"train": root}
            return {name: partial(self._read_folder, root, d) for name, d in folders.items()}
        tables = {SPLIT_NAMES.get(n, n): table for n, table in self._load_tables(path).items()}
        if len(tables) == 1 and tables.keys().isdisjoint(SPLIT_NAMES):
            tables = {"train": next(iter(tables.values()))}
        return {name: partial(self._read_table, table) for name, table in tables.items()}

    def _read_folder(self, root: Path, folder: Path) -> Split:
        """All usable pictures under a folder, sorted by path. All headers are read, and all pixels
        too if they fit into `cache_bytes`."""
        import datasets

        files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in PICTURE_SUFFIXES]
        files = [f for f in files if not f.name.startswith(".")]
        images = [{"path": str(f), "bytes": None} for f in files]
        found = _each(check_picture, images, self.image_size)
        num_bytes = [0 if isinstance(f, UnusablePicture) else 3 * f[0] * f[1] for f in found]
        cached = sum(num_bytes) <= self.cache_bytes
        if cached:  # one buffer, shared with worker processes
            places = torch.empty(sum(num_bytes), dtype=torch.uint8).split(num_bytes)
            found = _each(_decode_into, list(zip(images, places, strict=True)), self.image_size)
        kept = [i for i, f in enumerate(found) if not isinstance(f, UnusablePicture)]
        if not kept:
            fail_without_pictures(self.option, len(files), self.image_size)
        _warn_of_skipped(folder, dict(zip(files, found, strict=True)))
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

    def _load_tables(self, path: str) -> dict[str, Any]:
        """Parquet files or a hub data set, as a dictionary of its splits."""
        import datasets

        files = sorted(glob.glob(path, recursive=True)) if path.endswith(".parquet") else []
        is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).parent.exists()
        reason = ""
        try:
            if files:
                data = {"data_files": files, "streaming": self.streaming}
                return datasets.load_dataset("parquet", **data)
            if is_hub_id or (path and any(Path(path).glob("*.parquet"))):
                return datasets.load_dataset(path, streaming=self.streaming)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = f" ({error})"
        folder = "" if self.streaming else "folder of pictures, no "
        raise Mistake(
            self.option,
            f"{path!r} is no {folder}parquet file and no available data set of the Hugging Face "
            f"hub; check the path, or the network for owner/name ids{reason}.",
        )

    def _read_table(self, table: Any) -> Split:
        """A table with columns "image" and, if wanted, "caption"; pictures stay encoded."""
        import datasets

        wanted = {self.image_column: "image"}
        if self.caption_column:
            wanted[self.caption_column] = "caption"
        columns = table.column_names or list(next(iter(table)))
        for column, name in wanted.items():
            kind = (table.features or {}).get(column)  # a stream may not know them
            if name == "caption":
                kind = getattr(kind, "feature", kind)  # of each of several captions
            # `cast_column` knows the other types of pictures.
            is_known = kind is None or (name == "image" and not isinstance(kind, datasets.Value))
            fits = is_known or getattr(kind, "dtype", None) in COLUMN_TYPES[name]
            if column not in columns or not fits:
                raise Mistake(
                    f"data.{name}_column",
                    f"{self.path} has no column {column!r} of {name}s; choose from {columns}.",
                )
        # First: any other step on a stream of decoded pictures would compress them again.
        table = table.cast_column(self.image_column, datasets.Image(decode=False))
        table = table.select_columns(list(wanted))
        return Split(table.rename_columns({old: new for old, new in wanted.items() if old != new}))


def caption_beside(file: Path) -> str | None:
    """Read the caption in NAME.txt beside a file NAME.*; None if there is none.

    Raises:
        Mistake: the text is not UTF-8.
    """
    text = file.with_suffix(".txt")
    try:
        return text.read_text("utf-8-sig").strip() if text.is_file() else None
    except UnicodeDecodeError as error:
        raise Mistake("caption", f"{text} is not UTF-8 text; save it as UTF-8.") from error


def read_captions(folder: Path) -> dict[Path, str]:
    """Read captions from every metadata.jsonl under `folder`, keyed by picture path.

    Raises:
        Mistake: a line is not an object with "file_name" and, for the caption, "text".
    """
    captions = {}
    for file in sorted(folder.rglob("metadata.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            entry = _parse_entry(line) if line.strip() else ("", "")
            if entry is None:
                raise Mistake(
                    "caption",
                    f"{file}, line {number} is no JSON object in UTF-8 with the strings "
                    '"file_name" and, for the caption, "text"; correct or remove it.',
                )
            captions[file.parent / entry[0]] = entry[1]
    return captions


def _parse_entry(line: bytes) -> tuple[str, str] | None:
    """File name and caption; None if the line is something else."""
    try:
        entry = json.loads(line)
    except ValueError:  # also of text that is not UTF-8
        return None
    if not isinstance(entry, dict):
        return None
    name, caption = entry.get("file_name"), entry.get("text") or ""
    return (name, caption) if isinstance(name, str) and isinstance(caption, str) else None


def _warn_of_skipped(folder: Path, found: dict[Path, Any]) -> None:
    skipped = [
        f"{file.relative_to(folder)} ({reason})"
        for file, reason in found.items()
        if isinstance(reason, UnusablePicture)
    ]
    if skipped:
        more = f", and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        listed = ", ".join(skipped[:10]) + more
        rank_zero_warn(f"{len(skipped)} of {len(found)} pictures in {folder} skipped: {listed}.")


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
