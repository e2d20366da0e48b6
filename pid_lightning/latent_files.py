"""Latents in files: one tensor named "latents" in a `.safetensors`."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_latents(path: Path) -> Tensor:
    """Normalised latents (C, h, w), float32, of a .safetensors file.

    Raises:
        ValueError: the file is damaged, holds anything but one tensor "latents" of shape (C, h, w)
            or (1, C, h, w), or that tensor is not finite.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as latents ({error}): write it again.") from error
    if list(tensors) != ["latents"]:
        raise ValueError(
            f"{path} holds the tensors {sorted(tensors)}: a file of latents holds one, named "
            "'latents'."
        )
    latents = tensors["latents"].float()
    shape = tuple(latents.shape)
    if len(shape) == 4 and shape[0] == 1:
        latents = latents[0]
    if latents.ndim != 3 or latents.numel() == 0:
        raise ValueError(
            f"{path}: its latents are {shape}, give (C, h, w) or (1, C, h, w), one file a picture."
        )
    if not latents.isfinite().all():
        raise ValueError(f"{path}: its latents are not all finite, write them again.")
    return latents
