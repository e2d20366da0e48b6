"""Softmax attention by the fastest kernel for device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MAX_TRAINED_KEYS = 1024  # beyond, scores saved for the backward pass cost more than they gain
MAX_QUERIES = 256  # per chunk; with fewer, packing all keys for every matmul costs too much
SCORES_PER_THREAD = 2**19  # scores in bf16 that fit a core's cache


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over q, k, v (B, heads, N, d), heads joined: (B, N, heads*d)."""
    return rearrange(softmax_attention(q, k, v), "b h n d -> b n (h d)")


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, heads, N, d); on a GPU torch picks a kernel by card and head size
    (on Hopper cuDNN's from torch 2.11 on, about twice as fast as the one it picks before)."""
    learns = torch.is_grad_enabled()
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
