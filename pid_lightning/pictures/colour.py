"""Measures and corrects colour shifts of a decode against the native decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

CELL = 16  # native pixels: coarser structure counts as colour, finer as detail


@dataclass(frozen=True)
class ColourShift:
    """Low frequencies of a decode minus those of the native decode, in levels of 8-bit pixels.

    Attributes:
        mean: mean difference in red, green and blue.
        largest: largest absolute difference in any channel and place.
    """

    mean: tuple[float, float, float]
    largest: float

    def __str__(self) -> str:
        red, green, blue = self.mean
        return (
            f"colour shift: red {red:+.1f}, green {green:+.1f}, blue {blue:+.1f} of 255 on the "
            f"mean, {self.largest:.1f} at most"
        )


def colour_shift(picture: Tensor, native: Tensor) -> ColourShift:
    """The shift of one picture from its native decode.

    Args:
        picture: (3, H, W) in [-1, 1].
        native: (3, H/scale, W/scale) of the same latents.
    """
    levels = 127.5 * _difference(picture, native)
    red, green, blue = levels.mean(dim=(-2, -1)).tolist()
    return ColourShift((red, green, blue), levels.abs().max().item())


def match_colour(picture: Tensor, native: Tensor) -> Tensor:
    """Give the picture the native decode's low frequencies and keep its own detail.

    Args as for `colour_shift`.

    Returns:
        (3, H, W) clamped to [-1, 1].
    """
    shift = _difference(picture, native)
    smooth = F.interpolate(shift[None], size=picture.shape[-2:], mode="bilinear")[0]
    return (picture - smooth).clamp_(-1, 1)


def _difference(picture: Tensor, native: Tensor) -> Tensor:
    """Low frequencies of picture minus native, (3, rows, columns) of cells of about CELL pixels."""
    reduced = F.avg_pool2d(picture.float().clamp(-1, 1), picture.shape[-1] // native.shape[-1])
    difference = reduced - native.to(picture.device).float().clamp(-1, 1)
    return F.adaptive_avg_pool2d(difference, [max(1, round(s / CELL)) for s in native.shape[1:]])
