"""What `pid predict` decodes: one sample per picture or latent file, with its caption."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from pid_lightning.pictures.inputs import find_inputs
from pid_lightning.training.data.captions import captions_beside


class PredictionInputs(Dataset[dict[str, str | int]]):
    """Pictures and latents to decode, sorted by path.

    An item is {"path": the file, "caption": from NAME.txt next to it, else "", "number": its
    index}.

    Args:
        paths: files and folders, see `pid_lightning.pictures.inputs.find_inputs`.

    Raises:
        Mistake: a path that is no input, or two inputs that share a name, or a caption
            that is no text.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.files: list[Path] = find_inputs(paths)
        self.named: set[Path] = {Path(os.path.expanduser(path)) for path in paths}
        self.captions: list[str] = captions_beside(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, str | int]:
        path, caption = str(self.files[index]), self.captions[index]
        return {"path": path, "caption": caption, "number": index}
