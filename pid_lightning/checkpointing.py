"""Checkpoints on disk: written whole under another name, then moved, so that none is ever lost."""

from __future__ import annotations

import glob
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from pid_lightning.pictures import replaced_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves to a temporary file in the same folder, flushes it to the disk and renames it; loads
    plain values and tensors only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; on failure what stood at `path` before stands there still.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            stale.unlink(missing_ok=True)  # of a process that was killed while it saved
        try:
            with replaced_file(path) as temporary, open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise OSError(
                f"{path} could not be saved ({error}): free space or choose another folder; the "
                "previous checkpoint is intact."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """A checkpoint, on the CPU.

        Raises:
            ValueError: the file is cut short, or no checkpoint.
        """
        return read_checkpoint(path)


def read_checkpoint(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """A checkpoint of any Lightning run, on the CPU.

    Args:
        path: the file.
        mapped: leave the tensors in the file until they are used, to look at the rest at once.

    Raises:
        ValueError: the file is cut short, or no checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(
            f"ckpt_path: {path} cannot be read, it is cut short or no checkpoint; take another one."
        ) from error


def find_last_checkpoint(run_family: Path) -> Path | None:
    """The newest checkpoint under the versions of a run, e.g. of `runs/quickstart`.

    That is a `last.ckpt`, but where a run was killed before it could write one beside another.
    """
    found = run_family.glob("version_*/checkpoints/*.ckpt")
    return max(found, key=lambda path: (path.stat().st_mtime, path.name), default=None)
