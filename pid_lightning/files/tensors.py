"""Read tensors from files without running code, and load them strictly."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pid_lightning.checks import Mistake


def check_regular(path: str | Path) -> None:
    """Raise `Mistake` for a folder, a pipe or a device, which would be waited for without end.

    Raises:
        OSError: no such file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Mistake("path", f"{path} is no regular file; name one.")


def read_torch_file(path: str | Path, mapped: bool = True) -> Any:
    """Read what `torch.save` wrote to the CPU; only tensors and plain values are unpickled.

    Args:
        path: the file.
        mapped: memory-map the tensors instead of reading them at once.

    Raises:
        OSError: no such file.
        Mistake: the file is truncated, is not a torch file, or asks for code to be run.
    """
    check_regular(path)
    with open(path, "rb") as file:
        mapped = mapped and zipfile.is_zipfile(file)  # torch's older format cannot be mapped
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # the unpickler raises whatever a foreign file leads it to
        raise Mistake(
            "path",
            f"{path} cannot be read: it is truncated, is not a torch file, or asks for code to be "
            "run (nothing of it was executed); take another copy.",
        ) from error


@contextmanager
def opened_safetensors(path: str | Path) -> Iterator[safe_open]:
    """Open a ``.safetensors`` file, whose `metadata` and `get_tensor` read only what is asked for.

    Raises:
        OSError: no such file.
        Mistake: the file is damaged.
    """
    check_regular(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise Mistake(
            "path",
            f"{path} cannot be read: it is truncated or not a safetensors file ({error}); take "
            "another copy.",
        ) from error


def read_tensors(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` or torch file to the CPU.

    Args:
        path: the file. A torch file may wrap its tensors in ``state_dict`` or ``model``.
        prefix: if any name starts with it, read only those tensors and strip the prefix; a text
            tower next to the wanted image tower then takes no memory.

    Raises:
        OSError: no such file.
        Mistake: the file is damaged, or holds no dictionary of tensors.
    """
    if Path(path).suffix.lower() == ".safetensors":
        with opened_safetensors(path) as file:
            names = _names_under(prefix, file.keys())
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    tensors = read_torch_file(path, mapped=False)
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict):
        raise Mistake(
            "path",
            f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors; take a file of "
            "weights.",
        )
    return {name.removeprefix(prefix): tensors[name] for name in _names_under(prefix, tensors)}


def _names_under(prefix: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return [name for name in names if name.startswith(prefix)] or names


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: str, cure: str) -> None:
    """Load all tensors of a (meta) network, in the network's dtype, or none of them.

    Args:
        network: takes over the tensors without copying them.
        tensors: values by name.
        source: where they come from, for the error message.
        cure: what to do if they do not fit, for the error message.

    Raises:
        Mistake: tensors are missing, unexpected or of another shape.
    """
    own = network.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    check_fit(wrong, source, cure)
    tensors = {name: value.to(own[name].dtype) for name, value in tensors.items()}
    network.load_state_dict(tensors, strict=True, assign=True)


def check_fit(wrong: Sequence[str], source: str, cure: str) -> None:
    """Raise `Mistake` if tensors are missing, unexpected or of another shape; see `fill`."""
    if wrong:
        raise Mistake(
            "weights",
            f"those of {source} do not belong to this network: {len(wrong)} tensors are missing, "
            f"unexpected or of another shape, the first is {wrong[0]!r}; {cure}.",
        )
