"""What `pid predict` decodes: one sample per picture or latent file, with its caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from pid_lightning.pictures.files import read_picture
from pid_lightning.pictures.inputs import LATENTS_SUFFIX, find_inputs, read_latents
from pid_lightning.training.data.sources import caption_beside


class PredictionInputs(Dataset):
    """Pictures and latents to decode, sorted by path.

    An item is {"image": (3, H, W) in [-1, 1]} or {"latents": (C, h, w)}, both float32, plus
    "caption" (from NAME.txt next to the file, else ""), "name" (the file's stem), "path" and
    "number" (its index, which determines the noise together with the seed). Sizes differ, so each
    item is a batch of its own.

    `latent_shapes` holds the shape (C, h, w) of each file of latents.

    Args:
        paths: files and folders, see `pid_lightning.pictures.inputs.find_inputs`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: an input is damaged or of an unknown type, or two share a name.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.files = find_inputs(paths)
        self.latent_shapes: dict[Path, torch.Size] = {}
        for index, file in enumerate(self.files):  # find damaged files now, not hours into the run
            item = self[index]
            if "latents" in item:
                self.latent_shapes[file] = item["latents"].shape

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        is_latents = file.suffix.lower() == LATENTS_SUFFIX
        return {
            **({"latents": read_latents(file)} if is_latents else {"image": read_picture(file)}),
            "caption": caption_beside(file) or "",
            "name": file.stem,
            "path": str(file),
            "number": index,
        }
