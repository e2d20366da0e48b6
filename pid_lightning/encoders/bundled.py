"""The small autoencoder that ships with the package, as an encoder, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.pretrained import check_images, check_loaded, fill, read_tensors
from pid_lightning.nn.autoencoder import SmallAutoencoder
from pid_lightning.pictures import replaced_file

BUNDLED = Path(__file__).parent.parent / "assets" / "autoencoder.safetensors"


class BundledVAE(Encoder):
    """The small autoencoder that ships with the package: no network, no optional library.

    Until `load`, it is on the meta device, with the sizes that the file of its weights states.
    """

    latent_space = "pid-small"

    def __init__(self) -> None:
        super().__init__()
        from safetensors import safe_open

        with safe_open(str(BUNDLED), framework="pt") as file:  # reads its head only
            sizes = json.loads(file.metadata()["config"])
        with torch.device("meta"):
            self.network = SmallAutoencoder(**sizes)
        self.latent_channels = self.network.latent_channels
        self.latent_stride = self.network.latent_stride
        self.loaded = False
        self.requires_grad_(False).eval()

    def load(self) -> None:
        """Read the weights, which are part of the package.

        Raises:
            ValueError: the installed file is damaged, or of another network.
        """
        if self.loaded:
            return
        tensors = read_tensors(BUNDLED, "")
        fill(self.network, tensors, str(BUNDLED), "install pid_lightning again")
        self.loaded = True

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, H/stride, W/stride)."""
        check_images(images, self.latent_stride)
        check_loaded(self.network, images, "bundled")
        pixels = images.to(next(self.network.parameters()).dtype)
        return self.network.encode(pixels).to(images.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to images (B, 3, h*stride, w*stride), not clamped."""
        check_loaded(self.network, latents, "bundled")
        raw = latents.to(next(self.network.parameters()).dtype)
        return self.network.decode(raw).to(latents.dtype)


def save_autoencoder(network: SmallAutoencoder, path: str | Path, description: str) -> None:
    """Write the weights in half precision, with the config and a `description`, in one file."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().half() for name, value in network.state_dict().items()}
    state = {name: value.contiguous() for name, value in state.items()}
    metadata = {"config": json.dumps(network.config), "description": description}
    with replaced_file(path) as temporary:
        save_file(state, temporary, metadata=metadata)


def load_autoencoder(path: str | Path) -> SmallAutoencoder:
    """A `SmallAutoencoder` in fp32 and evaluation mode, from a file with its `config` in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file was not written by `save_autoencoder`.
        RuntimeError: the tensors do not fit the config, in name or shape.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no autoencoder file at {path}.")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "config" not in metadata:
            raise ValueError(f"{path} is no autoencoder file: its metadata has no config.")
        config = json.loads(metadata["config"])
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    network = SmallAutoencoder(**config)
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)


def load_bundled_autoencoder() -> SmallAutoencoder:
    """The autoencoder that comes with the package, frozen, in fp32, without any network."""
    return load_autoencoder(BUNDLED)
