"""Pictures and latents named on a command line: finding and reading them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.files.folders import list_files
from pid_lightning.files.tensors import read_tensors
from pid_lightning.pictures.pixels import PICTURE_SUFFIXES

LATENTS_SUFFIX = ".safetensors"
NAME_BYTES = 255  # of a file's name, on most file systems
LONGEST_END = "_sigma0.123456_compare.json"  # of the outputs of a file


def find_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """Collect picture and latent files (``.safetensors``) from files and folders, sorted by path.

    Subfolders and hidden files are skipped.

    Raises:
        Mistake: a path that is no input and no folder of inputs, or two inputs that share a name,
            after which outputs are named.
    """
    found: dict[Path, Path] = {}
    for name in paths:
        path = Path(os.path.expanduser(name))
        listed = list_files(path, deep=False).files if path.is_dir() else [path]
        files = [file for file in listed if _is_input(file)]
        if not files or not str(name):
            raise Mistake(
                "inputs",
                f"{str(name)!r} is no picture ({', '.join(PICTURE_SUFFIXES)}), no {LATENTS_SUFFIX} "
                "file of latents and no folder that holds one; check the path (subfolders are not "
                "searched, and names that begin with a dot are skipped).",
            )
        found.update({file.resolve(): file for file in files})
    inputs = sorted(found.values())
    by_name: dict[str, Path] = {}
    for file in inputs:
        name = output_stem(file)
        twin = by_name.setdefault(name, file)
        if twin is not file:
            raise Mistake(
                "inputs",
                f"{twin} and {file} would both be written as {name}; rename one, or decode "
                "them separately.",
            )
    return inputs


def output_stem(file: Path) -> str:
    """What a file's outputs are named after: its name without suffix, shortened where a file system
    would not take theirs."""
    name = os.fsencode(file.stem)
    if len(name) + len(LONGEST_END) <= NAME_BYTES:
        return file.stem
    kept = name[: NAME_BYTES - len(LONGEST_END) - 9].decode("utf-8", "ignore")
    return f"{kept}-{hashlib.sha256(name).hexdigest()[:8]}"


def _is_input(path: Path) -> bool:
    known = (*PICTURE_SUFFIXES, LATENTS_SUFFIX)
    return path.suffix.lower() in known and not path.name.startswith(".") and path.is_file()


def read_latents(path: Path, latent_space: str, channels: int) -> Tensor:
    """Read normalised latents (C, h, w) from a .safetensors file, as float32.

    Args:
        path: holds exactly one finite tensor "latents" of shape (C, h, w) or (1, C, h, w).
        latent_space: its name, for the message.
        channels: C.

    Raises:
        Mistake: the file holds something else.
    """
    try:
        tensors = read_tensors(path)
    except OSError as error:
        raise Mistake("inputs", f"{path} cannot be read ({error.strerror or error}).") from error
    holds = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
    latents = tensors.pop("latents", Tensor()).float()
    latents = latents.squeeze(0) if latents.ndim == 4 else latents
    fits = latents.ndim == 3 and len(latents) == channels and latents.numel()
    if tensors or not fits or not latents.isfinite().all():
        raise Mistake(
            "inputs",
            f"{path} holds {holds[:100]}; save one finite tensor named latents, ({channels}, h, w) "
            f"or (1, {channels}, h, w), of normalised {latent_space} latents (a model goes to "
            "--model).",
        )
    return latents
