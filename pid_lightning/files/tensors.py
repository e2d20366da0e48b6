"""Read tensors from files without running code, and load them strictly: what a file states is
checked against what it holds before memory is taken for it."""

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
from torch.utils._python_dispatch import TorchDispatchMode

from pid_lightning.checks import Mistake

MOST_SHARED = 4  # times that the tensors of a torch file may share its bytes
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TEMPORARY = 8  # tensors made while a network is built, to each that stays


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
        Mistake: the file is truncated, is not a torch file, states more than it holds, or asks for
            code to be run.
    """
    check_regular(path)
    with open(path, "rb") as file:
        zipped = zipfile.is_zipfile(file)  # torch's older format, which is not, cannot be mapped
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("compressed, as torch never is")
        content = torch.load(path, map_location="cpu", mmap=mapped and zipped, weights_only=True)
        if sum(map(_held_bytes, _tensors_in(content))) > MOST_SHARED * os.path.getsize(path):
            raise ValueError("tensors larger than the file")
        return content
    except Exception as error:  # the unpickler raises whatever a foreign file leads it to
        raise Mistake(
            "path",
            f"{path} cannot be read: it is truncated, is not a torch file, states more than it "
            "holds, or asks for code to be run (nothing of it was executed); take another copy.",
        ) from error


def _tensors_in(content: object) -> Iterator[Tensor]:
    """The tensors in nested containers, each once, however often they are named."""
    seen, left = set(), [content]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple | set):
            left += item


def _held_bytes(tensor: Tensor) -> int:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        raise ValueError("a tensor without numbers")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise ValueError("a tensor of another layout")
    return tensor.numel() * tensor.element_size()


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
        path: the file. A torch file may wrap its tensors, as in ``state_dict`` or ``params``.
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
    for wrapper in ("state_dict", "model", "params_ema", "params"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    held = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held):
        raise Mistake("path", f"{path} holds no dictionary of tensors; take a file of weights.")
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
        Mistake: tensors are missing, unexpected, of another shape, or no finite weights.
    """
    own = network.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    check_fit(wrong, source, cure)
    check_weights(tensors, cure)
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


def check_weights(tensors: Mapping[str, Tensor], cure: str, one_dtype: bool = False) -> None:
    """Check that tensors are numbers to compute with.

    Args:
        tensors: values by name.
        cure: what to do if they are not, for the error message.
        one_dtype: whether all have to have the same dtype.

    Raises:
        Mistake: one is of another dtype than 16, 32 or 64 bits of floating point, or not finite.
    """
    for name, value in tensors.items():
        if value.dtype not in WEIGHT_DTYPES:
            raise Mistake("weights", f"{name!r} is in {value.dtype}, not floating point; {cure}.")
        if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
            raise Mistake("weights", f"{name!r} is not finite in {value.dtype}; {cure}.")
    dtypes = {str(value.dtype) for value in tensors.values()}
    if one_dtype and len(dtypes) > 1:
        raise Mistake("weights", f"they mix {' and '.join(sorted(dtypes))}; {cure}.")


class building_at_most(TorchDispatchMode):
    """Context in which a network is built that has no more tensors, and takes no more memory, than
    a stranger's description of it was given along with.

    Args:
        num_tensors: tensors of the network.
        num_bytes: of all that it holds, where it is built on a real device.

    Raises:
        Mistake: inside, as soon as there are more.
    """

    def __init__(self, num_tensors: int, num_bytes: int | None = None) -> None:
        super().__init__()
        self.tensors_left = TEMPORARY * (num_tensors + TEMPORARY)
        self.bytes_left = num_bytes

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        if isinstance(result, Tensor) and not any(isinstance(a, Tensor) for a in arguments):
            self.tensors_left -= 1
            if self.bytes_left is not None:
                self.bytes_left -= result.numel() * result.element_size()
            if self.tensors_left < 0 or (self.bytes_left or 0) < 0:
                raise Mistake("weights", "the network described is larger than its file.")
        return result
