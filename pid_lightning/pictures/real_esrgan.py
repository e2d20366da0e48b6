"""Real-ESRGAN from a local file: the super-resolution half of the cascade that PiD replaces."""

from __future__ import annotations

import math
import os
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pid_lightning.files.tensors import fill, read_tensors
from pid_lightning.pictures.resizing import enlarge_picture, reduce_picture

FACTOR = 4  # enlargement by the network itself
NUM_OUTER = 6  # convolutions outside the blocks
NUM_BLOCK = 15  # convolutions per block
CURE = "give the file of Real-ESRGAN x4plus or of another RRDBNet for 4x"


class Upscaler(nn.Module):
    """A frozen `RRDBNet` that enlarges pictures by any scale, large ones in tiles.

    Tiles are computed with `margin` extra pixels, cut from the result, so peak memory is that of
    one tile. The published network's receptive field spans hundreds of pixels with decreasing
    weight: a photograph in tiles differed from the whole by up to 73 of 256 grey levels with a
    margin of 16, 30 with 32, 6 with 48 and less than 2 with 64 (0.02 on average).

    Args:
        network: the 4x network.
        tile: side of a tile in input pixels.
        margin: input pixels around a tile.
    """

    def __init__(self, network: RRDBNet, tile: int = 512, margin: int = 64) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.tile = tile
        self.margin = margin

    @torch.no_grad()
    def forward(self, images: Tensor, scale: int) -> Tensor:
        """Enlarge by `scale`: 4x by the network, then by bicubic resizing for other scales.

        Args:
            images: (B, 3, h, w) in [-1, 1]; clamped, as written pictures are.
            scale: integer, at least 1.

        Returns:
            (B, 3, h*scale, w*scale) clamped to [-1, 1], in the dtype of `images`.
        """
        weight = self.network.conv_first.weight
        pixels = ((images.clamp(-1, 1) + 1) / 2).to(weight.dtype)
        *_, height, width = images.shape
        enlarged = pixels.new_empty(*images.shape[:-2], height * FACTOR, width * FACTOR)
        tops, lefts = range(0, height, self.tile), range(0, width, self.tile)
        for top, left in product(tops, lefts):
            rows, rows_seen = self._spans(top, height)
            columns, columns_seen = self._spans(left, width)
            seen = self.network(pixels[..., rows_seen, columns_seen])
            kept = seen[..., _within(rows, rows_seen), _within(columns, columns_seen)]
            enlarged[..., _times(rows), _times(columns)] = kept
        enlarged = (enlarged * 2 - 1).clamp(-1, 1).to(images.dtype)
        if scale == FACTOR:
            return enlarged
        common = math.gcd(scale, FACTOR)
        return reduce_picture(enlarge_picture(enlarged, scale // common), FACTOR // common)

    def _spans(self, start: int, length: int) -> tuple[slice, slice]:
        """A tile along one axis, without and with its margin."""
        stop = min(start + self.tile, length)
        return slice(start, stop), slice(
            max(start - self.margin, 0), min(stop + self.margin, length)
        )


def upscaler_label(scale: int) -> str:
    """Name of the upscaling method in tables, with bicubic resizing where it is used."""
    return "Real-ESRGAN" if scale == FACTOR else "Real-ESRGAN + bicubic"


def _times(span: slice) -> slice:
    return slice(span.start * FACTOR, span.stop * FACTOR)


def _within(span: slice, seen: slice) -> slice:
    return _times(slice(span.start - seen.start, span.stop - seen.start))


def read_upscaler(path: str | Path) -> Upscaler:
    """Load a frozen fp32 upscaler, with its sizes inferred from the file.

    Args:
        path: a ``.safetensors`` or ``.pth`` file of an RRDBNet, with tensors named as in the
            published files (optionally inside ``params_ema``), or ``{i}.weight`` and ``{i}.bias``,
            numbered in the order of the forward pass.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or holds another network.
    """
    place = Path(os.path.expanduser(path))
    if not place.is_file():
        raise FileNotFoundError(
            f"evaluation.baseline: {path} does not exist or is not a file; {CURE}."
        )
    tensors = read_tensors(place)
    tensors = tensors.get("params_ema", tensors)
    numbered = "0.weight" in tensors
    published = ("conv_first.weight", "body.0.rdb1.conv1.weight")
    names = ("0.weight", "1.weight") if numbered else published
    for name in names:
        if name not in tensors:
            raise ValueError(f"evaluation.baseline: {path} holds no tensor {name!r}; {CURE}.")
    width, growth = (len(tensors[name]) for name in names)
    with torch.device("meta"):  # real parameters would consume the global random state
        network = RRDBNet(width, growth, (len(tensors) // 2 - NUM_OUTER) // NUM_BLOCK)
    if numbered:
        tensors = _published_names(network, tensors)
    fill(network, tensors, source=f"evaluation.baseline {path}", cure=CURE)
    return Upscaler(network)


def _published_names(network: RRDBNet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename numbered tensors to the network's names; other names stay as they are."""
    modules = network.named_modules()
    order = [name for name, module in modules if isinstance(module, nn.Conv2d)]
    kinds = ("weight", "bias")
    names = {f"{i}.{kind}": f"{name}.{kind}" for i, name in enumerate(order) for kind in kinds}
    return {names.get(name, name): value for name, value in tensors.items()}


RESIDUAL_SCALE = 0.2  # of every dense block, and again of every three dense blocks


class RRDBNet(nn.Module):
    """Residual-in-residual dense blocks (Wang et al., arXiv 1809.00219; arXiv 2107.10833).

    Submodules have the published names and are in the order of the forward pass.

    Args:
        width: features between blocks; 64 in the published 4x network.
        growth: features that each dense layer adds; 32 in the published network.
        num_blocks: blocks of three dense blocks each; 23 in the published network.
    """

    def __init__(self, width: int = 64, growth: int = 32, num_blocks: int = 23) -> None:
        super().__init__()
        self.conv_first = _convolution(3, width)
        self.body = nn.Sequential(*(_ResidualBlock(width, growth) for _ in range(num_blocks)))
        self.conv_body = _convolution(width, width)
        self.conv_up1 = _convolution(width, width)
        self.conv_up2 = _convolution(width, width)
        self.conv_hr = _convolution(width, width)
        self.conv_last = _convolution(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] to (B, 3, 4h, 4w), nominally in [0, 1], not clamped."""
        features = self.conv_first(images)
        features = features + self.conv_body(self.body(features))
        for convolution in (self.conv_up1, self.conv_up2):
            enlarged = F.interpolate(features, scale_factor=2, mode="nearest")
            features = _leaky(convolution(enlarged))
        return self.conv_last(_leaky(self.conv_hr(features)))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = _DenseBlock(width, growth)
        self.rdb2 = _DenseBlock(width, growth)
        self.rdb3 = _DenseBlock(width, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL_SCALE * self.rdb3(self.rdb2(self.rdb1(x)))


class _DenseBlock(nn.Module):
    """Five convolutions; each reads the block's input and all earlier outputs."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for i in range(4):
            self.add_module(f"conv{i + 1}", _convolution(width + i * growth, growth))
        self.conv5 = _convolution(width + 4 * growth, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat([seen, _leaky(layer(seen))], dim=1)
        return x + RESIDUAL_SCALE * self.conv5(seen)


def _convolution(num_inputs: int, num_outputs: int) -> nn.Conv2d:
    return nn.Conv2d(num_inputs, num_outputs, 3, padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
