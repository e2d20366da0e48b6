"""LPIPS, a learned perceptual distance, with its published weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from pid_lightning.files import ASSETS
from pid_lightning.files.tensors import fill, read_tensors

BUNDLED = ASSETS / "lpips_alex.safetensors"
SMALLEST_SIDE = 31  # below it AlexNet's second pooling has an empty output


class LPIPS(nn.Module):
    """Learned perceptual distance, version 0.1 (Zhang et al., arXiv 1801.03924).

    Squared differences of channel-normalised features, weighted by a 1 x 1 head, averaged over
    space, summed over five layers. Equals torchmetrics' networks, whose public class downloads
    their weights. Parameter names: ``features.{i}`` as in torchvision, ``lin{0..4}.weight``.

    Args:
        features: convolutions, ReLUs and poolings.
        compared: positions in `features` of the ReLUs whose outputs are compared.
    """

    def __init__(self, features: nn.Sequential, compared: Sequence[int]) -> None:
        super().__init__()
        self.features = features
        self.compared = compared
        for layer, position in enumerate(compared):
            width = features[position - 1].out_channels
            self.add_module(f"lin{layer}", nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance (B,) between images (B, 3, H, W) in [-1, 1], sides of 31 pixels or more for
        AlexNet, 16 for VGG16."""
        shift = images.new_tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = images.new_tensor([0.458, 0.448, 0.450])[:, None, None]
        a, b = (images - shift) / scale, (others - shift) / scale
        distance = images.new_zeros(len(images))
        for position, module in enumerate(self.features):
            a, b = module(a), module(b)
            if position in self.compared:
                head = self.get_submodule(f"lin{self.compared.index(position)}")
                weighted = (_unit(a) - _unit(b)).square() * head.weight
                distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))
        return distance


def alexnet_lpips() -> LPIPS:
    """LPIPS with AlexNet, the one to measure with; its weights are random."""
    features = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
    return LPIPS(features, compared=(1, 4, 7, 9, 11))


def vgg_lpips() -> LPIPS:
    """LPIPS with VGG16, the one to train with: trained with, the strides of AlexNet's first layer
    weave a texture into pictures. Its weights are random."""
    layers = []
    stages = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512,) * 4)
    for widths in stages:
        for num_inputs, num_outputs in pairwise(widths):
            layers += [nn.Conv2d(num_inputs, num_outputs, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return LPIPS(nn.Sequential(*layers[:-1]), compared=(3, 8, 15, 22, 29))


def _unit(features: Tensor) -> Tensor:
    return features * features.square().sum(dim=1, keepdim=True).add(1e-8).rsqrt()


def lpips_network(source: str | Path | None = None) -> LPIPS:
    """LPIPS with AlexNet and its published weights, frozen and in fp32.

    Args:
        source: a ``.safetensors`` file with ``features.{0,3,6,8,10}.{weight,bias}`` and
            ``lin{0..4}.weight``; None is the bundled one.

    Raises:
        OSError: the file does not exist.
        Mistake: it is damaged, or holds another network.
    """
    with torch.device("meta"):  # initialising parameters would advance the global random state
        network = alexnet_lpips()
    return _filled(network, BUNDLED if source is None else source, {})


def lpips_vgg_network(source: str | Path) -> LPIPS:
    """LPIPS with VGG16, frozen and in fp32.

    Args:
        source: a ``.safetensors`` file with ``conv{0..12}.{weight,bias}`` and
            ``lin{0..4}.weight``.

    Raises:
        OSError: the file does not exist.
        Mistake: it is damaged, or holds another network.
    """
    with torch.device("meta"):
        network = vgg_lpips()
    layers = enumerate(network.features)
    convolutions = [i for i, layer in layers if isinstance(layer, nn.Conv2d)]
    names = {f"conv{number}": f"features.{i}" for number, i in enumerate(convolutions)}
    return _filled(network, source, names).to(memory_format=torch.channels_last)


def _filled(network: LPIPS, source: str | Path, names: dict[str, str]) -> LPIPS:
    """The network with the weights of a file, where layers may have other `names`."""
    source = Path(os.path.expanduser(source))
    state = {}
    for name, value in read_tensors(source).items():
        layer, dot, kind = name.rpartition(".")
        value = value.reshape(1, -1, 1, 1) if layer.startswith("lin") else value
        state[names.get(layer, layer) + dot + kind] = value
    fill(network, state, f"LPIPS {source}", "give the file of this network")
    return network.requires_grad_(False).eval()
