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

    Raises:
        ValueError: the factor is not a valid integer.
    """
    _check_factor(factor)
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"pictures of {height} x {width} pixels cannot be reduced by {factor}: "
            f"both sides must be multiples of {factor}."
        )
    size = (height // factor, width // factor)
    reduced = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
    return reduced.clamp(-1, 1).to(images.dtype)


def enlarge_picture(images: Tensor, factor: int) -> Tensor:
    """Upsample by an integer factor with a bicubic filter, the baseline of every decoder.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        factor: integer, at least 1.

    Returns:
        (B, 3, H*factor, W*factor) clamped to [-1, 1], computed in fp32, in the dtype of `images`.

    Raises:
        ValueError: the factor is not a valid integer.
    """
    _check_factor(factor)
    size = (images.shape[-2] * factor, images.shape[-1] * factor)
    enlarged = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False)
    return enlarged.clamp(-1, 1).to(images.dtype)


def _check_factor(factor: int) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ValueError(f"scale: {factor!r} must be an integer of at least 1.")


def pad_picture(images: Tensor, multiple: int) -> Tensor:
    """Grow images (B, 3, H, W) at the right and bottom to sides that are multiples of `multiple`.

    Border pixels are repeated; cropping the output restores the picture's shape.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
