"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LONG_NAME = 230  # bytes; file systems take 255, and a temporary file's name is longer
TEMPORARY = ".*.*-" + "[0-9a-f]" * 6 + ".tmp"  # of `_beside`
FRESH = 2  # seconds; some writers move a file of their own, not locked, to the temporary name


def make_folder(option: str, folder: str | Path) -> None:
    """Make the folder that an option names and write to it, before any work.

    Raises:
        OSError: it has no name, cannot be made, or not be written to.
    """
    path = os.path.expanduser(folder)
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(
            f"{option}: cannot write to folder {path} ({error.strerror}); name another one."
        ) from error


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` if the block succeeds.

    If the block raises, the temporary file is removed and `path` stays as it was; what processes
    that were killed left in its folder is removed first. Missing folders are created; `~` is the
    home folder.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = Path(os.path.expanduser(path))
    temporary = _beside(path, f"{os.getpid()}-{secrets.token_hex(3)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(TEMPORARY):
            _remove_stale(stale)
        with locked(temporary):
            mode = temporary.stat().st_mode  # some writers create files readable by their owner
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}): free space or choose another folder; what was "
            "there before is intact."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a name that this process is about to write, also against processes that write it at the
    same time; yields whether no other process held it."""
    claim = _beside(path, "0-000000")
    with locked(claim) as is_ours:
        try:
            yield is_ours
        finally:
            if is_ours:
                claim.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, unknown: bool = True) -> Iterator[bool]:
    """Hold a file, which is made if it is missing, as long as this process lives.

    Yields:
        whether no other process held it or removed it; `unknown` where a system has no such locks.
    """
    if fcntl is None:  # nor can an open file be moved or removed there
        path.touch()
        yield unknown
        return
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        except OSError:  # a file system without locks
            is_ours = unknown
        yield is_ours


def _remove_stale(temporary: Path) -> None:
    with suppress(OSError):  # gone by now, or of another user
        if time.time() - temporary.stat().st_mtime > FRESH:
            with locked(temporary, unknown=False) as is_ours:
                if is_ours:
                    temporary.unlink()


def _beside(path: Path, end: str) -> Path:
    name = path.name if len(os.fsencode(path.name)) < LONG_NAME else path.name[-40:]
    return path.with_name(f".{name}.{end}.tmp")
