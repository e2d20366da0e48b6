"""TAEF2, the tiny autoencoder for FLUX.2's latents by Ollin Boer Bohan, written anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 64
LATENT_CHANNELS = 32  # before packing
STRIDE = 8  # pixels per cell before packing


class TAEF2Encoder(nn.Sequential):
    """Pictures (B, 3, H, W) in [0, 1] to FLUX.2's normalised latents before packing, (B, 32, H/8,
    W/8). The names of the parameters are those of the published file."""

    def __init__(self) -> None:
        super().__init__(
            _conv(3, WIDTH),
            Block(),
            *_halving(),
            *_halving(),
            *_halving(with_context=True),
            _conv(WIDTH, LATENT_CHANNELS),
        )


class TAEF2Decoder(nn.Sequential):
    """FLUX.2's normalised latents before packing (B, 32, h, w) to pictures (B, 3, 8h, 8w), about
    [0, 1]. The names of the parameters are those of the published file."""

    def __init__(self) -> None:
        super().__init__(
            SoftClamp(),
            _conv(LATENT_CHANNELS, WIDTH),
            nn.ReLU(),
            *(Block(with_context=True) for _ in range(3)),
            *_doubling(num_blocks=3),
            *_doubling(num_blocks=3),
            *_doubling(num_blocks=1),
            _conv(WIDTH, 3),
        )


class SoftClamp(nn.Module):
    """`3 tanh(x / 3)`: latents beyond what the decoder was trained on do no harm."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """`relu(conv(relu(conv(relu(conv(x))))) + x)` on (B, 64, h, w).

    Args:
        with_context: first add a branch whose group norm sees the whole picture.
    """

    def __init__(self, with_context: bool = False) -> None:
        super().__init__()
        self.conv: nn.Sequential = nn.Sequential(
            _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH)
        )
        self.pool: nn.Sequential | None = (
            nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
            if with_context
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _halving(with_context: bool = False) -> tuple[nn.Module, ...]:
    strided = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False)
    return strided, *(Block(with_context) for _ in range(3))


def _doubling(num_blocks: int) -> tuple[nn.Module, ...]:
    doubled = nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
    return *doubled, *(Block() for _ in range(num_blocks))


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)
