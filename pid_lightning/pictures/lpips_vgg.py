"""LPIPS with VGG16, the perceptual distance to train with."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pid_lightning.files.tensors import fill, read_tensors

STAGES = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512,) * 4)


class LPIPSVGG(nn.Module):
    """Learned perceptual distance, version 0.1 with VGG16 (Zhang et al., arXiv 1801.03924).

    As `LPIPS`, on the features after the last ReLU of each of VGG16's five stages. It is the one to
    train with: trained with, the strides of AlexNet's first layer weave a texture into pictures.
    Parameter names: ``conv{0..12}.{weight,bias}``, ``lin{0..4}.weight``.
    """

    def __init__(self) -> None:
        super().__init__()
        number = 0
        for stage, widths in enumerate(STAGES):
            for num_inputs, num_outputs in pairwise(widths):
                convolution = nn.Conv2d(num_inputs, num_outputs, 3, padding=1)
                self.add_module(f"conv{number}", convolution)
                number += 1
            self.add_module(f"lin{stage}", nn.ParameterDict({"weight": torch.ones(widths[-1])}))

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of images (B, 3, H, W) in [-1, 1] after each stage; sides of 16 pixels or more.

        Channels are normalised to length 1 at every place.
        """
        shift = images.new_tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = images.new_tensor([0.458, 0.448, 0.450])[:, None, None]
        x = ((images - shift) / scale).contiguous(memory_format=torch.channels_last)
        number, features = 0, []
        for stage, widths in enumerate(STAGES):
            if stage > 0:
                x = F.max_pool2d(x, 2)
            for _ in pairwise(widths):
                x = torch.relu(self.get_submodule(f"conv{number}")(x))
                number += 1
            features.append(x * x.square().sum(dim=1, keepdim=True).add(1e-8).rsqrt())
        return features

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance (B,) between images (B, 3, H, W) in [-1, 1], sides of 16 pixels or more."""
        distance = images.new_zeros(len(images))
        pairs = zip(self.features(images), self.features(others), strict=True)
        for stage, (ours, theirs) in enumerate(pairs):
            weight = self.get_submodule(f"lin{stage}")["weight"].view(1, -1, 1, 1)
            distance = distance + ((ours - theirs).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return distance


def lpips_vgg_network(source: str | Path) -> LPIPSVGG:
    """LPIPS with VGG16, frozen and in fp32.

    Args:
        source: a ``.safetensors`` file of its weights.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: the file is damaged, or holds another network.
    """
    source = Path(os.path.expanduser(source))
    with torch.device("meta"):
        network = LPIPSVGG()
    fill(network, read_tensors(source), f"LPIPS {source}", "give the file of LPIPS with VGG16")
    return network.to(memory_format=torch.channels_last).requires_grad_(False).eval()
