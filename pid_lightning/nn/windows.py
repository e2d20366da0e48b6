"""Attention of patches inside windows: not what a network was trained with, but near it, and its
cost grows with the pixels, not with their square."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from pid_lightning.nn.layers import rotated, softmax_attention


@dataclass(frozen=True)
class Windows:
    """How a picture's patches are parted.

    Attributes:
        rows, columns: of the whole picture, in patches.
        side: the most patches of a window's side.
        shifted: by half a window, as every other block's are (Swin, arXiv 2103.14030), so that
            what one block keeps apart the next brings together.
    """

    rows: int
    columns: int
    side: int
    shifted: bool

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each window."""
        return itertools.product(
            _spans(self.rows, self.side, self.shifted),
            _spans(self.columns, self.side, self.shifted),
        )


def attend_in_windows(
    q: Tensor, k: Tensor, v: Tensor, table: tuple[Tensor, Tensor], windows: Windows
) -> Tensor:
    """As `layers.attend`, but a patch attends to the text and the patches of its own window.

    Positions are those of the whole picture, and text attends to everything.

    Args:
        q, k, v: (B, heads, L + N, d), text first; q may be of the N patches only.
        table: rotations of the L + N positions.
        windows: of the N patches.
    """
    q, k = rotated(q, k, table)
    num_patches = windows.rows * windows.columns
    text_k, text_v = k[:, :, :-num_patches], v[:, :, :-num_patches]
    grids = [
        rearrange(x[:, :, -num_patches:], "b n (h w) d -> b n h w d", h=windows.rows)
        for x in (q, k, v)
    ]
    attended = torch.empty_like(grids[0])
    for rows, columns in windows:
        own_q, own_k, own_v = (grid[:, :, rows, columns].flatten(2, 3) for grid in grids)
        keys, values = torch.cat((text_k, own_k), dim=2), torch.cat((text_v, own_v), dim=2)
        own = softmax_attention(own_q, keys, values)
        attended[:, :, rows, columns] = own.unflatten(2, (rows.stop - rows.start, -1))
    attended = attended.flatten(2, 3)
    text_q = q[:, :, :-num_patches]
    if text_q.shape[2]:
        attended = torch.cat((softmax_attention(text_q, k, v), attended), dim=2)
    return rearrange(attended, "b h n d -> b n (h d)")


def _spans(length: int, side: int, shifted: bool) -> list[slice]:
    """As many spans as windows of `side` need, as even as can be; shifted, one more, their borders
    in the middle of the others; of one window there is nothing to shift."""
    num = -(-length // side)
    borders = [round(i * length / num) for i in range(num + 1)]
    if shifted and num > 1:
        middles = [sum(pair) // 2 for pair in itertools.pairwise(borders)]
        borders = [0, *middles, length]
    return [slice(*pair) for pair in itertools.pairwise(borders)]
