"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

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

    If the block raises, the temporary file is removed and `path` stays as it was. Missing folders
    are created; `~` is the home folder.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = Path(os.path.expanduser(path))
    name = path.name if len(os.fsencode(path.name)) < LONG_NAME else path.name[-40:]
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # some writers create files readable by their owner only
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
