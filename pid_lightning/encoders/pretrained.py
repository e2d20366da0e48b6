"""Pretrained weights: found, read strictly, or one sentence that says what is missing."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
    """The weights file that `path` is, or that the folder `path` holds.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    for name in WEIGHT_FILES:
        if (place / name).is_file():
            return place / name
    what = f"holds none of {', '.join(WEIGHT_FILES)}" if place.is_dir() else "does not exist"
    raise FileNotFoundError(f"{path} {what}: give a weights file or the folder that holds it.")


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or (weights only) torch file, on the CPU.

    Args:
        path: the file.
        prefix: where some names start with it, only those are read, without it: a text tower
            beside the wanted part never takes memory.

    Raises:
        ValueError: the file is damaged or holds no dictionary of tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt", device="cpu") as file:
                names = _names_under(prefix, file.keys())
                return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read as weights ({first_line(error)}): fetch the file again."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors.")
    return {name.removeprefix(prefix): tensors[name] for name in _names_under(prefix, tensors)}


def _names_under(prefix: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    chosen = [name for name in names if name.startswith(prefix)]
    return chosen or names


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: str, cure: str) -> None:
    """Load every tensor of a (meta) network, in the network's dtype, or none.

    Args:
        network: what takes the tensors, without copying them.
        tensors: names to values.
        source: where they come from, for the sentence.
        cure: what to do where they do not fit, for the sentence.

    Raises:
        ValueError: tensors are missing, left over, or of another shape.
    """
    own = network.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise ValueError(
            f"The weights of {source} are not those of this network: {len(wrong)} tensors are "
            f"missing, left over or of another shape, the first {wrong[0]!r}: {cure}."
        )
    tensors = {name: value.to(own[name].dtype) for name, value in tensors.items()}
    network.load_state_dict(tensors, strict=True, assign=True)


def unreachable_weights(what: str, cure: str, reason: Exception | None) -> OSError:
    """The one sentence for weights that cannot be had."""
    return OSError(
        f"The weights of {what} cannot be had ({first_line(reason)}): connect to the hub (and log "
        f"in where the licence asks for it), or set {cure}, or set "
        "pretrained: false to run with random weights on purpose."
    )


@contextmanager
def random_weights() -> Iterator[None]:
    """Networks built inside get the same random weights every time, whatever was drawn before.

    No checkpoint holds an encoder: a random one has to be drawn again to be the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the forked one: afterwards all is as before
        yield


def warn_random_weights(what: str) -> None:
    """Say that an encoder means nothing, once, where it is built."""
    warnings.warn(
        f"pretrained: false gives the {what} random weights: its latents carry no meaning, which "
        "is good for trying things out only.",
        stacklevel=3,
    )


def first_line(error: BaseException | None) -> str:
    """First sentence of an error's first cause, at most 160 characters, to quote in another."""
    while error is not None and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:160].rstrip(".: ")


def check_loaded(network: nn.Module, inputs: Tensor | None, name: str) -> None:
    """Raise RuntimeError where a network still on the meta device is asked for numbers."""
    if next(network.parameters()).is_meta and not (inputs is not None and inputs.is_meta):
        raise RuntimeError(f"The encoder {name!r} has no weights yet: call load() first.")


def check_images(images: Tensor, stride: int) -> None:
    """Raise ValueError unless images are (B, 3, H, W) with sides that are multiples of stride."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Images of shape {tuple(images.shape)} are not (B, 3, H, W).")
    height, width = images.shape[-2:]
    if height % stride or width % stride or not height or not width:
        raise ValueError(
            f"Pictures of {height} x {width} pixels do not fit this encoder: both sides must be "
            f"multiples of {stride}."
        )
