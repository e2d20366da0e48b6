"""RRDBNet, the convolutional 4x upscaler of ESRGAN and Real-ESRGAN."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESIDUAL_SCALE = 0.2  # of every dense block, and again of every three dense blocks


class RRDBNet(nn.Module):
    """Residual-in-residual dense blocks (Wang et al., arXiv 1809.00219; arXiv 2107.10833).

    Submodules have the published names and are in the order of the forward pass.

    Args:
        width: features between blocks; 64 in the published 4x network.
        growth: features that each dense layer adds; 32 in the published network.
        num_blocks: blocks of three dense blocks each; 23 in the published network.
    """

    def __init__(self, width: int = 64, growth: int = 32, num_blocks: int = 23) -> None:
        super().__init__()
        self.conv_first = _convolution(3, width)
        self.body = nn.Sequential(*(_ResidualBlock(width, growth) for _ in range(num_blocks)))
        self.conv_body = _convolution(width, width)
        self.conv_up1 = _convolution(width, width)
        self.conv_up2 = _convolution(width, width)
        self.conv_hr = _convolution(width, width)
        self.conv_last = _convolution(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] to (B, 3, 4h, 4w), nominally in [0, 1], not clamped."""
        features = self.conv_first(images)
        features = features + self.conv_body(self.body(features))
        for convolution in (self.conv_up1, self.conv_up2):
            enlarged = F.interpolate(features, scale_factor=2, mode="nearest")
            features = _leaky(convolution(enlarged))
        return self.conv_last(_leaky(self.conv_hr(features)))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = _DenseBlock(width, growth)
        self.rdb2 = _DenseBlock(width, growth)
        self.rdb3 = _DenseBlock(width, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL_SCALE * self.rdb3(self.rdb2(self.rdb1(x)))


class _DenseBlock(nn.Module):
    """Five convolutions; each reads the block's input and all earlier outputs."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for i in range(4):
            self.add_module(f"conv{i + 1}", _convolution(width + i * growth, growth))
        self.conv5 = _convolution(width + 4 * growth, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat([seen, _leaky(layer(seen))], dim=1)
        return x + RESIDUAL_SCALE * self.conv5(seen)


def _convolution(num_inputs: int, num_outputs: int) -> nn.Conv2d:
    return nn.Conv2d(num_inputs, num_outputs, 3, padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
