"""TAEF2 as an encoder of FLUX.2's latents: bundled, small, and needs no optional library."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pid_lightning.encoders.base import Encoder
from pid_lightning.files import ASSETS
from pid_lightning.files.tensors import fill, read_tensors
from pid_lightning.nn.geometry import pack, unpack
from pid_lightning.nn.taef2 import LATENT_CHANNELS, STRIDE, TAEF2Decoder, TAEF2Encoder

BUNDLED = ASSETS / "taef2.safetensors"


def decoder_weights() -> dict[str, Tensor]:
    """The bundled weights of a `TAEF2Decoder`, in fp16."""
    return read_tensors(BUNDLED, "decoder.")


class TAEF2(Encoder):
    """TAEF2 (https://github.com/madebyollin/taesd, MIT), a distilled autoencoder that shares
    FLUX.2's latent space: what it encodes, `AutoencoderKLFlux2` decodes, and the reverse.

    Latents of a part of a picture differ from the part of a picture's latents, since a branch of
    the encoder sees all of it.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network: nn.ModuleDict = nn.ModuleDict(
                {"encoder": TAEF2Encoder(), "decoder": TAEF2Decoder()}
            )
        self.latent_channels = 4 * LATENT_CHANNELS
        self.latent_stride = 2 * STRIDE
        self.latent_space = "flux2"
        self.requires_grad_(False).eval()

    def load(self) -> None:
        """Read the bundled weights, in fp32.

        Raises:
            ValueError: the file is damaged.
        """
        if self.loaded:
            return
        tensors = read_tensors(BUNDLED)
        fill(self.network, tensors, str(BUNDLED), "install pid_lightning again")
        self.network.to(memory_format=torch.channels_last)  # a third faster on a CPU

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as normalised latents (B, 128, H/16, W/16)."""
        self.check_images(images)
        pixels = ((images + 1) / 2).to(self.dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return pack(self.network["encoder"](pixels)).to(images.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, 128, h, w) to images (B, 3, 16h, 16w)."""
        self.check_loaded(latents)
        raw = unpack(latents).to(self.dtype)
        raw = raw.contiguous(memory_format=torch.channels_last)
        return (self.network["decoder"](raw) * 2 - 1).to(latents.dtype)
