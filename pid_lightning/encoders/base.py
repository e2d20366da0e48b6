"""Base class of the frozen encoders: images to normalised latents, and back where possible."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pid_lightning.checks import Mistake


class Encoder(nn.Module, ABC):
    """A frozen encoder from images to the latents that condition PiD.

    Construction is cheap and needs no network access: it builds (or describes) the module with
    random weights and sets the three attributes below. `load` loads the pretrained weights.

    Attributes:
        latent_channels: channels C of the latents.
        latent_stride: pixels of the encoder's input per latent cell.
        latent_space: name of the latent space, e.g. ``"sd3"`` or ``"dinov2"``; stored in
            checkpoints so that latents of different spaces are never mixed up.
    """

    latent_channels: int
    latent_stride: int
    latent_space: str

    @abstractmethod
    def load(self) -> None:
        """Load the pretrained weights; a second call does nothing.

        Raises:
            OSError: the weights are not available; the message names the id, how to use a local
                folder, and how to run with random weights on purpose.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, H/stride, W/stride)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to images (B, 3, h*stride, w*stride).

        Images are nominally in [-1, 1], not clamped: an autoencoder may overshoot.

        Raises:
            NoNativeDecoder: the family has no native decoder.
        """
        raise NoNativeDecoder(
            f"{self.latent_space} latents have no native decoder; use an autoencoder family "
            "(VAEPiD) if you need one."
        )

    @property
    def loaded(self) -> bool:
        """Whether there are weights: before `load` they are on the meta device."""
        return not any(parameter.is_meta for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def has_decoder(self) -> bool:
        """Whether `decode` is available, that is, defined by the subclass."""
        return type(self).decode is not Encoder.decode

    def check_loaded(self, inputs: Tensor | None = None) -> None:
        """Raise RuntimeError if there are no weights, unless the inputs are shapes only, too."""
        if not self.loaded and (inputs is None or not inputs.is_meta):
            raise RuntimeError(f"{type(self).__name__} has no weights yet: call load() first.")

    def check_images(self, images: Tensor) -> None:
        """Raise `Mistake` unless images are (B, 3, H, W) with sides that are multiples of
        `latent_stride`, and RuntimeError if there are no weights."""
        sides = images.shape[-2:]
        fits = images.ndim == 4 and images.shape[1] == 3 and all(sides)
        if not fits or any(side % self.latent_stride for side in sides):
            raise Mistake(
                "images",
                f"shape {tuple(images.shape)} is not (B, 3, H, W) with sides that are multiples of "
                f"{self.latent_stride}; give RGB, channels first, cropped or padded.",
            )
        self.check_loaded(images)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        """Move or cast; before `load` do nothing."""
        if not self.loaded:
            return self
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Encoder:
        """Stay in evaluation mode, because the encoder is frozen."""
        return super().train(False)


class NoNativeDecoder(RuntimeError):
    """The latent family has no native decoder."""
