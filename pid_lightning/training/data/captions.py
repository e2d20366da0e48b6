"""Captions of the pictures of a folder: NAME.txt beside them, metadata.jsonl and metadata.csv."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from pid_lightning.checks import Mistake
from pid_lightning.files.folders import list_files
from pid_lightning.training.data.rows import first_text

CAPTION_KEYS = ("text", "caption", "captions", "prompt", "description")
FILE_KEYS = ("file_name", "filename", "file", "image", "path", "image_path", "filepath", "img")
METADATA = ("metadata.jsonl", "metadata.csv")
TEXT_SUFFIXES = (".caption", ".txt")
MAX_BYTES = 2**20  # of a text
OTHER_TEXTS = ("readme", "license", "licence", "notice", "requirements")  # no captions


def holds_captions(file: Path) -> bool:
    """Whether captions are read from a file of this name."""
    return file.suffix.lower() in TEXT_SUFFIXES or file.name.lower() in METADATA


def captions_beside(pictures: Iterable[Path]) -> list[str]:
    """The captions of pictures or latents in the folders that they are in; "" without one.

    Raises:
        Mistake: see `find_captions`.
    """
    pictures = [Path(os.path.abspath(picture)) for picture in pictures]
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for picture in pictures:
        by_folder[picture.parent].append(picture)
    captions: dict[Path, str] = {}
    for folder, inside in by_folder.items():
        captions |= find_captions(folder, inside, list_files(folder, deep=False).files)[0]
    return [captions.get(picture, "") for picture in pictures]


def find_captions(
    root: Path, pictures: Sequence[Path], files: Sequence[Path], key: str | None = None
) -> tuple[dict[Path, str], list[str]]:
    """Find the captions of pictures.

    NAME.txt beside a picture goes before metadata, and metadata in deeper folders before others.

    Args:
        root: the folder, absolute.
        pictures: under it.
        files: all files under it.
        key: of captions in metadata; None takes the first of `CAPTION_KEYS`.

    Returns:
        The captions, and sentences about those that belong to no picture.

    Raises:
        Mistake: a text is not UTF-8, or a line of metadata no entry.
    """
    captions, notes, unmatched = _of_metadata(root, pictures, files, key)
    texts = _texts(files)
    matched = {picture: text for picture in pictures if (text := _text_of(picture, texts))}
    captions |= {picture: _read_text(text) for picture, text in matched.items()}
    if not captions:
        strays = {file for file in texts.values() if not file.stem.lower().startswith(OTHER_TEXTS)}
        unmatched += sorted(map(str, strays))
    if unmatched:
        notes.append(
            f"{len(unmatched)} captions match no picture, such as that of {unmatched[0]}; texts "
            "are named after their pictures, metadata names them by paths from its own folder."
        )
    return captions, notes


def _texts(files: Iterable[Path]) -> dict[str, Path]:
    """Text files by their paths without suffix, as they are and in composed letters."""
    texts: dict[str, Path] = {}
    for file in files:
        if file.suffix.lower() in TEXT_SUFFIXES:
            stem = os.path.splitext(file)[0]
            texts[stem] = file
            texts.setdefault(normalize("NFC", stem), file)
    return texts


def _text_of(picture: Path, texts: dict[str, Path]) -> Path | None:
    names = (os.path.splitext(picture)[0], str(picture))  # NAME.txt, NAME.png.txt
    composed = (normalize("NFC", name) for name in names)
    return next((texts[name] for name in (*names, *composed) if name in texts), None)


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise Mistake("caption", f"{file} is too long for a caption; shorten or rename it.")
        return file.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Mistake("caption", f"{file} is not UTF-8 text; save it as UTF-8.") from error


def _of_metadata(
    root: Path, pictures: Sequence[Path], files: Sequence[Path], key: str | None
) -> tuple[dict[Path, str], list[str], list[str]]:
    """Captions, sentences about metadata without any, and entries that match no picture."""
    inside = [file for file in files if file.name.lower() in METADATA]
    above = [root.parent / name for name in METADATA]
    above = [file for file in above if file.is_file() and os.access(file, os.R_OK)]
    captions: dict[Path, str] = {}
    notes, unmatched = [], []
    index = _index(pictures) if inside or above else {}
    for file in (*above, *sorted(inside, key=lambda file: len(file.parts))):
        own: dict[Path, str] = {}
        for name, caption in _entries(file, key, lenient=file in above):
            picture = _find(str(file.parent), name, index)
            if picture is not None:
                own.setdefault(picture, caption)
            elif caption and file not in above:
                unmatched.append(f"{name!r} in {file}")
        if own and not any(own.values()):
            notes.append(
                f"{file} has no caption under {key or ', '.join(CAPTION_KEYS)}; give the key of "
                "its captions as data.caption_column, if it has any."
            )
        captions |= {picture: caption for picture, caption in own.items() if caption}
    return captions, notes, unmatched


def _index(pictures: Iterable[Path]) -> dict[str, list[Path]]:
    """Pictures by their paths and names, with and without suffix, in composed letters."""
    index: dict[str, list[Path]] = defaultdict(list)
    for picture in pictures:
        path = normalize("NFC", str(picture))
        name = os.path.basename(path)
        for key in (path, os.path.splitext(path)[0], name, os.path.splitext(name)[0]):
            index[key].append(picture)
    return index


def _find(folder: str, name: str, index: dict[str, list[Path]]) -> Path | None:
    """The picture that an entry of metadata in a folder names: by its path, if need be with another
    suffix; by another path to the file; or, if there is none, the only one so named in the folder.
    """
    name = normalize("NFC", name if "/" in name else name.replace("\\", "/"))
    path = os.path.normpath(os.path.join(normalize("NFC", folder), name))
    for key in (path, os.path.splitext(path)[0]):
        if len(index.get(key, ())) == 1:
            return index[key][0]
    exists = os.path.exists(path)
    for key in (os.path.basename(path), os.path.splitext(os.path.basename(path))[0]):
        alike = [one for one in index.get(key, ()) if str(one).startswith(folder + os.sep)]
        if exists:
            alike = [one for one in alike if os.path.samefile(one, path)]
        if len(alike) == 1:
            return alike[0]
    return None


def _entries(file: Path, key: str | None, lenient: bool) -> Iterator[tuple[str, str]]:
    """File names and captions; of a `lenient` file, which may be about others, those that are."""
    records = _csv_records(file) if file.suffix.lower() == ".csv" else _json_records(file)
    for number, record in records:
        entry = _parse(record, key)
        if entry is not None:
            yield entry
        elif not lenient:
            raise Mistake(
                "caption",
                f"{file}, line {number} is no entry in UTF-8 with the strings {FILE_KEYS[0]!r} "
                f"and, for the caption, {key or CAPTION_KEYS[0]!r}; correct or remove it.",
            )


def _json_records(file: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and values, None for what is no JSON."""
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):  # also of text that is not UTF-8
                yield number, None


def _csv_records(file: Path) -> Iterator[tuple[int, Any]]:
    """The same of a table of comma, semicolon or tab separated values."""
    try:
        text = io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")
        head = text.readline()
        text.seek(0)
        delimiter = next((mark for mark in ",\t;" if mark in head), ",")
        reader = csv.DictReader(text, delimiter=delimiter)
        for record in reader:
            if any(record.values()):  # spreadsheets write empty rows
                yield reader.line_num, record
    except (UnicodeDecodeError, csv.Error):
        yield 1, None


def _parse(record: Any, key: str | None) -> tuple[str, str] | None:
    """File name and caption of a record; None if it is something else."""
    if not isinstance(record, dict):
        return None
    values = {str(name).strip().lower(): value for name, value in record.items()}
    keys = (key.lower(),) if key else CAPTION_KEYS
    name = next((values[key] for key in FILE_KEYS if values.get(key)), None)
    caption = next((values[key] for key in keys if values.get(key)), "")
    caption = first_text(caption) if isinstance(caption, list) else caption
    if not isinstance(name, str) or not isinstance(caption, str):
        return None
    # JSON can spell halves of letters, which no text can hold.
    return name, caption.encode("utf-8", "replace").decode().strip()
