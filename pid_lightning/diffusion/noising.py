"""Noise on latents: how `latent_sigma` is drawn and what it means in each frame.

The noise in the latents and the level given to the gate must always agree, so the functions that
add noise take the sigma that the network is given.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pid_lightning.diffusion.flow import per_sample

Frame = Literal["flow", "variance_preserving"]


def sample_latent_sigma(
    batch_size: int,
    maximum: float = 0.8,
    probability: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Training noise levels (B,): uniform on [0, maximum] with `probability`, else 0."""
    device = generator.device if generator is not None else "cpu"
    sigma, draw = torch.rand(2, batch_size, generator=generator, dtype=torch.float32, device=device)
    return torch.where(draw < probability, sigma * maximum, 0.0)


def add_latent_noise(
    latents: Tensor, eps: Tensor, latent_sigma: Tensor, frame: Frame = "flow"
) -> Tensor:
    """Noisy latents at the level `latent_sigma` (B,) in [0, 1].

    Args:
        latents: clean normalised latents (B, C, h, w).
        eps: standard normal noise like `latents`.
        latent_sigma: 0 is clean, 1 is noise.
        frame: ``"flow"``: `(1-s) z + s eps`; ``"variance_preserving"`` (SDXL):
            `sqrt(1-s^2) z + s eps`.
    """
    sigma = per_sample(latent_sigma, latents)
    signal = {"flow": 1 - sigma, "variance_preserving": (1 - sigma.square()).sqrt()}[frame]
    return signal * latents + sigma * eps
