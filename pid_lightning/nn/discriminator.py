"""The discriminator of DMD2: a small head on each tapped feature of the frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Discriminator(nn.Module):
    """One logit per tap: Conv4x4 stride 2 to D/2, GroupNorm, LeakyReLU 0.2, Conv1x1, spatial mean
    (DMD2, arXiv 2405.14867, section 4.3, on transformer features).

    Args:
        width: channels D of the features.
        num_taps: number of tapped blocks.
        depth: strided convolutions per head, each halving the channels; the published
            discriminator has one.
    """

    def __init__(self, width: int, num_taps: int, depth: int = 1) -> None:
        super().__init__()
        self.heads: nn.ModuleList = nn.ModuleList(_head(width, depth) for _ in range(num_taps))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise uniformly within 1/sqrt(fan-in) of each convolution, torch's default."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features (B, D, H/P, W/P), one per tap, to logits (B, taps), in the dtype of the weights
        also under autocast: R1 compares logits that differ by less than bf16 resolves."""
        with torch.autocast(features[0].device.type, enabled=False):
            logits = [
                head(feature.to(head[0].weight.dtype)).mean(dim=(1, 2, 3))
                for head, feature in zip(self.heads, features, strict=True)
            ]
        return torch.stack(logits, dim=1)


def _head(width: int, depth: int) -> nn.Sequential:
    layers = []
    for _ in range(depth):
        layers += [
            nn.Conv2d(width, width // 2, 4, stride=2, padding=1),
            nn.GroupNorm(_num_groups(width // 2), width // 2),
            nn.LeakyReLU(0.2),
        ]
        width //= 2
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 1))


def _num_groups(channels: int) -> int:
    """The largest divisor of C that is at most C/4 (up to 32 channels) or 32 (above)."""
    most = max(1, channels // 4) if channels <= 32 else 32
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)
