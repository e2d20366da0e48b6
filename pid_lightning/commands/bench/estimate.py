"""Operations and peak memory of work, estimated with tensors that hold no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pid_lightning.commands.bench.networks import build_meta, random_sample
from pid_lightning.commands.bench.work import Mode, Work, weights_dtype
from pid_lightning.decoding.memory_estimate import counted_dtype, peak_bytes
from pid_lightning.files.models import ModelInfo
from pid_lightning.training.sample import Sample


def estimate_peaks(
    name: str, info: ModelInfo, size: int, batch_size: int, dtype: torch.dtype, mode: Mode
) -> dict[str, dict[str, float]]:
    """The MiB that each call holds before and after, and at its peak, with those.

    Attention counts as one fused operation, as on a GPU, and every optimiser has its state.
    Allocator overhead and library workspaces are not counted.
    """
    with without_data(name, info, size, batch_size, counted_dtype(dtype)) as (whole, sample):
        work = whole.in_mode(mode)
        calls = work.calls(sample)
        for call in calls.values() if work.optimizers else ():
            call()  # creates the optimisers' states
        held = work.held_bytes(sample) / 2**20
        return {
            row: {"held_mib": held, "peak_mib": held + peak_bytes(call) / 2**20}
            for row, call in calls.items()
        }


def count_flops(name: str, info: ModelInfo, size: int, batch_size: int) -> dict[str, int]:
    """Operations of each call by torch's formulas: matmuls and convolutions; attention counts as
    two matmuls forward and four backward."""
    with without_data(name, info, size, batch_size, torch.float32) as (work, sample):
        counted = {}
        for row, call in work.calls(sample).items():
            # The count of fused attention's backward would include its recomputation.
            with Operations() as operations, sdpa_kernel(SDPBackend.MATH):
                call()
            counted[row] = operations.flops
        return counted


class Operations(TorchDispatchMode):
    """Sums the formulas of torch's `FlopCounterMode`, which itself cannot track modules called
    without gradient on inputs that require one, such as DMD2's teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: int = 0

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
    name: str, info: ModelInfo, size: int, batch_size: int, dtype: torch.dtype
) -> Iterator[tuple[Work, Sample]]:
    """Work and a batch of fake tensors, to be run inside the context."""
    denoiser = build_meta(info)
    shapes = {key: weight.shape for key, weight in denoiser.state_dict().items()}
    with FakeTensorMode():
        kept = weights_dtype(name, dtype)
        state = {key: torch.empty(shape, dtype=kept) for key, shape in shapes.items()}
        denoiser.load_state_dict(state, assign=True)
        sample = random_sample(info, size, batch_size, torch.device("cpu"))
        yield Work.of(name, denoiser, info, dtype), sample
