"""Operations and peak memory of benchmarks, estimated with fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pid_lightning.commands.bench import LEARNING
from pid_lightning.commands.bench.networks import build_meta, draw_inputs
from pid_lightning.commands.bench.pieces import assemble, gather
from pid_lightning.commands.bench.work import Work
from pid_lightning.decoding.memory_estimate import counted_dtype, peak_bytes
from pid_lightning.files.models import ModelInfo


def weights_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the denoiser's weights: fp32 for training, else `dtype`."""
    return torch.float32 if name in LEARNING else dtype


def estimate_peaks(
    name: str,
    info: ModelInfo,
    size: int,
    batch_size: int,
    dtype: torch.dtype,
    activation_checkpointing: bool,
) -> dict[str, tuple[int, int]]:
    """(bytes kept between calls, peak bytes including them) of each piece.

    Attention counts as one fused operation, as on a GPU, and every optimiser has its state.
    Allocator overhead and library workspaces are not counted.
    """
    options = (name, info, size, batch_size, counted_dtype(dtype), activation_checkpointing)
    with without_data(*options) as pieces:
        for work in pieces.values():
            if work.optimizer is not None:
                work.run()  # creates the optimiser's state
        figures = {}
        for row, work in pieces.items():
            held = work.held_bytes()
            figures[row] = (held, held + peak_bytes(work.run))
        return figures


def count_flops(
    name: str, info: ModelInfo, size: int, batch_size: int, window: int | None = None
) -> dict[str, int]:
    """Operations of each piece by torch's formulas: matmuls and convolutions.

    Recomputation by activation checkpointing is not counted.

    Args:
        name: one of `WORK`.
        info: the network.
        size: output side in pixels.
        batch_size: pictures per batch.
        window: side in pixels of the attention windows; None for full attention.
    """
    with without_data(name, info, size, batch_size, torch.float32, False, window) as pieces:
        return {row: count_operations(work.run) for row, work in pieces.items()}


def count_operations(run: Callable[[], object]) -> int:
    """Operations of one call; attention counts as two matmuls forward and four backward."""
    # The count of fused attention's backward would include its recomputation.
    with Operations() as operations, sdpa_kernel(SDPBackend.MATH):
        run()
    return operations.flops


class Operations(TorchDispatchMode):
    """Sums the formulas of torch's `FlopCounterMode`, which itself cannot track modules called
    without gradient on inputs that require one, such as DMD2's teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        result = function(*arguments, **options)
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.flops += formula(*arguments, **options, out_val=result)
        return result


@contextmanager
def without_data(
    name: str,
    info: ModelInfo,
    size: int,
    batch_size: int,
    dtype: torch.dtype,
    activation_checkpointing: bool,
    window: int | None = None,
) -> Iterator[dict[str, Work]]:
    """The pieces on fake tensors, to be run inside the context."""
    denoiser = build_meta(info)
    denoiser.activation_checkpointing = activation_checkpointing
    denoiser.attend_in_windows(window)
    shapes = {key: weight.shape for key, weight in denoiser.state_dict().items()}
    with FakeTensorMode():
        kept = weights_dtype(name, dtype)
        state = {key: torch.empty(shape, dtype=kept) for key, shape in shapes.items()}
        denoiser.load_state_dict(state, assign=True)
        inputs = draw_inputs(info, size, batch_size, torch.device("cpu"))
        yield assemble(name, gather(name, denoiser, info), inputs, info, dtype)
