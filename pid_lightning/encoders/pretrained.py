"""What encoders share: finding pretrained weights, or random ones on purpose, and input checks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def find_weights(path: str) -> Path:
    """The weights file at `path`, or in the folder at `path`.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(os.path.expanduser(path))
    if place.is_file():
        return place
    for name in WEIGHT_FILES:
        if (place / name).is_file():
            return place / name
    what = f"holds none of {', '.join(WEIGHT_FILES)}" if place.is_dir() else "does not exist"
    raise FileNotFoundError(f"{path} {what}: give a weights file or the folder that holds it.")


def unreachable_weights(what: str, cure: str, reason: Exception | None) -> OSError:
    """The error for weights that are not available."""
    return OSError(
        f"The weights of {what} are not available ({first_line(reason)}): connect to the hub (and "
        f"log in where the licence requires it), or set {cure}, or set pretrained: false to run "
        "with random weights on purpose."
    )


@contextmanager
def random_weights() -> Iterator[None]:
    """Give networks built inside the same random weights every time.

    Checkpoints do not hold encoders, so a random one must be reproducible.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the forked one: the global state is restored
        yield


def warn_random_weights(what: str) -> None:
    """Warn that an encoder's latents are meaningless."""
    warnings.warn(
        f"pretrained: false gives the {what} random weights: its latents carry no meaning, which "
        "is good for trying things out only.",
        stacklevel=3,
    )


def first_line(error: BaseException | None) -> str:
    """First sentence of an error's root cause, at most 160 characters, to quote in a message."""
    while error is not None and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:160].rstrip(".: ")


def check_loaded(network: nn.Module, inputs: Tensor | None, name: str) -> None:
    """Raise RuntimeError if a network without weights (on the meta device) is to compute."""
    if next(network.parameters()).is_meta and not (inputs is not None and inputs.is_meta):
        raise RuntimeError(f"The encoder {name!r} has no weights yet: call load() first.")


def check_images(images: Tensor, stride: int) -> None:
    """Raise ValueError unless images are (B, 3, H, W) with sides that are multiples of stride."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"Images of shape {tuple(images.shape)} are not (B, 3, H, W); give RGB, channels first."
        )
    height, width = images.shape[-2:]
    if height % stride or width % stride or not height or not width:
        raise ValueError(
            f"Pictures of {height} x {width} pixels do not fit this encoder: both sides must be "
            f"multiples of {stride}; crop or pad them."
        )
