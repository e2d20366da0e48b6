"""What no sampling step changes: latents and text as features, and tables of positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.nn import rope
from pid_lightning.nn.blocks import Table
from pid_lightning.nn.config import PiDConfig
from pid_lightning.nn.layers import RMSNorm


class Condition(NamedTuple):
    """Everything about a sample that no sampling step changes; `PiD.condition` makes it.

    Attributes:
        text: text tokens (B, L, D), None without a text stream.
        features: adapter features (B, N, D), one an injection.
        openness: what `SigmaGate.openness` says of each feature.
        joint_table: rotations of text and patches for the patch blocks.
        pixel_table: rotations of patches for the pixel blocks.
        columns, rows: the pixels' sine-cosine positions, (W, C/2) and (H, C/2).
        rgb: the adapter's low-resolution image (B, 3, H/scale, W/scale) when asked for.
    """

    text: Tensor | None
    features: tuple[Tensor, ...]
    openness: tuple[Tensor, ...]
    joint_table: Table
    pixel_table: Table
    columns: Tensor
    rows: Tensor
    rgb: Tensor | None = None

    def pixel_positions(self, patch_size: int) -> Tensor:
        """Of every pixel of every patch, (h, w, P, P, C)."""
        columns = rearrange(self.columns, "(w q) c -> w 1 q c", q=patch_size)
        rows = rearrange(self.rows, "(h p) c -> h 1 p 1 c", p=patch_size)
        return torch.cat(torch.broadcast_tensors(columns, rows), dim=-1)


class TextEmbedding(nn.Module):
    """Caption features to text tokens: Linear, RMSNorm, plus learned positions."""

    def __init__(self, text_width: int, width: int, length: int, learned_null: bool) -> None:
        super().__init__()
        self.length = length
        self.linear = nn.Linear(text_width, width)
        self.norm = RMSNorm(width)
        self.position = nn.Parameter(torch.zeros(1, length, width))
        self.null = nn.Parameter(torch.zeros(1, length, text_width)) if learned_null else None

    def forward(self, features: Tensor | None, keep: Tensor | None, batch_size: int) -> Tensor:
        """Features (B, L, D_text), kept where `keep` (B,) is true, to tokens (B, L, D)."""
        if features is None:
            features = self._null().expand(batch_size, -1, -1)
        elif keep is not None:
            features = features[:, : self.length]
            null = self._null()[:, : features.shape[1]]
            features = torch.where(keep[:, None, None], features, null)
        features = features[:, : self.length].to(self.linear.weight.dtype)
        tokens = self.norm(self.linear(features))
        return tokens + self.position[:, : tokens.shape[1]].to(tokens.dtype)

    def _null(self) -> Tensor:
        if self.null is None:
            raise ValueError(
                "text: this network has no learned null; give text features, for no caption "
                "those of an empty or negative prompt."
            )
        return self.null


def position_tables(
    config: PiDConfig,
    height: int,
    width: int,
    text_length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Table, Table, Tensor, Tensor]:
    """`joint_table`, `pixel_table`, `columns` and `rows` of a `Condition`, for an output size."""
    grid = (height // config.patch_size, width // config.patch_size)
    reference = config.rope_reference
    if reference is not None:
        reference = tuple(side / config.patch_size for side in reference)
    head_dim = config.width // config.num_heads
    text = rope.text_angles(text_length, head_dim, device)
    joint = torch.cat((text, rope.patch_angles(*grid, head_dim, reference, device)))
    pixel_head_dim = config.pixel_attention_width // config.pixel_num_heads
    pixel = rope.patch_angles(*grid, pixel_head_dim, reference, device)
    return (
        rope.rotation(joint, dtype),
        rope.rotation(pixel, dtype),
        _sine_cosine(width, config.pixel_width // 2, device).to(dtype),
        _sine_cosine(height, config.pixel_width // 2, device).to(dtype),
    )


def _sine_cosine(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions (length, width) in fp64: `[sin, cos]` at `10000^(-i/(width/2))`."""
    num = width // 2
    steps = torch.arange(num, dtype=torch.float64, device=device)
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = positions[:, None] * 10_000.0 ** (-steps / num)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
