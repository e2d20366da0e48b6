"""Invariants of the time convention."""

from __future__ import annotations

import math

import pytest
import torch

from pid_lightning.diffusion import flow


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def test_time_runs_from_clean_to_noise() -> None:
    x0, eps = pictures(2, 3, 4, 4), pictures(2, 3, 4, 4, seed=1)
    assert torch.equal(flow.add_noise(x0, eps, torch.zeros(2)), x0)
    assert torch.equal(flow.add_noise(x0, eps, torch.ones(2)), eps)


def test_velocity_is_the_derivative_in_time() -> None:
    x0, eps = pictures(3, 3, 4, 4), pictures(3, 3, 4, 4, seed=1)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    slope = (flow.add_noise(x0, eps, t + 0.01) - flow.add_noise(x0, eps, t)) / 0.01
    assert torch.allclose(flow.velocity_of(x0, eps), slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_x0_comes_back_from_velocity(dtype: torch.dtype, tolerance: float) -> None:
    x0, eps = pictures(5, 3, 4, 4).to(dtype), pictures(5, 3, 4, 4, seed=1).to(dtype)
    t = torch.tensor([0.0, 0.02, 0.342, 0.999, 1.0], dtype=dtype)
    x_t = flow.add_noise(x0, eps, t)
    back = flow.x0_from_velocity(x_t, flow.velocity_of(x0, eps), t)
    assert back.dtype == dtype
    assert torch.allclose(back, x0, rtol=0, atol=tolerance * 10)


def test_bf16_pictures_are_computed_in_fp32() -> None:
    x0, eps = pictures(2, 3, 4, 4).bfloat16(), pictures(2, 3, 4, 4, seed=1).bfloat16()
    t = torch.tensor([0.3, 0.7])
    x_t = flow.add_noise(x0, eps, t)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, flow.add_noise(x0.float(), eps.float(), t))
    velocity = flow.velocity_of(x0, eps)
    exact = flow.x0_from_velocity(x0.float(), velocity.float(), t)
    assert torch.equal(flow.x0_from_velocity(x0, velocity, t), exact)


def test_velocity_from_x0_inverts_above_the_smallest_divisor() -> None:
    x0, eps = pictures(3, 3, 4, 4), pictures(3, 3, 4, 4, seed=1)
    t = torch.tensor([1.0, 0.05, 0.01], dtype=torch.float64)
    x_t = flow.add_noise(x0, eps, t)
    velocity = flow.velocity_from_x0(x_t, x0, t)
    assert torch.allclose(velocity[:2], (eps - x0)[:2], rtol=0, atol=1e-12)
    assert torch.allclose(velocity[2], (eps - x0)[2] * 0.01 / 0.05, rtol=0, atol=1e-12)


def test_per_sample_takes_any_number_of_dimensions() -> None:
    values = torch.arange(3, dtype=torch.bfloat16)
    for like in (torch.zeros(3, 2), torch.zeros(3, 2, 4, 4)):
        expanded = flow.per_sample(values, like)
        assert expanded.dtype == torch.float32
        assert expanded.shape == (3, *[1] * (like.ndim - 1))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_shift_keeps_the_ends_and_inverts(shift: float) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = flow.shift_time(t, shift)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert torch.allclose(flow.shift_time(shifted, 1 / shift), t, atol=1e-14)
    inside = slice(1, -1)
    assert ((shifted - t)[inside].sign() == (shift > 1) - (shift < 1)).all()


def test_shifts_compose_by_their_product() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    twice = flow.shift_time(flow.shift_time(t, 2.0), 3.0)
    assert torch.allclose(twice, flow.shift_time(t, 6.0), atol=1e-14)


def test_resolution_shift() -> None:
    assert flow.resolution_shift(2048, 2048) == pytest.approx(6)
    assert flow.resolution_shift(512, 512) == pytest.approx(3)
    assert flow.resolution_shift(1024, 4096) == pytest.approx(6)
    assert flow.resolution_shift(256, 1024) == flow.resolution_shift(1024, 256)


def test_training_times_are_logit_normal_then_shifted() -> None:
    times = flow.sample_times(40_000, generator=torch.Generator().manual_seed(0))
    assert times.shape == (40_000,)
    assert ((times > 0) & (times < 1)).all()
    assert float(times.median()) == pytest.approx(0.5, abs=0.01)
    assert float(times.logit().mean()) == pytest.approx(0, abs=0.02)
    assert float(times.logit().std()) == pytest.approx(1, abs=0.02)
    wide = flow.sample_times(40_000, std=1.6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(wide.double().logit(), 1.6 * times.double().logit(), atol=1e-3)
    shifted = flow.sample_times(40_000, 6.0, generator=torch.Generator().manual_seed(0))
    assert float(shifted.median()) == pytest.approx(6 / 7, abs=0.01)
    assert float(shifted.logit().mean()) == pytest.approx(math.log(6), abs=0.02)


def test_training_times_come_from_the_generator_only() -> None:
    state = torch.get_rng_state()
    first, again = (flow.sample_times(7, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
