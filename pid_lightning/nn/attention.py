"""Softmax attention by the fastest kernel for device and dtype."""

from __future__ import annotations

import functools
import importlib.util
import textwrap
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MAX_TRAINED_KEYS = 1024  # beyond, scores saved for the backward pass cost more than they gain
MAX_QUERIES = 256  # per chunk; with fewer, packing all keys for every matmul costs too much
SCORES_PER_THREAD = 2**19  # scores in bf16 that fit a core's cache
KERNEL_DTYPE, KERNEL_HEAD_DIM = torch.bfloat16, 64
MIN_KERNEL_KEYS = 4096  # with fewer, `attention_kernel` gains nothing


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over q, k, v (B, heads, N, d), heads joined: (B, N, heads*d)."""
    return rearrange(softmax_attention(q, k, v), "b h n d -> b n (h d)")


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, heads, N, d); on a GPU torch picks a kernel by card and head size
    (on Hopper cuDNN's from torch 2.11 on, about twice as fast as the one it picks before), unless
    `attention_kernel` is faster still."""
    learns = torch.is_grad_enabled()
    fits = q.dtype == KERNEL_DTYPE and q.shape[-1] == KERNEL_HEAD_DIM
    if fits and k.shape[2] >= MIN_KERNEL_KEYS and not learns and _runs_kernel(q.device):
        return attend_by_kernel(q, k, v)
    if q.device.type == "cpu":
        # torch's bf16 kernels take twice the time.
        by_parts = q.dtype == torch.bfloat16 and (k.shape[2] <= MAX_TRAINED_KEYS or not learns)
    else:
        # torch's only fp64 kernel holds all scores at once.
        by_parts = q.dtype == torch.float64 and not learns
    if not by_parts:
        return F.scaled_dot_product_attention(q, k, v)
    q = q * q.shape[-1] ** -0.5
    return (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v if learns else attend_in_chunks(q, k, v)


@torch.library.custom_op("pid_lightning::attend_in_chunks", mutates_args=())
def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention for scaled q, without gradient, in chunks of heads and queries; each thread
    works on heads of its own. Up to 2048 keys a thread's scores stay in its core's cache.

    One operation for compiled graphs, which would unroll all chunks.
    """
    num_queries = min(q.shape[2], MAX_QUERIES)
    num_heads = max(1, SCORES_PER_THREAD // (num_queries * k.shape[2])) * torch.get_num_threads()
    attended = q.new_empty(q.shape)
    parts = (x.flatten(0, 1).split(num_heads) for x in (attended, q, k, v))
    for head_attended, head_q, head_k, head_v in zip(*parts, strict=True):
        rows = (x.split(num_queries, dim=1) for x in (head_attended, head_q))
        for row_attended, row_q in zip(*rows, strict=True):
            scores = row_q @ head_k.transpose(-1, -2)
            torch.bmm(scores.softmax(dim=-1), head_v, out=row_attended)
    return attended


@attend_in_chunks.register_fake
def _attended_like(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.compiler.assume_constant_result
def _runs_kernel(device: torch.device) -> bool:
    """Whether `attention_kernel` works on this device and is the fastest."""
    return _is_hopper_with_triton(device)  # on its own: torch.compile would trace through a cache


@functools.cache
def _is_hopper_with_triton(device: torch.device) -> bool:
    """With Triton 3.4 or newer, which torch 2.8 brings on Linux."""
    if device.type != "cuda" or torch.version.hip is not None or torch.__version__ < (2, 8):
        return False
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        import triton

        triton.runtime.driver.active.get_current_target()  # compiles Triton's own C code
    except Exception as error:  # no compiler, no headers, no linker cache: each raises its own
        reason = textwrap.shorten(str(error), 100)
        warnings.warn(
            f"attention: Triton does not work here ({reason}), so torch's kernel is used, which is "
            "slower; Triton needs a C compiler and Python's headers.",
            stacklevel=2,
        )
        return False
    return True


@torch.library.custom_op("pid_lightning::attend_by_kernel", mutates_args=())
def attend_by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention by `attention_kernel`, as one operation for compiled graphs."""
    from pid_lightning.nn.attention_kernel import launch

    return launch(q, k, v)


@attend_by_kernel.register_fake
def _stored_by_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)
