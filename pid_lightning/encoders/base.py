"""What every latent family's frozen encoder offers: images to normalised latents, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """A frozen encoder from pictures to the latents that condition a PiD.

    Constructing one is cheap and offline: it builds (or describes) the network with random
    weights and sets the three attributes below. `load` brings the pretrained weights.

    Attributes:
        latent_channels: channels C of the latents.
        latent_stride: pixels of the encoder's input per latent cell.
        latent_space: name of the space the latents live in, e.g. ``"sd3"`` or ``"dinov2"``;
            written into checkpoints so that latents are never mixed up.
    """

    latent_channels: int
    latent_stride: int
    latent_space: str

    @abstractmethod
    def load(self) -> None:
        """Bring the pretrained weights; a second call does nothing.

        Raises:
            OSError: the weights cannot be had; the sentence names the id, how to point to a
                local folder and how to run with random weights on purpose.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, H/stride, W/stride)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to images (B, 3, h*stride, w*stride), not clamped.

        Exactly what the autoencoder gives: nominally in [-1, 1], beyond it where the autoencoder
        overshoots.

        Raises:
            NoNativeDecoder: the family has no decoder of its own.
        """
        raise NoNativeDecoder(
            f"{self.latent_space} latents have no native decoder to compare with: "
            "only autoencoder families (VAEPiD) have one."
        )

    @property
    def has_decoder(self) -> bool:
        """Whether `decode` works: true exactly where a subclass defines it."""
        return type(self).decode is not Encoder.decode

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        """Before `load` there is nothing to move: the weights are on the meta device."""
        if any(parameter.is_meta for parameter in self.parameters()):
            return self
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Encoder:
        """Stay in evaluation mode: a frozen encoder has no training behaviour."""
        return super().train(False)


class NoNativeDecoder(RuntimeError):
    """The latent family has no decoder of its own."""
