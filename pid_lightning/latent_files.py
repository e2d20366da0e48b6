"""Reading latents from `.safetensors` files with one tensor named "latents"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pid_lightning.files.tensors import read_tensors


def read_latents(path: Path) -> Tensor:
    """Read normalised latents (C, h, w) from a .safetensors file, as float32.

    Raises:
        ValueError: the file is damaged, or does not hold exactly one finite tensor "latents" of
            shape (C, h, w) or (1, C, h, w).
    """
    tensors = read_tensors(path)
    if list(tensors) != ["latents"]:
        raise ValueError(
            f"{path} holds {len(tensors)} tensor(s), the first named {min(tensors, default='')!r}; "
            "save exactly one, named 'latents' (a model goes to --model)."
        )
    latents = tensors["latents"].float()
    shape = tuple(latents.shape)
    if len(shape) == 4 and shape[0] == 1:
        latents = latents[0]
    if latents.ndim != 3 or latents.numel() == 0:
        raise ValueError(
            f"{path}: latents of shape {shape} must be (C, h, w) or (1, C, h, w); save one file "
            "per picture."
        )
    if not latents.isfinite().all():
        raise ValueError(f"{path}: the latents are not all finite; write them again.")
    return latents


def check_channels(path: Path, shape: Sequence[int], latent_space: str, channels: int) -> None:
    """Raise ValueError unless a file's latents (C, h, w) have the channels of a latent space."""
    if shape[0] != channels:
        raise ValueError(
            f"{path}: its latents have {shape[0]} channels, but {latent_space} latents have "
            f"{channels}; give latents of the model's own family."
        )
