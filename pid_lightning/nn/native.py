"""A native decoder inside the network: what plain decoding shows, for PiD to improve on."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.nn.geometry import Geometry
from pid_lightning.nn.layers import ResidualConvolutions, replicating_conv
from pid_lightning.nn.taef2 import LATENT_CHANNELS, STRIDE, TAEF2Decoder


class Native(NamedTuple):
    """What the native decoder makes of latents.

    Attributes:
        latents: estimate (B, 32, h, w) of the clean latents, before packing.
        picture: their low-resolution decode (B, 3, 8h, 8w), about [-1, 1].
    """

    latents: Tensor
    picture: Tensor


class NativeDecoder(nn.Module):
    """Estimates the clean latents, then decodes them with TAEF2's frozen decoder.

    The decode of noisy latents has stains of wrong colours; that of the mean of the latents they
    may come from has not, and is soft instead. The estimate is trained by its own loss
    (`losses.latent_loss`), so no gradient passes from the picture to it.

    Args:
        width: channels of the denoiser; 0 decodes the latents as they are.
        num_blocks: residual blocks of the denoiser.
    """

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.denoise: LatentDenoiser | None = (
            LatentDenoiser(LATENT_CHANNELS, width, num_blocks) if width else None
        )
        self.decoder: TAEF2Decoder = TAEF2Decoder().requires_grad_(False)

    def estimate(self, latents: Tensor, latent_sigma: Tensor) -> Tensor:
        """Estimate of the clean latents (B, 32, h, w)."""
        return latents if self.denoise is None else self.denoise(latents, latent_sigma)

    def forward(self, latents: Tensor, latent_sigma: Tensor) -> Native:
        """Latents (B, 32, h, w) with noise of level (B,) to their estimate and its picture."""
        estimate = self.estimate(latents, latent_sigma)
        with torch.no_grad():
            picture = self.decoder(estimate.contiguous(memory_format=torch.channels_last))
        return Native(estimate, picture * 2 - 1)


class LatentDenoiser(nn.Module):
    """Posterior mean of clean latents z, from `(1-s) z + s eps` and s.

    The best linear guess for z of variance 1 plus a residual network scaled by the guess's standard
    error `s / sqrt((1-s)^2 + s^2)`: exact at s = 0, and the network's output has variance near 1
    everywhere (as in EDM, arXiv 2206.00364, section 5).

    Args:
        channels: of the latents.
        width: channels of the convolutions.
        num_blocks: residual blocks of two convolutions.
    """

    def __init__(self, channels: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.first: nn.Conv2d = replicating_conv(channels + 1, width)
        self.blocks: nn.ModuleList = nn.ModuleList(
            ResidualConvolutions(width) for _ in range(num_blocks)
        )
        self.last: nn.Conv2d = replicating_conv(width, channels)

    def reset_parameters(self) -> None:
        """Default initialisation of convolutions, and a network that predicts 0 at first."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, latents: Tensor, latent_sigma: Tensor) -> Tensor:
        """Noisy latents (B, C, h, w) and their levels (B,) to clean ones."""
        sigma = latent_sigma.to(latents.dtype).view(-1, 1, 1, 1)
        variance = (1 - sigma).square() + sigma.square()
        x = torch.cat((latents * variance.rsqrt(), sigma.expand_as(latents[:, :1])), dim=1)
        x = self.first(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        error = self.last(F.silu(x))
        return latents * ((1 - sigma) / variance) + error * (sigma * variance.rsqrt())


def check_geometry(unpacked: Geometry) -> None:
    """Raise `Mistake` unless TAEF2 decodes these latents."""
    if (unpacked.latent_channels, unpacked.latent_stride) != (LATENT_CHANNELS, STRIDE):
        raise Mistake(
            "adapter.native",
            f"taef2 decodes FLUX.2's {LATENT_CHANNELS} channels at stride {STRIDE}, not "
            f"{unpacked.latent_channels} at {unpacked.latent_stride} (after adapter.unpack); set "
            "it to none.",
        )
