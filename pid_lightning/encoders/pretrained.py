"""Weights of the encoders: where to find them, or random ones on purpose."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def find_weights(option: str, path: str) -> Path:
    """The weights file at the path that an option names, or in the folder at that path.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(os.path.expanduser(path))
    for file in (place, *(place / name for name in WEIGHT_FILES)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{option}: {path} is no file, nor a folder with one of {', '.join(WEIGHT_FILES)}; give a "
        "weights file or the folder that holds it."
    )


@contextmanager
def reaching(what: str, cure: str) -> Iterator[None]:
    """Say how to mend it if the weights that are loaded inside are not available, or damaged.

    Raises:
        OSError: they are not.
    """
    try:
        yield
    except Exception as error:  # libraries raise whatever a foreign folder leads them to
        raise OSError(
            f"The weights of {what} are not available ({first_line(error)}): connect to the hub "
            f"(and log in where the licence requires it), or {cure}."
        ) from error


@contextmanager
def building(what: str, pretrained: bool) -> Iterator[None]:
    """Build networks inside: on the meta device if weights follow, else with random ones, and warn.

    Those are the same every time, because checkpoints do not hold encoders.
    """
    if pretrained:
        with torch.device("meta"):
            yield
        return
    warnings.warn(
        f"pretrained: false gives the {what} random weights: its latents carry no meaning, which "
        "is good for trying things out only.",
        stacklevel=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the forked one: the global state is restored
        yield


def first_line(error: BaseException | None) -> str:
    """First sentence of an error's root cause, at most 160 characters, to quote in a message."""
    while error is not None and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:160].rstrip(".: ")
