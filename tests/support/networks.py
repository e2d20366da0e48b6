"""Networks small enough for a test, without Lightning, whose import takes seconds."""

from __future__ import annotations

from typing import Any

import torch

from pid_lightning.nn import AdapterConfig, Geometry, PiD, PiDConfig


def config(**changes: Any) -> PiDConfig:
    """The config of a network of 60,000 parameters without text."""
    settings = {
        "width": 32,
        "num_heads": 2,
        "num_blocks": 2,
        "patch_size": 16,
        "pixel_width": 4,
        "pixel_attention_width": 16,
        "pixel_num_heads": 2,
        "num_pixel_blocks": 1,
        "text_length": 0,
        "rope_reference": None,
        "adapter": AdapterConfig(width=16, num_res_blocks=1),
    }
    return PiDConfig(**(settings | changes))


def random_network(**changes: Any) -> PiD:
    """A network with no zero weights."""
    return randomise(PiD(config(**changes), Geometry(16, 8, 4)))


def randomise(network: torch.nn.Module, seed: int = 0, std: float = 0.1) -> torch.nn.Module:
    """Redraw all weights, so that outputs depend on every input; returns the network."""
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.data = std * torch.randn(weight.shape, generator=generator)
    return network
