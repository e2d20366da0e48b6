"""Autoencoder family: diffusers' KL autoencoders and the bundled small one, as encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.bundled import BundledVAE
from pid_lightning.encoders.pretrained import (
    check_images,
    check_loaded,
    random_weights,
    unreachable_weights,
    warn_random_weights,
)
from pid_lightning.encoders.vae_sources import KNOWN_VAES, VAESource, find_vae
from pid_lightning.latent_spaces import LatentSpace, space_of


def build_vae_encoder(vae: str = "bundled", pretrained: bool = True) -> Encoder:
    """`BundledVAE` for ``"bundled"``, else `VAEEncoder` of that name, hub id or folder."""
    if vae != "bundled":
        return VAEEncoder(vae, pretrained)
    if not pretrained:
        raise ValueError(
            "The bundled autoencoder always comes with its weights: leave out pretrained: false, "
            f"or name another vae ({', '.join(KNOWN_VAES)}, a hub id or a local folder)."
        )
    return BundledVAE()


class VAEEncoder(Encoder):
    """A diffusers `AutoencoderKL`, `AutoencoderKLFlux2` or `AutoencoderKLQwenImage`.

    Latents are the posterior's mode, normalised as `space` says.

    Args:
        vae: ``"sd3"``, ``"flux"``, ``"sdxl"``, ``"flux2"`` or ``"qwen"`` (geometry known, nothing
            fetched before `load`), a hub id, or a local folder: a diffusers autoencoder's, or a
            pipeline's that holds one in ``vae/``.
        pretrained: whether `load` brings weights; until then the network is on the meta device.
            False builds random weights at once, and warns.

    Raises:
        FileNotFoundError: no such folder, or none with a ``config.json``.
        OSError: an unknown hub id whose configuration cannot be had.
        ValueError: a name or an autoencoder class that is not supported.
    """

    def __init__(self, vae: str, pretrained: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.pretrained = pretrained
        self.source = find_vae(vae)
        self.loaded = not pretrained
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
        """The space of the latents; FLUX.2's is read from the statistics in the network."""
        check_loaded(self.network, None, self.vae)
        return self._space

    def load(self) -> None:
        """Bring the pretrained weights through diffusers' `from_pretrained`.

        Raises:
            OSError: the weights cannot be had.
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
                low_cpu_mem_usage=False,  # the other way wants the accelerate package
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
                f"tensors are missing, left over or of another shape, the first {wrong[0]!r}."
            )
        self._space = space_of(network)  # now: a bfloat16 encoder keeps float32 statistics
        current = next(self.network.parameters())
        device = None if current.is_meta else current.device
        self.network = network.to(device=device, dtype=current.dtype).requires_grad_(False).eval()
        self.loaded = True

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to the mode's normalised latents (B, C, h, w).

        Latents come back in the images' dtype; normalisation is computed in float32 at least.

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
        """Normalised latents (B, C, h, w) to images (B, 3, h*stride, w*stride).

        Exactly what the autoencoder's `decode` gives: nominally in [-1, 1], not clamped.
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
