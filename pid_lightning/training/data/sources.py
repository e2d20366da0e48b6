"""Source: what a path stands for, a folder of pictures or tables, and its splits."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from pid_lightning.checks import Mistake
from pid_lightning.files import ASSETS
from pid_lightning.files.folders import Listing, list_files
from pid_lightning.training.data.folders import PictureFolder, find_pictures
from pid_lightning.training.data.splits import Split
from pid_lightning.training.data.tables import (
    Table,
    find_parquet,
    is_saved,
    open_hub,
    open_parquet,
    open_saved,
)

BUNDLED_PHOTOS = ASSETS / "photos"


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
        root = BUNDLED_PHOTOS if path == "bundled" else Path(os.path.abspath(path))
        is_folder = bool(path) and os.path.isdir(root)
        listing = list_files(root) if is_folder else Listing()
        tables = self._find_tables(path, root, listing)
        if tables is not None:
            columns = (self.image_column, self.caption_column)
            return {name: partial(table.split, *columns) for name, table in tables.items()}
        if not is_folder or self.streaming:
            raise Mistake(
                self.option,
                f"{path!r} is no {'' if self.streaming else 'folder of pictures, no '}parquet file "
                "and no available data set of the Hugging Face hub; check the path.",
            )
        sizes = (self.image_size, self.cache_bytes)
        folder = PictureFolder(self.option, root, listing, *sizes, self.caption_column)
        return {name: partial(folder.read, name) for name in folder.splits}

    def _find_tables(self, path: str, root: Path, listing: Listing) -> dict[str, Table] | None:
        """The tables that a path stands for, by splits; None if it stands for something else."""
        if is_saved(root):
            return open_saved(self.option, root, self.streaming)
        if listing.files:
            parquet = find_parquet(listing)
            beside = any(file.parent == root for file in parquet)
            # A clone of the hub's holds a card, and may hold pictures for it.
            is_clone = (root / "README.md").is_file() or not find_pictures(listing)
            files = parquet if beside or is_clone else []
        else:
            found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            listings = [
                list_files(one) if os.path.isdir(one) else Listing([Path(one)]) for one in found
            ]
            files = [file for one in listings for file in find_parquet(one) if file.is_file()]
        if files:
            return open_parquet(self.option, path, files, self.streaming)
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).parent.exists():
            return open_hub(self.option, path, self.streaming)
        return None
