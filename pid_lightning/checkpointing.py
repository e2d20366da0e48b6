"""Checkpoints on disk: written whole under another name, then moved, so that none is ever lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from pid_lightning.pictures import replaced_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves to a temporary file in the same folder, flushes it to the disk and renames it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; on failure what stood at `path` before stands there still.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
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


def find_last_checkpoint(run_family: Path) -> Path | None:
    """The newest `last.ckpt` under the versions of a run, e.g. of `runs/quickstart`."""
    found = run_family.glob("version_*/checkpoints/last.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
