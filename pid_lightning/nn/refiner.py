"""What comes after the pixel blocks of a residual network: convolutions over the whole picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pid_lightning.nn.layers import ResidualConvolutions, replicating_conv

FOLD = 2  # side of the squares of pixels that are the channels of one position


class Refiner(nn.Module):
    """Convolutions over the whole picture after the pixel blocks, which mix across the borders of
    patches. Zero at first.

    They see the picture folded 2 x 2 (space to depth, arXiv 1609.05158): a quarter of the
    positions, and so of what passes through memory, for channels that a CPU multiplies well.

    Args:
        width: channels.
        num_layers: 3 x 3 convolutions, even; all but the first and the last are in residual pairs.
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.first: nn.Conv2d = replicating_conv((3 * 3 + 1) * FOLD**2, width)
        self.blocks: nn.Sequential = nn.Sequential(
            *(ResidualConvolutions(width) for _ in range(num_layers // 2 - 1))
        )
        self.last: nn.Conv2d = replicating_conv(width, 3 * FOLD**2)

    def reset_parameters(self) -> None:
        """Default initialisation, and a last layer of zeros."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x0: Tensor, base: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """A correction (B, 3, H, W) to x0, given pictures (B, 3, H, W) and times (B,)."""
        time = t.to(x0.dtype).view(-1, 1, 1, 1).expand_as(x0[:, :1])
        x = torch.cat((x0, base.to(x0.dtype), x_t.to(x0.dtype), time), dim=1)
        x = F.pixel_unshuffle(x.to(self.first.weight.dtype), FOLD)
        x = self.blocks(self.first(x.contiguous(memory_format=torch.channels_last)))
        return F.pixel_shuffle(self.last(F.silu(x)), FOLD)


def enlarged(picture: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement of pictures (B, 3, h, w) in fp32 at least, not clamped."""
    picture = picture.to(torch.promote_types(picture.dtype, torch.float32))
    return F.interpolate(picture, scale_factor=scale, mode="bicubic")
