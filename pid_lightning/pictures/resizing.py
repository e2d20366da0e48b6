"""Pictures reduced, enlarged and padded."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reduce_picture(images: Tensor, factor: int) -> Tensor:
    """Downsample by an integer factor with an antialiased bicubic filter.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        factor: at least 1, dividing H and W.

    Returns:
        (B, 3, H/factor, W/factor) clamped to [-1, 1], computed in fp32, in the dtype of `images`.
    """
    size = [side // factor for side in images.shape[-2:]]
    reduced = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
    return reduced.clamp(-1, 1).to(images.dtype)


def enlarge_picture(images: Tensor, factor: int) -> Tensor:
    """Upsample by an integer factor with a bicubic filter, the baseline of every decoder.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        factor: integer, at least 1.

    Returns:
        (B, 3, H*factor, W*factor) clamped to [-1, 1], computed in fp32, in the dtype of `images`.
    """
    size = [side * factor for side in images.shape[-2:]]
    enlarged = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False)
    return enlarged.clamp(-1, 1).to(images.dtype)


def pad_picture(images: Tensor, multiple: int) -> Tensor:
    """Grow images (B, 3, H, W) at the right and bottom to sides that are multiples of `multiple`.

    Border pixels are repeated; cropping the output restores the picture's shape.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
