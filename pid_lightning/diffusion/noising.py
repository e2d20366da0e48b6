"""Noise on latents: how `latent_sigma` is drawn and what it means in each frame.

The noise in the latents and the level given to the gate must always agree, so the functions that
add noise take the sigma that the network is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pid_lightning.checks import check_choice
from pid_lightning.diffusion.flow import per_sample

FRAMES = ("flow", "variance_preserving")


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
    latents: Tensor, eps: Tensor, latent_sigma: Tensor, frame: str = "flow"
) -> Tensor:
    """Noisy latents at the level `latent_sigma` (B,) in [0, 1].

    Args:
        latents: clean normalised latents (B, C, h, w).
        eps: standard normal noise like `latents`.
        latent_sigma: 0 is clean, 1 is noise.
        frame: ``"flow"``: `(1-s) z + s eps`; ``"variance_preserving"`` (SDXL):
            `sqrt(1-s^2) z + s eps`.

    Raises:
        ValueError: an unknown frame.
    """
    check_choice("frame", frame, FRAMES)
    sigma = per_sample(latent_sigma, latents)
    signal = 1 - sigma if frame == "flow" else (1 - sigma.square()).sqrt()
    return signal * latents + sigma * eps
