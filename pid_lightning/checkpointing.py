"""Training checkpoints on disk: written to a temporary name, flushed, then moved into place."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from pid_lightning.files.atomic import replaced_file
from pid_lightning.files.tensors import read_torch_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O that never leaves a partial file and never unpickles code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; on failure the file that was at `path` before stays intact.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = Path(path)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            stale.unlink(missing_ok=True)  # left by a process that was killed while saving
        with replaced_file(path) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # a full disk
                raise OSError(error) from error
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, or is not a checkpoint.
        """
        return read_torch_file(path, mapped=False)
