"""What `pid predict` decodes: one sample a picture or latent file, with the caption beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from pid_lightning.latent_files import read_latents
from pid_lightning.pictures import LATENTS_SUFFIX, find_inputs, read_picture
from pid_lightning.sources import caption_beside


class PredictionInputs(Dataset):
    """Pictures and latents to decode, sorted by path.

    An item is {"image": (3, H, W) in [-1, 1]} or {"latents": (C, h, w)}, both float32, and
    "caption" (NAME.txt beside the file, else ""), "name" (the file's stem), "path" and "number"
    (its place, which with the seed decides the noise). Sizes differ: one item makes a batch.

    Args:
        paths: files and folders, see `pid_lightning.pictures.find_inputs`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: an input is damaged or of no known kind, or two share a name.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.files = find_inputs(paths)
        for index in range(len(self)):  # a damaged last file shall not be found after hours
            self[index]

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
