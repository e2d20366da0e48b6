"""Any upscaler from a local file: the super-resolution half of the cascade that PiD replaces."""

from __future__ import annotations

import math
import os
import re
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.files.tensors import building_at_most, check_weights, read_tensors
from pid_lightning.pictures.resizing import enlarge_picture, reduce_picture

MOST_TEMPORARY = 4  # bytes taken while a network is built, to each byte of its weights in fp32


class Upscaler(nn.Module):
    """A frozen network that enlarges pictures by any scale.

    Args:
        network: spandrel's `ImageModelDescriptor` of a network for colour pictures.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._enlarge = network
        self.network: nn.Module = network.model.requires_grad_(False).eval()

    def label(self, scale: int) -> str:
        """Name of the method in tables, with bicubic resizing where it is used."""
        name = self._enlarge.architecture.name
        return name if scale == self._enlarge.scale else f"{name} + bicubic"

    @torch.no_grad()
    def forward(self, images: Tensor, scale: int) -> Tensor:
        """Enlarge by the network, then by bicubic resizing where its own factor is not `scale`.

        Args:
            images: (B, 3, h, w) in [-1, 1]; clamped, as written pictures are.
            scale: integer, at least 1.

        Returns:
            (B, 3, h*scale, w*scale) clamped to [-1, 1], in the dtype of `images`.
        """
        pixels = (images.clamp(-1, 1) + 1) / 2
        enlarged = self._enlarge(pixels.float())  # clamped to [0, 1]
        enlarged = (enlarged * 2 - 1).to(images.dtype)
        factor = self._enlarge.scale
        common = math.gcd(scale, factor)
        return reduce_picture(enlarge_picture(enlarged, scale // common), factor // common)


def read_upscaler(path: str | Path) -> Upscaler:
    """Load a frozen fp32 upscaler of any architecture that spandrel knows.

    Args:
        path: a ``.safetensors`` or ``.pth`` file. The tensors of an RRDBNet (Real-ESRGAN) may also
            be named ``{i}.weight`` and ``{i}.bias``, in the order of the forward pass.

    Raises:
        Mistake: spandrel is not installed, or the file holds no upscaler that it knows.
    """
    try:
        from spandrel import ModelLoader, canonicalize_state_dict
    except ImportError as error:
        raise Mistake(
            "baseline", "needs spandrel: pip install 'pid_lightning[baselines]'."
        ) from error
    tensors = read_tensors(os.path.expanduser(path))
    numbers = {k: v for k, v in tensors.items() if v.is_floating_point()}
    check_weights(numbers, f"take another copy of {path}")
    num_bytes = MOST_TEMPORARY * (2**20 + sum(4 * value.numel() for value in tensors.values()))
    try:
        # Spandrel counts layers by the numbers in their names.
        if any(int(n) > len(tensors) for name in tensors for n in re.findall(r"\d+", name)):
            raise ValueError("layers that it does not hold")
        tensors = canonicalize_state_dict(_rrdb_names(tensors))
        # It draws weights before it loads them.
        with torch.random.fork_rng(devices=[]), building_at_most(len(tensors), num_bytes):
            network = ModelLoader().load_from_state_dict(tensors)
        assert (network.purpose, network.input_channels, network.output_channels) == ("SR", 3, 3)
    except Exception as error:  # it raises whatever a foreign file leads it to
        raise Mistake(
            "baseline", f"{path} holds no upscaler of colour pictures that spandrel knows."
        ) from error
    return Upscaler(network.float())


def _rrdb_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of an RRDBNet as in the published files where they are numbered."""
    num_blocks = (len(tensors) // 2 - 6) // 15  # each has 15 convolutions; 6 stand outside
    blocks = product(range(num_blocks), (1, 2, 3), (1, 2, 3, 4, 5))
    body = [f"body.{block}.rdb{dense}.conv{layer}" for block, dense, layer in blocks]
    layers = ["conv_first", *body, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    names = {
        f"{i}.{k}": f"{layer}.{k}" for i, layer in enumerate(layers) for k in ("weight", "bias")
    }
    numbered = tensors.keys() == names.keys()
    return {names[name]: value for name, value in tensors.items()} if numbered else tensors
