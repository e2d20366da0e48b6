"""Tables of pictures: parquet files, saved data sets, data sets of the Hugging Face hub."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pid_lightning.checks import Mistake
from pid_lightning.files.folders import Listing, is_lfs_pointer
from pid_lightning.training.data.captions import CAPTION_KEYS
from pid_lightning.training.data.splits import SPLIT_WORDS, Origin, Split, count, name_splits

if TYPE_CHECKING:
    import datasets

SAVED = ("dataset_dict.json", "state.json")  # by `save_to_disk`
TEXTS = ("string", "large_string", "string_view")
BYTES = ("binary", "large_binary", "binary_view", "PIL.Image.Image")  # the last: `datasets.Image`


@dataclass
class Table:
    """Rows with any columns, and the path and files that hold them."""

    rows: datasets.Dataset | datasets.IterableDataset
    where: str
    left_out: Counter[str]

    def split(self, image_column: str, caption_column: str | None) -> Split:
        """The rows with columns "image" and, if there is one, "caption"; pictures stay encoded.

        Args:
            image_column: holds encoded pictures or their paths, whatever they are nested in.
            caption_column: holds texts or lists of texts; None takes the first of `CAPTION_KEYS`
                that does.

        Raises:
            Mistake: a named column is missing, or holds something else.
        """
        rows = self.rows
        columns = rows.column_names or list(next(iter(rows), {}))
        kinds = rows.features or {}  # a stream may not know them
        if caption_column is None:
            usual = (key for key in CAPTION_KEYS if _holds(kinds.get(key), TEXTS))
            caption_column = next(usual, None)
        names = {image_column: "image", **({caption_column: "caption"} if caption_column else {})}
        for column, name in names.items():
            accepted = (*TEXTS, "null") if name == "caption" else (*TEXTS, *BYTES)
            if column not in columns or (kinds and not _holds(kinds[column], accepted)):
                found = f"holds {kinds[column]}" if column in kinds else "is none"
                raise Mistake(
                    f"data.{name}_column",
                    f"{self.where} has no {name}s in {column!r}, which {found}; choose from "
                    f"{columns}.",
                )
        if kinds:  # first: any other step on a stream of decoded pictures would compress them again
            rows = rows.cast_column(image_column, _undecoded(kinds[image_column]))
        rows = rows.select_columns(list(names))
        rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
        of = f"of a stream, with{'' if caption_column else 'out'} captions"
        if hasattr(rows, "select"):
            of = f"of {count(len(rows), 'row')}"
        return Split(rows, Origin(of, self.where, self.left_out))


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` has written a folder."""
    return any(os.path.isfile(folder / name) for name in SAVED)


def find_parquet(listing: Listing) -> list[Path]:
    """The parquet files of a folder, but for metadata of its pictures."""
    files = [file for file in listing.files if file.suffix.lower() == ".parquet"]
    return [file for file in files if file.name.lower() != "metadata.parquet"]


def open_saved(option: str, folder: Path, streaming: bool) -> dict[str, Table]:
    """Open what `save_to_disk` has written, by splits.

    Raises:
        Mistake: it is damaged.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # damage leads it to nearly any
        raise Mistake(option, f"{folder} is no intact data set ({_line(error)}).") from error
    splits = saved if isinstance(saved, dict) else {"train": saved}
    splits = {name: rows.with_format(None) for name, rows in splits.items()}
    if streaming:
        splits = {name: rows.to_iterable_dataset() for name, rows in splits.items()}
    return _by_split(splits, str(folder), Counter())


def open_parquet(
    option: str, path: str, files: Sequence[Path], streaming: bool
) -> dict[str, Table]:
    """Open parquet files, by the splits that their names say, or those of their folders.

    Raises:
        Mistake: none of them can be read, or they do not fit together.
    """
    import datasets

    unusable = {file: reason for file in files if (reason := _unusable(file))}
    left_out = Counter(unusable.values())
    usable = [file for file in files if file not in unusable]
    if not usable:
        listed = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        raise Mistake(option, f"{path} has no parquet file with rows ({listed}); take other files.")
    splits = _parquet_splits(usable)
    num_outside = len(usable) - sum(map(len, splits.values()))
    if num_outside:
        left_out[f"files outside {' and '.join(splits)}"] = num_outside
    data_files = {name: [glob.escape(str(f)) for f in split] for name, split in splits.items()}
    try:
        tables = datasets.load_dataset("parquet", data_files=data_files, streaming=streaming)
    except Exception as error:  # of foreign tables, nearly any
        raise Mistake(
            option, f"the parquet files of {path} cannot be read together ({_line(error)})."
        ) from error
    return _by_split(tables, path, left_out)


def open_hub(option: str, name: str, streaming: bool) -> dict[str, Table]:
    """Open an owner/name data set of the Hugging Face hub.

    Raises:
        Mistake: it is not available.
    """
    import datasets

    try:
        tables = datasets.load_dataset(name, streaming=streaming)
    except Exception as error:
        raise Mistake(
            option,
            f"{name!r} is neither here nor an available data set of the Hugging Face hub; check "
            f"the path, or the network ({_line(error)}).",
        ) from error
    return _by_split(tables, name, Counter())


def _by_split(tables: dict[str, Any], where: str, left_out: Counter[str]) -> dict[str, Table]:
    tables = {SPLIT_WORDS.get(name.lower(), name): rows for name, rows in tables.items()}
    if len(tables) == 1 and tables.keys().isdisjoint(SPLIT_WORDS.values()):
        tables = {"train": next(iter(tables.values()))}
    return {name: Table(rows, where, left_out) for name, rows in tables.items()}


def _parquet_splits(files: Sequence[Path]) -> dict[str, list[Path]]:
    for names in ([f.stem for f in files], [f.parent.name for f in files]):
        found = name_splits(names)
        if found and len(files) > 1:
            pairs = list(zip(files, names, strict=True))
            return {
                split: [file for file, name in pairs if name in named]
                for split, named in found.items()
            }
    return {"train": list(files)}


def _unusable(file: Path) -> str:
    """Why a parquet file is not taken; "" if it is."""
    from pyarrow import parquet

    try:
        with open(file, "rb") as content:
            return "" if parquet.read_metadata(content).num_rows else "empty"
    except PermissionError:
        raise  # the file may be whole
    except Exception:  # of damaged footers, nearly any
        return "not fetched by Git LFS (run git lfs pull)" if is_lfs_pointer(file) else "damaged"


def _holds(kind: Any, accepted: tuple[str, ...]) -> bool:
    """Whether a type is accepted, or a list or struct of one; lists of numbers pass for bytes."""
    if isinstance(kind, dict):
        return "binary" in accepted and any(_holds(part, accepted) for part in kind.values())
    inner = getattr(kind, "feature", None)
    if inner is None:
        return getattr(kind, "dtype", None) in accepted
    is_bytes = "binary" in accepted and getattr(inner, "dtype", "").startswith(("int", "uint"))
    return is_bytes or _holds(inner, accepted)


def _undecoded(kind: Any) -> Any:
    """The same type, but for pictures that would be decoded."""
    import datasets

    if isinstance(kind, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(kind, dict):
        return {name: _undecoded(part) for name, part in kind.items()}
    if hasattr(kind, "feature"):
        return replace(kind, feature=_undecoded(kind.feature))
    return kind


def _line(error: Exception) -> str:
    """The first words of an error, or of its cause where `datasets` hides it."""
    words = str(error.__cause__ or error).split()
    return " ".join(words)[:200].rstrip(".") or type(error).__name__
