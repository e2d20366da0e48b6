"""Attention of one block of each kind, by each torch kernel that supports its head size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pid_lightning.commands.bench.rates import Rates, time_call
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn.attention import attend

# Without torch's math kernel, which stores all scores: tens of gigabytes at 2048 x 2048.
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
PADDED_TO = 16  # head sizes are also tried padded to the next multiple: 72 to 80


class Heads(NamedTuple):
    """One block's q, k and v, each (B, heads, N, d)."""

    q: Tensor
    k: Tensor
    v: Tensor


def attention_rows(
    info: ModelInfo,
    size: int,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    rates: Rates,
    repeat: int,
) -> Iterator[dict[str, Any]]:
    """Rows for the attention of a patch block and a pixel block, without the projections.

    The mode ``eager`` is what the network runs. The modes take turns; a kernel that does not
    support the head size, dtype or device has no row.
    """
    for piece, heads in draw_heads(info, size, batch_size, dtype, device).items():
        run = torch.no_grad()(partial(attend, *heads))
        calls = {"eager": run} | dict(kernels_for(heads))
        first = {mode: time_call(call, device) for mode, call in calls.items()}
        seconds: dict[str, list[float]] = {mode: [] for mode in calls}
        for _ in range(repeat):
            for mode, call in calls.items():
                seconds[mode].append(time_call(call, device))
        flops = 4 * heads.q.numel() * heads.k.shape[2]
        num_bytes = 4 * heads.q.numel() * heads.q.element_size()  # q, k, v and the result
        floor = rates.floor_seconds(flops, num_bytes)
        for mode in calls:
            median = statistics.median(seconds[mode])
            yield {
                "work": piece,
                "mode": mode,
                "seconds": median,
                "gflop": flops / 1e9,
                "floor_seconds": floor,
                "floor_share": floor / median,
                "first_seconds": first[mode],
            }


def draw_heads(
    info: ModelInfo, size: int, batch_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Heads]:
    """Random q, k and v for both kinds of block, keyed by the names of their rows."""
    config = info.config
    num_patches = (size // config.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for piece, length, num_heads, width in (
        ("patch attention", config.text_length + num_patches, config.num_heads, config.width),
        ("pixel attention", num_patches, config.pixel_num_heads, config.pixel_attention_width),
    ):
        shape = (3, batch_size, num_heads, length, width // num_heads)
        drawn[piece] = Heads(*torch.randn(shape, generator=generator).to(device, dtype))
    return drawn


def kernels_for(heads: Heads) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """A call for each kernel that supports these heads, unpadded and padded."""
    head_dim = heads.q.shape[-1]
    padding = -head_dim % PADDED_TO
    for name, kernel in KERNELS.items():
        for extra in (0, padding) if padding else (0,):
            call = partial(_attend_by, kernel, heads, extra)
            try:
                call()
            except RuntimeError:  # "No available kernel"
                continue
            yield f"{name} padded to {head_dim + extra}" if extra else name, call


def _attend_by(kernel: SDPBackend, heads: Heads, padding: int) -> Tensor:
    """`attend` by one kernel; zero channels change no score and are cut from the result."""
    head_dim = heads.q.shape[-1]
    padded = (F.pad(x, (0, padding)) for x in heads)
    with sdpa_kernel(kernel):
        attended = F.scaled_dot_product_attention(*padded, scale=head_dim**-0.5)
    return attended[..., :head_dim].transpose(1, 2).flatten(2)
