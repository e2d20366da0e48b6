"""Files that appear complete or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LONG_NAME = 230  # bytes; file systems take 255, and a temporary file's name is longer


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

    If the block raises, the temporary file is removed and `path` stays as it was; what a process
    that was killed left for `path` is removed first. Missing folders are created; `~` is the home
    folder.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = Path(os.path.expanduser(path))
    name = path.name if len(os.fsencode(path.name)) < LONG_NAME else path.name[-40:]
    temporary = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{glob.escape(name)}.*.tmp"):
            with locked(stale) as is_ours:
                if is_ours:
                    stale.unlink(missing_ok=True)
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
def locked(path: Path) -> Iterator[bool]:
    """Hold a file, which is made if it is missing, as long as this process lives; yields whether no
    other process held it. Where a system has no such locks, nobody does."""
    with open(path, "ab") as file:
        if fcntl is None:
            yield True
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks
            yield True
        else:
            yield True
