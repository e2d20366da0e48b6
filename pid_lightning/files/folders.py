"""Which files a folder holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Thumbnails and forks that storage boxes and archives leave beside pictures.
NOT_OURS = ("__MACOSX", "@eaDir")


@dataclass
class Listing:
    """The regular files of a folder.

    Attributes:
        files: sorted by path.
        left_out: why others, and folders, are not read.
    """

    files: list[Path] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)


def list_files(folder: str | Path, deep: bool = True) -> Listing:
    """List the files of a folder, and with `deep` of the folders in it.

    Names that begin with a dot are skipped. A link to a file is a file. Links to folders are
    followed, and no folder is entered twice, however many links lead to it.

    Raises:
        OSError: the folder itself cannot be read.
    """
    listing, paths, seen = Listing(), [], set()
    folders, linked = [os.fspath(folder)], []
    while folders or linked:  # links last, so that a folder is known by its own name if it has one
        current = folders.pop() if folders else linked.pop(0)
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(current) as scanned:
                entries = [entry for entry in scanned if not entry.name.startswith(".")]
        except OSError:
            if not seen or current == os.fspath(folder):
                raise
            listing.left_out[Path(current)] = "unreadable"
            continue
        for entry in entries:
            if _is(entry.is_dir):
                if deep and entry.name not in NOT_OURS:
                    (linked if entry.is_symlink() else folders).append(entry.path)
            elif _is(entry.is_file):
                paths.append(entry.path)
            else:
                is_there = os.path.exists(entry.path)
                listing.left_out[Path(entry.path)] = "not regular" if is_there else "broken"
    listing.files = [Path(path) for path in sorted(paths, key=lambda path: path.split(os.sep))]
    return listing


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file only says which file Git LFS would fetch in its place."""
    with open(file, "rb") as content:
        return content.read(24) == b"version https://git-lfs."


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # links that lead to themselves
        return False
