"""The small autoencoder of this package as an encoder: the bundled one, or one of your own."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.small_autoencoder import SmallAutoencoder
from pid_lightning.files import ASSETS
from pid_lightning.files.atomic import replaced_file
from pid_lightning.files.tensors import fill, opened_safetensors, read_tensors

BUNDLED = ASSETS / "autoencoder.safetensors"


class SmallVAE(Encoder):
    """A `SmallAutoencoder` from a file that `save_autoencoder` wrote; needs no optional library.

    Until `load`, the network is on the meta device, with the sizes stated in the file.

    Args:
        path: the file; None is the bundled autoencoder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or is not an autoencoder's.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self.path: Path = BUNDLED if path is None else Path(os.path.expanduser(path))
        with torch.device("meta"):
            self.network: SmallAutoencoder = SmallAutoencoder(**_read_sizes(self.path))
        self.latent_channels: int = self.network.latent_channels
        self.latent_stride: int = self.network.latent_stride
        # Two autoencoders never share a latent space, whatever their files are called.
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:8]
        self.latent_space: str = "pid-small" if path is None else f"pid-small-{digest}"
        self.requires_grad_(False).eval()

    def load(self) -> None:
        """Read the weights, in fp32.

        Raises:
            ValueError: the weights do not fit the sizes stated in the file.
        """
        if self.loaded:
            return
        fill(self.network, read_tensors(self.path), str(self.path), _cure(self.path))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as normalised latents (B, C, h, w)."""
        self.check_images(images)
        pixels = images.to(next(self.network.parameters()).dtype)
        return self.network.encode(pixels).to(images.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, C, h, w) to images (B, 3, h*stride, w*stride)."""
        self.check_loaded(latents)
        raw = latents.to(next(self.network.parameters()).dtype)
        return self.network.decode(raw).to(latents.dtype)


def _read_sizes(path: Path) -> dict[str, int]:
    """Constructor arguments of the network, from the file's metadata; the weights are not read."""
    if not path.is_file():
        raise FileNotFoundError(f"vae: {path} does not exist; {_cure(path)}.")
    try:
        with opened_safetensors(path) as file:
            return json.loads((file.metadata() or {})["config"])
    except (KeyError, ValueError) as error:
        told = f"{path} is no autoencoder of this package ({error}); {_cure(path)}."
        raise Mistake("vae", told) from error


def _cure(path: Path) -> str:
    if path == BUNDLED:
        return "install pid_lightning again"
    return "give the export_path of a run of configs/autoencoder.yaml"


def save_autoencoder(network: SmallAutoencoder, path: str | Path, description: str) -> None:
    """Write weights in half precision, with the network's sizes and a `description` as metadata."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().half() for name, value in network.state_dict().items()}
    state = {name: value.contiguous() for name, value in state.items()}
    metadata = {"config": json.dumps(network.config), "description": description}
    with replaced_file(path) as temporary:
        save_file(state, temporary, metadata=metadata)
