"""A folder of pictures: its splits, the files that are taken, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.files.folders import Listing, is_lfs_pointer
from pid_lightning.pictures.pixels import PICTURE_SUFFIXES, UnusablePicture
from pid_lightning.training.data.captions import find_captions, holds_captions
from pid_lightning.training.data.rows import TooSmall, check_picture, decode
from pid_lightning.training.data.splits import (
    Origin,
    Split,
    count,
    fail_without_pictures,
    name_splits,
)

NEED_PLUGINS = (".heic", ".heif", ".avif")  # of Pillow, where it has not their formats


def find_pictures(listing: Listing) -> list[Path]:
    """The files of a folder that may be pictures, by their names."""
    return [file for file in listing.files if file.suffix.lower() in PICTURE_SUFFIXES]


@dataclass
class PictureFolder:
    """The pictures under a folder.

    Args:
        option: names the folder in messages.
        root: its absolute path.
        listing: all files under it.
        image_size: least length of a side.
        cache_bytes: largest size of a split's pixels to keep in memory.
        caption_key: of captions in metadata; None takes the usual ones.
    """

    option: str
    root: Path
    listing: Listing
    image_size: int
    cache_bytes: int
    caption_key: str | None

    @cached_property
    def pictures(self) -> list[Path]:
        """Files that may be pictures, sorted by path."""
        return find_pictures(self.listing)

    @cached_property
    def splits(self) -> dict[str, Path]:
        """The folder of each split: those named so in `root`, or in the only folder of it that
        holds pictures; `root` is "train" without any.

        Raises:
            Mistake: two folders name one split.
        """
        start = len(os.path.join(self.root, ""))
        paths = [str(picture)[start:].split(os.sep) for picture in self.pictures]
        depth, base = 0, self.root
        while True:
            names = sorted({path[depth] for path in paths if len(path) > depth + 1})
            found = name_splits(names)
            if found or len(names) != 1 or any(len(path) <= depth + 1 for path in paths):
                break
            depth, base = depth + 1, base / names[0]
        for split, named in found.items():
            if len(named) > 1:
                raise Mistake(
                    self.option,
                    f"{' and '.join(named)} in {base} both name the split {split}; rename all but "
                    "one of them, or link the wanted ones into a folder.",
                )
        return {split: base / named[0] for split, named in found.items()} or {"train": self.root}

    @cached_property
    def captions(self) -> dict[Path, str]:
        """Captions of pictures of all splits; warns of those that match none."""
        files = self.listing.files
        captions, notes = find_captions(self.root, self.pictures, files, self.caption_key)
        if notes:
            rank_zero_warn("captions: " + " ".join(notes))
        return captions

    def read(self, name: str) -> Split:
        """Read the usable pictures of a split. All headers are read, and all pixels too if they fit
        into `cache_bytes`.

        Raises:
            Mistake: there is none, or captions cannot be read.
        """
        import datasets

        folder, captions = self.splits[name], self.captions
        files = [file for file in self.pictures if _is_under(file, folder)]
        rows = [{"file": os.fsencode(file)} for file in files]
        found = _each(check_picture, rows, self.image_size)
        num_bytes = [0 if isinstance(f, UnusablePicture) else 3 * f[0] * f[1] for f in found]
        cached = sum(num_bytes) <= self.cache_bytes
        if cached:  # one buffer, shared with worker processes
            places = torch.empty(sum(num_bytes), dtype=torch.uint8).split(num_bytes)
            found = _each(_decode_into, list(zip(rows, places, strict=True)), self.image_size)
        unusable = {
            file: reason
            for file, reason in zip(files, found, strict=True)
            if isinstance(reason, UnusablePicture)
        }
        left_out = self._left_out(name, unusable)
        if len(unusable) == len(files):
            listed = ", ".join(f"{number} {reason}" for reason, number in left_out.most_common(6))
            fail_without_pictures(self.option, len(files), self.image_size, listed)
        _warn_of_skipped(folder, unusable, len(files))
        kept = [i for i, file in enumerate(files) if file not in unusable]
        stems = Counter(file.stem for file in files)
        columns = {
            "file": [rows[i]["file"] for i in kept],
            "caption": [captions.get(files[i], "") for i in kept],
            "name": [_name(files[i], folder, stems) for i in kept],
        }
        num_files = len(files) + sum(left_out.values()) - len(unusable)
        return Split(
            datasets.Dataset.from_dict(columns),
            Origin(f"of {count(num_files, 'file')}", str(folder), left_out),
            [found[i] for i in kept] if cached else None,
        )

    def _left_out(self, name: str, unusable: dict[Path, UnusablePicture]) -> Counter[str]:
        """How many files of a split are not taken, by reason."""
        folder = self.splits[name]
        left_out = Counter(
            _reason(file, error, self.image_size) for file, error in unusable.items()
        )
        for file, reason in self.listing.left_out.items():
            left_out[reason] += _is_under(file, folder)
        for file in self.listing.files:
            is_picture = file.suffix.lower() in PICTURE_SUFFIXES
            if _is_under(file, folder) and not is_picture and not holds_captions(file):
                left_out[file.suffix.lower() or "without suffix"] += 1
        if name == next(iter(self.splits)):
            folders = self.splits.values()
            outside = (not any(_is_under(file, one) for one in folders) for file in self.pictures)
            left_out[f"outside {' and '.join(one.name for one in folders)}"] = sum(outside)
        return +left_out


def _is_under(file: Path, folder: Path) -> bool:
    return str(file).startswith(os.path.join(folder, ""))


def _name(file: Path, folder: Path, stems: Counter[str]) -> str:
    """A sample's name; letters that are no UTF-8 as their codes."""
    inner = file.relative_to(folder).with_suffix("")
    name = file.stem if stems[file.stem] == 1 else "__".join(inner.parts)
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _reason(file: Path, error: UnusablePicture, image_size: int) -> str:
    """A word or two for why a picture is unusable."""
    if isinstance(error, TooSmall):
        return f"below image_size {image_size}"
    if str(error) == "not a picture":
        if file.suffix.lower() in NEED_PLUGINS:
            return file.suffix.lower()
        if is_lfs_pointer(file):
            return "not fetched by Git LFS (run git lfs pull)"
    return "damaged"


def _warn_of_skipped(folder: Path, unusable: dict[Path, UnusablePicture], num_files: int) -> None:
    if unusable:
        listed = [f"{file.relative_to(folder)} ({reason})" for file, reason in unusable.items()]
        more = f", and {len(listed) - 10} more" if len(listed) > 10 else ""
        told = ", ".join(listed[:10]) + more
        rank_zero_warn(f"{len(listed)} of {num_files} pictures in {folder} skipped: {told}.")


def _decode_into(row_and_place: tuple[dict[str, Any], Tensor], image_size: int) -> Tensor:
    row, place = row_and_place
    picture = decode(row, image_size)
    return place.copy_(picture.flatten()).view(picture.shape)


def _each(read: Callable[..., Any], arguments: Sequence[Any], image_size: int) -> list[Any]:
    """Map `read` over the arguments in threads; unusable pictures yield their error."""

    def attempt(argument: Any) -> Any:
        try:
            return read(argument, image_size)
        except UnusablePicture as reason:
            return reason

    # A header is read in less time than it takes to hand it to a thread.
    parts = [arguments[i : i + 32] for i in range(0, len(arguments), 32)]
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda part: [attempt(argument) for argument in part], parts)
        return [result for part in done for result in part]
