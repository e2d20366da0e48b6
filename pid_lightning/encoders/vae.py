"""Autoencoder family: diffusers' autoencoders, and TAEF2."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.latent_spaces import VIDEO_CLASSES, LatentSpace, space_of
from pid_lightning.encoders.pretrained import building, first_line, reaching
from pid_lightning.encoders.taef2 import TAEF2
from pid_lightning.encoders.vae_sources import KNOWN_VAES, VAESource, find_vae
from pid_lightning.files.tensors import building_at_most, check_fit, check_weights

MOST_TENSORS, MOST_BYTES = 1000, 2**31  # of an autoencoder, in fp32


def build_vae_encoder(vae: str = "taef2", pretrained: bool = True) -> Encoder:
    """Build the encoder of an autoencoder.

    Args:
        vae: ``"taef2"`` for a `TAEF2`, else see `VAEEncoder`.
        pretrained: False builds a `VAEEncoder` with random weights.

    Raises:
        Mistake: `pretrained` is False for a `TAEF2`; or see `VAEEncoder`.
    """
    if vae != "taef2":
        return VAEEncoder(vae, pretrained)
    if not pretrained:
        raise Mistake(
            "vae",
            f"{vae} always comes with its weights; leave out pretrained: false, or name "
            f"another one ({', '.join(KNOWN_VAES)}, a hub id or a local folder).",
        )
    return TAEF2()


class VAEEncoder(Encoder):
    """A diffusers autoencoder of one of the `latent_spaces.SUPPORTED_CLASSES`.

    Latents are the posterior's mode, where there is one, normalised by `space`. Those of videos see
    a picture as a frame, and one with transparency as an opaque picture.

    Args:
        vae: ``"sd3"``, ``"flux"``, ``"sdxl"``, ``"flux2"``, ``"qwen"``, or the distilled
            ``"taesd3"``, ``"taef1"``, ``"taesdxl"`` (built offline), a hub id, or a local folder:
            of a diffusers autoencoder, or of a pipeline with one in ``vae/``.
        pretrained: whether `load` gets weights; until then the network is on the meta device.
            False builds random weights at once, and warns.

    Raises:
        Mistake: `vae` leads to none of these.
    """

    def __init__(self, vae: str, pretrained: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.source: VAESource = find_vae(vae)
        with building(f"autoencoder {vae!r}", pretrained):
            self.network, self._space = self._built()
        self._is_video = type(self.network).__name__ in VIDEO_CLASSES
        self.latent_channels: int = self._space.channels
        self.latent_stride: int = self._space.stride
        self.latent_space: str = self._space.name
        self.requires_grad_(False).eval()

    @property
    def space(self) -> LatentSpace:
        """The latent space; FLUX.2's comes from statistics in the network."""
        self.check_loaded()
        return self._space

    def load(self) -> None:
        """Get the pretrained weights through diffusers' `from_pretrained`.

        Raises:
            OSError: the weights are not available.
            Mistake: the weights do not fill the network.
        """
        if self.loaded:
            return
        location, subfolder, *_ = self.source
        with reaching(
            f"autoencoder {self.vae!r} ({location})",
            "set vae: a local diffusers folder (config.json and its .safetensors, or a pipeline "
            "folder with vae/), or set pretrained: false to run with random weights on purpose",
        ):
            network, report = type(self.network).from_pretrained(
                location,
                subfolder=subfolder,
                output_loading_info=True,
                low_cpu_mem_usage=False,  # True would require the accelerate package
            )
        wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        check_fit(wrong, location, "get the folder again")
        check_weights(dict(network.named_parameters()), "get the folder again")
        self.network = network.requires_grad_(False).eval()
        self._space = self._space_of(network)  # now: a bfloat16 encoder keeps float32 statistics

    def _built(self) -> tuple[nn.Module, LatentSpace]:
        import diffusers

        config = self.source.config
        sizes = {key: value for key, value in config.items() if not key.startswith("_")}
        try:
            with building_at_most(MOST_TENSORS, MOST_BYTES):
                network = getattr(diffusers, config["_class_name"]).from_config(sizes)
            return network, self._space_of(network)
        except Exception as error:  # diffusers raises whatever a foreign configuration leads it to
            raise Mistake(
                "vae", f"the configuration of {self.vae!r} cannot be built ({first_line(error)})."
            ) from error

    def _space_of(self, network: nn.Module) -> LatentSpace:
        space = space_of(network)
        return space if self.source.space is None else replace(space, name=self.source.space)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as normalised latents (B, C, h, w).

        Latents have the images' dtype; normalisation is computed in at least float32.

        Raises:
            Mistake: H or W is not a multiple of `latent_stride`.
        """
        self.check_images(images)
        pixels = images.to(self.dtype)
        if self.network.config.get("in_channels", 3) == 4:
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0)  # opaque
        if self._is_video:
            pixels = pixels[:, :, None]  # (B, 3, 1, H, W)
        raw = self.network.encode(pixels, return_dict=False)[0]
        raw = raw if isinstance(raw, Tensor) else raw.mode()
        return self.space.normalise(raw.to(images.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, C, h, w) to images (B, 3, h*stride, w*stride).

        Nominally in [-1, 1]; like the autoencoder's own output, not clamped.
        """
        self.check_loaded(latents)
        raw = self.space.denormalise(latents).to(self.dtype)
        if self._is_video:
            return self.network.decode(raw[:, :, None]).sample[:, :3, 0].to(latents.dtype)
        return self.network.decode(raw).sample.to(latents.dtype)
