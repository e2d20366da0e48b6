"""Pictures and latents named on a command line: finding and reading them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from pid_lightning.files.tensors import read_tensors
from pid_lightning.pictures.files import PICTURE_SUFFIXES

LATENTS_SUFFIX = ".safetensors"


def find_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """Collect picture and latent files (``.safetensors``) from files and folders, sorted by path.

    Subfolders and hidden files are skipped.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no input, a file is of an unknown kind, nothing was named, or
            two inputs share a name (outputs are named after inputs).
    """
    found: dict[Path, Path] = {}
    for name in paths:
        if not str(name):
            raise ValueError("input: an empty name was given; name a picture, file or folder.")
        path = Path(os.path.expanduser(name))
        files = [path]
        if path.is_dir():
            files = [file for file in path.iterdir() if file.is_file() and _is_input(file)]
        elif not path.exists():
            raise FileNotFoundError(f"input {path} does not exist: check the path.")
        elif not _is_input(path):
            raise ValueError(
                f"input {path} is neither a picture ({', '.join(PICTURE_SUFFIXES)}) nor a "
                f"{LATENTS_SUFFIX} file of latents, or it is hidden (its name begins with a dot)."
            )
        if not files:
            raise ValueError(
                f"folder {path} holds no picture ({', '.join(PICTURE_SUFFIXES)}) and no "
                f"{LATENTS_SUFFIX} file of latents (subfolders are not searched)."
            )
        found.update({file.resolve(): file for file in files})
    if not found:
        raise ValueError("no input was named: give at least one picture, latent file or folder.")
    inputs = sorted(found.values())
    by_name: dict[str, Path] = {}
    for file in inputs:
        twin = by_name.setdefault(file.stem, file)
        if twin is not file:
            raise ValueError(
                f"inputs {twin} and {file} would both be written as {file.stem}: rename one, or "
                "decode them separately."
            )
    return inputs


def _is_input(path: Path) -> bool:
    known = (*PICTURE_SUFFIXES, LATENTS_SUFFIX)
    return path.suffix.lower() in known and not path.name.startswith(".")


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
