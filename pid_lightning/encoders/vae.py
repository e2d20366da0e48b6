"""Autoencoder family: diffusers' KL autoencoders, TAEF2, and the small one of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.latent_spaces import LatentSpace, space_of
from pid_lightning.encoders.pretrained import (
    check_images,
    check_loaded,
    random_weights,
    unreachable_weights,
    warn_random_weights,
)
from pid_lightning.encoders.small_vae import SmallVAE
from pid_lightning.encoders.taef2 import TAEF2
from pid_lightning.encoders.vae_sources import KNOWN_VAES, VAESource, find_vae


def build_vae_encoder(vae: str = "bundled", pretrained: bool = True) -> Encoder:
    """Build the encoder of an autoencoder.

    Args:
        vae: ``"taef2"`` for a `TAEF2`, ``"bundled"`` or a ``.safetensors`` file for a `SmallVAE`,
            else see `VAEEncoder`.
        pretrained: False builds a `VAEEncoder` with random weights.

    Raises:
        Mistake: `pretrained` is False for a `TAEF2` or a `SmallVAE`.
        FileNotFoundError, OSError: see `SmallVAE` and `VAEEncoder`.
    """
    is_file = vae.endswith(".safetensors")
    if vae not in ("bundled", "taef2") and not is_file:
        return VAEEncoder(vae, pretrained)
    if not pretrained:
        raise Mistake(
            "vae",
            f"{vae} always comes with its weights; leave out pretrained: false, or name "
            f"another one ({', '.join(KNOWN_VAES)}, a hub id or a local folder).",
        )
    if vae == "taef2":
        return TAEF2()
    return SmallVAE(vae if is_file else None)


class VAEEncoder(Encoder):
    """A diffusers `AutoencoderKL`, `AutoencoderKLFlux2` or `AutoencoderKLQwenImage`.

    Latents are the posterior's mode, normalised by `space`.

    Args:
        vae: ``"sd3"``, ``"flux"``, ``"sdxl"``, ``"flux2"`` or ``"qwen"`` (built offline), a hub id,
            or a local folder: of a diffusers autoencoder, or of a pipeline with one in ``vae/``.
        pretrained: whether `load` gets weights; until then the network is on the meta device.
            False builds random weights at once, and warns.

    Raises:
        FileNotFoundError: no such folder, or none with a ``config.json``.
        OSError: the configuration of an unknown hub id is not available.
        ValueError: the name or the autoencoder's class is not supported.
    """

    def __init__(self, vae: str, pretrained: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.source = find_vae(vae)
        with torch.device("meta") if pretrained else random_weights():
            self.network: nn.Module = _diffusers_class(self.source).from_config(
                _architecture(self.source.config)
            )
        if not pretrained:
            warn_random_weights(f"autoencoder {vae!r}")
        self._space = space_of(self.network)
        self.latent_channels = self._space.channels
        self.latent_stride = self._space.stride
        self.latent_space = self._space.name
        self.requires_grad_(False).eval()

    @property
    def space(self) -> LatentSpace:
        """The latent space; FLUX.2's comes from statistics in the network."""
        check_loaded(self.network, None, self.vae)
        return self._space

    def load(self) -> None:
        """Get the pretrained weights through diffusers' `from_pretrained`.

        Raises:
            OSError: the weights are not available.
            ValueError: the weights do not fill the network.
        """
        if self.loaded:
            return
        location, subfolder, _ = self.source
        try:
            network, report = _diffusers_class(self.source).from_pretrained(
                location,
                subfolder=subfolder,
                output_loading_info=True,
                low_cpu_mem_usage=False,  # True would require the accelerate package
            )
        except OSError as error:
            raise unreachable_weights(
                f"autoencoder {self.vae!r} ({location})",
                "vae: a local diffusers folder (config.json and its .safetensors, or a pipeline "
                "folder with vae/)",
                error,
            ) from error
        wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        if wrong:
            raise ValueError(
                f"The weights in {location} do not fit their own configuration: {len(wrong)} "
                "tensors are missing, unexpected or of another shape, the first is "
                f"{wrong[0]!r}; get the folder again."
            )
        self._space = space_of(network)  # now: a bfloat16 encoder keeps float32 statistics
        current = next(self.network.parameters())
        if current.dtype != network.dtype:  # diffusers warns of every cast
            network = network.to(current.dtype)
        device = None if current.is_meta else current.device
        self.network = network.to(device=device).requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as normalised latents (B, C, h, w).

        Latents have the images' dtype; normalisation is computed in at least float32.

        Raises:
            ValueError: H or W is not a multiple of `latent_stride`.
        """
        check_images(images, self.latent_stride)
        check_loaded(self.network, images, self.vae)
        pixels = images.to(next(self.network.parameters()).dtype)
        if self._is_video:
            pixels = pixels[:, :, None]  # (B, 3, 1, H, W)
        raw = self.network.encode(pixels).latent_dist.mode()
        return self.space.normalise(raw.to(images.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, C, h, w) to images (B, 3, h*stride, w*stride).

        Nominally in [-1, 1]; like the autoencoder's own output, not clamped.
        """
        check_loaded(self.network, latents, self.vae)
        raw = self.space.denormalise(latents).to(next(self.network.parameters()).dtype)
        if self._is_video:
            return self.network.decode(raw[:, :, None]).sample[:, :, 0].to(latents.dtype)
        return self.network.decode(raw).sample.to(latents.dtype)

    @property
    def _is_video(self) -> bool:
        return self.source.config["_class_name"] == "AutoencoderKLQwenImage"


def _diffusers_class(source: VAESource) -> Any:
    import diffusers

    return getattr(diffusers, source.config["_class_name"])


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}
