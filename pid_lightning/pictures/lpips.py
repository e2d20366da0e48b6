"""LPIPS, a learned perceptual distance, with its published weights."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from pid_lightning.files import ASSETS
from pid_lightning.files.tensors import fill, read_tensors

BUNDLED = ASSETS / "lpips_alex.safetensors"


class LPIPS(nn.Module):
    """Learned perceptual distance, version 0.1 with AlexNet (Zhang et al., arXiv 1801.03924).

    Squared differences of the channel-normalised features after each ReLU, weighted by a 1 x 1
    head, averaged over space, summed over the five layers. Equals torchmetrics' network, whose
    public class downloads its weights. Parameter names: ``features.{0,3,6,8,10}`` as in
    torchvision, ``lin{0..4}.weight``.
    """

    smallest_side = 31  # below it the second pooling has an empty output

    def __init__(self) -> None:
        super().__init__()
        self.features: nn.Sequential = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        for i, width in enumerate((64, 192, 384, 256, 256)):
            self.add_module(f"lin{i}", nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance (B,) between images (B, 3, H, W) in [-1, 1], sides of 31 pixels or more."""
        shift = images.new_tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = images.new_tensor([0.458, 0.448, 0.450])[:, None, None]
        a, b = (images - shift) / scale, (others - shift) / scale
        distance = images.new_zeros(len(images))
        layer = 0
        for module in self.features:
            a, b = module(a), module(b)
            if isinstance(module, nn.ReLU):
                difference = (_unit(a) - _unit(b)).square()
                head = self.get_submodule(f"lin{layer}")
                distance = distance + head(difference).mean(dim=(1, 2, 3))
                layer += 1
        return distance


def _unit(features: Tensor) -> Tensor:
    return features * features.square().sum(dim=1, keepdim=True).add(1e-8).rsqrt()


def lpips_network(source: str | Path | None = None) -> LPIPS:
    """LPIPS with its published weights, frozen and in fp32.

    Args:
        source: a ``.safetensors`` file with ``features.{0,3,6,8,10}.{weight,bias}`` and
            ``lin{0..4}.weight``; None is the bundled one.

    Raises:
        Mistake: the file does not exist, is damaged, or holds another network.
    """
    source = BUNDLED if source is None else Path(os.path.expanduser(source))
    with torch.device("meta"):  # initialising parameters would advance the global random state
        network = LPIPS()
    state = {
        name: value.reshape(1, -1, 1, 1) if name.startswith("lin") else value
        for name, value in read_tensors(source).items()
    }
    fill(network, state, f"LPIPS {source}", "give the file of LPIPS with AlexNet")
    return network.requires_grad_(False).eval()
