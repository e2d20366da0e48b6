"""A small photograph autoencoder: principal components of 8 x 8 blocks plus convolutions.

The linear path alone is the best linear code of its size. Two parallel convolutional branches are
initialised to zero, so training starts at the linear code's error and only goes down from there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pid_lightning.checks import Mistake


class SmallAutoencoder(nn.Module):
    """Encodes images (B, 3, H, W) in [-1, 1] to latents (B, C, H/stride, W/stride) and back.

    Latents have mean 0 and standard deviation 1 per channel on photographs: `encode` normalises
    by the stored `latent_mean` and `latent_std`, and `decode` undoes it. A new network is random:
    call `init_principal_components` or load weights.

    Args:
        latent_channels: channels C of the latents.
        latent_stride: side of a block in pixels, a multiple of 4.
        width: channels of the branches on the latent grid.
        num_encoder_blocks: residual blocks of the encoder's branch.
        num_decoder_blocks: residual blocks of the decoder's branch.
        refine_width: channels of the decoder's last layers, at half the image resolution.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        latent_stride: int = 8,
        width: int = 160,
        num_encoder_blocks: int = 3,
        num_decoder_blocks: int = 4,
        refine_width: int = 32,
    ) -> None:
        super().__init__()
        if latent_stride % 4:
            raise Mistake("latent_stride", f"{latent_stride} must be a multiple of 4.")
        self.config: dict[str, int] = {
            "latent_channels": latent_channels,
            "latent_stride": latent_stride,
            "width": width,
            "num_encoder_blocks": num_encoder_blocks,
            "num_decoder_blocks": num_decoder_blocks,
            "refine_width": refine_width,
        }
        self.latent_channels = latent_channels
        self.latent_stride = latent_stride
        stride = latent_stride

        self.linear_encoder: nn.Conv2d = nn.Conv2d(3, latent_channels, stride, stride=stride)
        self.linear_decoder: nn.ConvTranspose2d = nn.ConvTranspose2d(
            latent_channels, 3, stride, stride=stride
        )
        self.encoder: nn.Sequential = nn.Sequential(
            nn.PixelUnshuffle(stride),
            nn.Conv2d(3 * stride**2, width, 3, padding=1),
            *[ResidualBlock(width) for _ in range(num_encoder_blocks)],
            nn.SiLU(),
            zero_init(nn.Conv2d(width, latent_channels, 1)),
        )
        self.decoder: nn.Sequential = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *[ResidualBlock(width) for _ in range(num_decoder_blocks)],
            nn.SiLU(),
            nn.Conv2d(width, refine_width * (stride // 2) ** 2, 1),
            nn.PixelShuffle(stride // 2),
            ResidualBlock(refine_width),
            nn.SiLU(),
            zero_init(nn.Conv2d(refine_width, 3 * 2**2, 3, padding=1)),
            nn.PixelShuffle(2),
        )
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_channels, 1, 1))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, H/stride, W/stride).

        Raises:
            ValueError: a side is not a multiple of the stride.
        """
        return (self.encode_raw(images) - self.latent_mean) / self.latent_std

    def encode_raw(self, images: Tensor) -> Tensor:
        """`encode` without the normalisation, to measure `latent_mean` and `latent_std`."""
        check_sides(images, self.latent_stride)
        return self.linear_encoder(images) + self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to images (B, 3, h*stride, w*stride), about [-1, 1]."""
        raw = latents * self.latent_std + self.latent_mean
        return self.linear_decoder(raw) + self.decoder(raw)

    def forward(self, images: Tensor) -> Tensor:
        """Encode and decode images (B, 3, H, W) in [-1, 1]."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def init_principal_components(self, moments: Tensor) -> None:
        """Set the linear path to the first principal components of some pictures' P x P colour
        blocks, with unit-variance latents.

        Components are taken about the mean colour, not the mean block: blocks have no preferred
        position in a photograph, and the linear path has one bias per colour.

        Args:
            moments: summed `block_moments` of the pictures.
        """
        num, size = self.latent_channels, self.latent_stride
        dim = 3 * size**2
        count, total, outer = moments[-1], moments[:dim], moments[dim:-1].view(dim, dim)
        mean = total / count
        mean_colour = mean.view(3, -1).mean(1)
        shift = mean - mean_colour.repeat_interleave(size**2)
        covariance = outer / count - mean.outer(mean) + shift.outer(shift)
        variance, vectors = torch.linalg.eigh(covariance)  # ascending
        variance, vectors = variance.flip(0)[:num], vectors.flip(1)[:, :num]
        std = variance.clamp_min(1e-12).sqrt().float().view(-1, 1, 1, 1)  # (C, 1, 1, 1)
        basis = vectors.T.reshape(num, 3, size, size).float()  # (C, 3, P, P)
        mean_colour = mean_colour.float()  # (3,)
        self.linear_encoder.weight.copy_(basis / std)
        self.linear_encoder.bias.copy_(-torch.einsum("k,ckpq->c", mean_colour, basis / std))
        self.linear_decoder.weight.copy_(basis * std)
        self.linear_decoder.bias.copy_(mean_colour)


class ResidualBlock(nn.Module):
    """x + conv1x1(silu(conv3x3(silu(x)))) on (B, width, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial: nn.Conv2d = nn.Conv2d(width, width, 3, padding=1)
        self.mix: nn.Conv2d = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.silu(self.spatial(F.silu(x))))


def block_moments(batches: Iterable[Tensor], block_size: int) -> Tensor:
    """Sum the blocks of images (B, 3, H, W) and their outer products, and count them.

    Returns:
        One float64 vector (D + D*D + 1,), D = 3 * block_size**2, which adds up over batches and
        over the processes of a distributed run.

    Raises:
        Mistake: there are no batches, or a side is not a multiple of `block_size`.
    """
    dim = 3 * block_size**2
    total = torch.zeros(dim, dtype=torch.float64)
    outer = torch.zeros(dim, dim, dtype=torch.float64)
    count = 0
    for images in batches:
        check_sides(images, block_size)
        blocks = rearrange(
            images.double().cpu(), "b k (h p) (w q) -> (b h w) (k p q)", p=block_size, q=block_size
        )
        total += blocks.sum(0)
        outer += blocks.T @ blocks
        count += len(blocks)
    if count == 0:
        raise Mistake("batches", "there is none for principal components; check the data.")
    return torch.cat([total, outer.flatten(), torch.tensor([count], dtype=torch.float64)])


def check_sides(images: Tensor, stride: int) -> None:
    """Raise Mistake unless both sides of images (B, 3, H, W) are multiples of `stride`."""
    height, width = images.shape[-2:]
    if height % stride or width % stride:
        raise Mistake(
            "images",
            f"{height} x {width} is no multiple of {stride} a side; crop or resize them.",
        )


def zero_init(conv: nn.Conv2d) -> nn.Conv2d:
    """Zero the layer's weights and return it, so that a branch ending in it starts at zero."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
