"""Layers shared by all blocks: norm, modulation, q k v, MLP and time embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.nn.rope import Table, rotate

EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, statistics in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight.to(x.dtype))

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """`norm(x) * (1 + scale) + shift`, with the norm's weight folded into the factor."""
        factor = (self.weight * (1 + scale)).to(x.dtype)
        return torch.addcmul(shift, _rms_norm(x), factor)


def _rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    # Statistics are fp32 anyway; under CUDA's autocast the output would be too, twice the memory.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight, EPS)


class QKV(nn.Module):
    """One bias-free linear layer for queries, keys and values, with RMSNorm on q and k per head."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear: nn.Linear = nn.Linear(width, 3 * width, bias=False)
        self.q_norm: RMSNorm = RMSNorm(width // num_heads)
        self.k_norm: RMSNorm = RMSNorm(width // num_heads)

    def forward(self, x: Tensor, table: Table) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) to q, k, v, each (B, heads, N, d), with q and k rotated to their positions."""
        q, k, v = rearrange(
            self.linear(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        return rotate(self.q_norm(q), table), rotate(self.k_norm(k), table), v


class SwiGLU(nn.Module):
    """`down(silu(gate) * up)` (arXiv 2002.05202); gate and up are one matmul. No biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up: nn.Linear = nn.Linear(width, 2 * hidden, bias=False)
        self.down: nn.Linear = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class TimeEmbedding(nn.Module):
    """Maps the pixel time to a vector: 256 features of `1000 t`, then Linear, SiLU, Linear, in
    fp32 at least.

    Frequencies `exp(-ln(10) i/128)`: base 10, as the published weights were trained with.
    """

    NUM_FREQUENCIES = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden: nn.Linear = nn.Linear(2 * self.NUM_FREQUENCIES, width)
        self.out: nn.Linear = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) in [0, 1] to (B, 1, D) in fp32 at least, also under autocast."""
        dtype = torch.promote_types(self.out.weight.dtype, torch.float32)
        steps = torch.arange(self.NUM_FREQUENCIES, dtype=dtype, device=t.device)
        frequencies = torch.exp(-math.log(10) / self.NUM_FREQUENCIES * steps)
        angles = 1000 * t.to(dtype)[:, None] * frequencies
        with torch.autocast(t.device.type, enabled=False):
            features = torch.cat((angles.cos(), angles.sin()), dim=-1)  # (B, 256)
            hidden = F.silu(_linear(self.hidden, features))
            return _linear(self.out, hidden)[:, None]


class ResidualConvolutions(nn.Module):
    """`x + conv(silu(conv(silu(x))))` with 3 x 3 convolutions (B, width, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first: nn.Conv2d = replicating_conv(width, width)
        self.second: nn.Conv2d = replicating_conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def replicating_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3 x 3 convolution that repeats the border, so that no edge of the picture is dark."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="replicate")


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """The linear layer computed in the dtype of x, whatever that of the weights."""
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
