"""How latents cover the output, and the packing of their cells into channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from pid_lightning.checks import Mistake, check_between, check_fields

LARGEST = 4096  # scale, or pixels of a cell: far beyond any, so that sizes stay countable


@dataclass(frozen=True)
class Geometry:
    """The latents of a network and how many output pixels a latent cell covers.

    Attributes:
        latent_channels: channels C of the latents.
        latent_stride: pixels of the encoder's input per latent cell.
        scale: side of the output divided by the side of the image the encoder saw.

    Raises:
        Mistake: one of them is below 1, or beyond anything known.
    """

    latent_channels: int
    latent_stride: int
    scale: int

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("latent_channels", "latent_stride", "scale"):
            check_between(name, getattr(self, name), 1, LARGEST)

    @property
    def cell(self) -> int:
        """Side in output pixels of a latent cell."""
        return self.latent_stride * self.scale

    def output_size(self, latents: Tensor) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that latents (B, C, h, w) decode to."""
        return latents.shape[-2] * self.cell, latents.shape[-1] * self.cell

    def unpacked(self, side: int) -> Geometry:
        """The latents after undoing a packing of `side` x `side` cells into channels."""
        return Geometry(self.latent_channels // side**2, self.latent_stride // side, self.scale)

    def alignment(self, patch_size: int) -> int:
        """Output sizes are multiples of this many pixels: whole patches and whole latent cells."""
        return math.lcm(patch_size, self.cell)

    def check_size(self, height: int, width: int, patch_size: int) -> None:
        """Check that an output size in pixels is a whole number of patches and of latent cells.

        Raises:
            Mistake: a side is not a positive multiple of `alignment`.
        """
        step = self.alignment(patch_size)
        if height % step or width % step or min(height, width) < step:
            raise Mistake(
                "size",
                f"{height} x {width} is not a multiple of {step} (patch_size and "
                "scale x latent_stride); use "
                f"{max(height // step, 1) * step} x {max(width // step, 1) * step}.",
            )

    def to_patch_grid(self, patch_size: int) -> tuple[int, int]:
        """(upsampling, folding) factors from the latent grid to the patch grid; one of them is 1.

        Raises:
            Mistake: neither grid divides the other.
        """
        if self.cell % patch_size and patch_size % self.cell:
            raise Mistake(
                "scale",
                f"{self.scale} does not fit: a latent cell covers {self.scale} x "
                f"{self.latent_stride} = {self.cell} output pixels, which must be a multiple or a "
                f"divisor of patch_size ({patch_size}); change scale or patch_size.",
            )
        return max(self.cell // patch_size, 1), max(patch_size // self.cell, 1)


def pack(latents: Tensor, side: int = 2) -> Tensor:
    """Fold side x side cells into channels, ``channel*side^2 + row*side + column``.

    FLUX.2's layout: (B, 32, 2h, 2w) to (B, 128, h, w). Height and width are multiples of `side`.
    """
    return rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=side, q=side)


def unpack(packed: Tensor, side: int = 2) -> Tensor:
    """Inverse of `pack`: FLUX.2's (B, 128, h, w) to (B, 32, 2h, 2w)."""
    return rearrange(packed, "b (c p q) h w -> b c (h p) (w q)", p=side, q=side)
