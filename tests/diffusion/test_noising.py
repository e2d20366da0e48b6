"""Invariants of noise on latents."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from pid_lightning.diffusion import noising

SIGMA = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)


def latents(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 2, 3, 5, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("frame", get_args(noising.Frame))
def test_sigma_0_is_clean_and_1_is_noise(frame: str) -> None:
    z, eps = latents(), latents(1)
    noisy = noising.add_latent_noise(z, eps, SIGMA, frame)
    assert torch.equal(noisy[0], z[0])
    assert torch.equal(noisy[3], eps[3])


def test_frames_are_their_formulas() -> None:
    z, eps = latents(), latents(1)
    flow = noising.add_latent_noise(z, eps, SIGMA)
    assert torch.allclose(flow[1], 0.7 * z[1] + 0.3 * eps[1], rtol=0, atol=1e-14)
    preserving = noising.add_latent_noise(z, eps, SIGMA, "variance_preserving")
    assert torch.allclose(preserving[2], 0.6 * z[2] + 0.8 * eps[2], rtol=0, atol=1e-14)


def test_variance_preserving_keeps_the_variance() -> None:
    g = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 4, 1, 100, 100, generator=g)
    noisy = noising.add_latent_noise(z, eps, SIGMA, "variance_preserving")
    assert (noisy.flatten(1).std(1) - 1).abs().max() < 0.03


def test_bf16_latents_are_noised_in_fp32() -> None:
    z, eps = latents().bfloat16(), latents(1).bfloat16()
    noisy = noising.add_latent_noise(z, eps, SIGMA.float())
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, noising.add_latent_noise(z.float(), eps.float(), SIGMA.float()))


def test_training_levels_are_uniform_or_clean() -> None:
    sigma = noising.sample_latent_sigma(40_000, generator=torch.Generator().manual_seed(0))
    noisy = sigma[sigma > 0]
    assert len(noisy) / len(sigma) == pytest.approx(0.75, abs=0.01)
    assert float(noisy.max()) <= 0.8
    assert float(noisy.mean()) == pytest.approx(0.4, abs=0.01)
    assert float(noisy.var()) == pytest.approx(0.8**2 / 12, rel=0.05)
    for probability, share in ((0.0, 0), (1.0, 1)):
        g = torch.Generator().manual_seed(0)
        sigma = noising.sample_latent_sigma(100, 0.5, probability, g)
        assert float((sigma > 0).float().mean()) == share
        assert float(sigma.max()) <= 0.5


def test_training_levels_come_from_the_generator_only() -> None:
    state = torch.get_rng_state()
    drawn = [
        noising.sample_latent_sigma(7, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), state)
