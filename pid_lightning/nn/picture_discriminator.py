"""The discriminator of a student that is trained on photographs directly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PictureDiscriminator(nn.Module):
    """Tells photographs from made pictures, part by part, given what these were made from.

    Four convolutions that see 22 pixels (the patch discriminator of pix2pix, arXiv 1611.07004,
    section 3.2.2), all but the last with spectral normalisation (arXiv 1802.05957).

    Args:
        width: channels of the first convolution; the others have twice as many.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(
            [
                spectral_norm(nn.Conv2d(6, width, 4, stride=2, padding=1)),
                spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
                spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
                nn.Conv2d(2 * width, 1, 3, padding=1),
            ]
        )

    def forward(self, pictures: Tensor, base: Tensor) -> Tensor:
        """Logits (B, 1, H/4, W/4), high for photographs, of pictures (B, 3, H, W) that show what
        base (B, 3, H, W), an enlarged native decode, shows."""
        x = torch.cat((pictures, base.to(pictures.dtype)), dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
        return self.layers[-1](x)
