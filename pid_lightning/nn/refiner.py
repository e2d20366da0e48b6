"""What comes after the pixel blocks of a residual network: convolutions over the whole picture."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Refiner(nn.Module):
    """Convolutions over the whole picture after the pixel blocks, which mix across the borders of
    patches. Zero at first.

    Args:
        width: channels.
        num_layers: 3 x 3 convolutions, the first and the last included.
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        widths = [3 * 3 + 1, *[width] * (num_layers - 1), 3]
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, padding_mode="replicate") for a, b in pairwise(widths)
        )

    def reset_parameters(self) -> None:
        """Default initialisation, and a last layer of zeros."""
        for layer in self.layers:
            layer.reset_parameters()
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x0: Tensor, base: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """A correction (B, 3, H, W) to x0, given pictures (B, 3, H, W) and times (B,)."""
        time = t.to(x0.dtype).view(-1, 1, 1, 1).expand_as(x0[:, :1])
        x = torch.cat((x0, base.to(x0.dtype), x_t.to(x0.dtype), time), dim=1)
        x = x.to(self.layers[0].weight.dtype).contiguous(memory_format=torch.channels_last)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x)


def enlarged(picture: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement of pictures (B, 3, h, w) in fp32 at least, not clamped."""
    picture = picture.to(torch.promote_types(picture.dtype, torch.float32))
    return F.interpolate(picture, scale_factor=scale, mode="bicubic")
