"""Attention of patches inside windows: close to the full attention of training, at a cost linear
instead of quadratic in the pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from pid_lightning.nn.attention import softmax_attention


@dataclass(frozen=True)
class Windows:
    """How a picture's patches are divided into windows.

    Attributes:
        rows, columns: size of the whole picture in patches.
        side: maximum side of a window in patches.
        shifted: whether windows are shifted by half their side, as in every other block (Swin,
            arXiv 2103.14030), so that patches separated in one block meet in the next.
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


def attend_in_windows(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
    """Like `attention.attend`, but a patch only attends to the text and the patches of its window.

    Text attends to everything.

    Args:
        q, k, v: (B, heads, L + N, d), text first; q may hold the N patches only.
        windows: windows of the N patches.
    """
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
    """As few spans of at most `side` as possible, of near-equal length. Shifted spans, one more,
    have their borders in the middle of the others; a single span is not shifted."""
    num = -(-length // side)
    borders = [round(i * length / num) for i in range(num + 1)]
    if shifted and num > 1:
        middles = [sum(pair) // 2 for pair in itertools.pairwise(borders)]
        borders = [0, *middles, length]
    return [slice(*pair) for pair in itertools.pairwise(borders)]
