"""Precomputed modulations of a student: the same velocities with fewer weights."""

from __future__ import annotations

import networks
import pytest
import torch

from pid_lightning import PiD
from pid_lightning.decoding.memory_estimate import weight_bytes
from pid_lightning.nn.fixed_times import fix_times

TIMES = (0.999, 0.866, 0.634, 0.342)


def make_denoiser(dtype: torch.dtype, text_length: int) -> PiD:
    """A denoiser with no zero weights."""
    return networks.random_network(text_length=text_length).to(dtype)


def velocity(denoiser: PiD, times: list[float]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    num = len(times)
    latents = torch.randn(num, denoiser.geometry.latent_channels, 2, 3, generator=generator)
    text = None
    if denoiser.text_embedding is not None:
        text = torch.randn(num, 5, denoiser.config.text_width, generator=generator)
        text = text.to(denoiser.dtype)
    with torch.no_grad():
        condition = denoiser.condition(latents, torch.full((num,), 0.3), text)
        side = denoiser.geometry.cell
        x_t = torch.randn(num, 3, 2 * side, 3 * side, generator=generator)
        return denoiser(x_t, torch.tensor(times), condition)


@pytest.mark.parametrize("text_length", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_velocities_at_those_times_are_the_same(dtype: torch.dtype, text_length: int) -> None:
    denoiser = make_denoiser(dtype, text_length)
    mixed = [0.342, 0.999, 0.634]
    exact = {time: velocity(denoiser, [time]) for time in TIMES}
    exact_mixed = velocity(denoiser, mixed)
    fix_times(denoiser, TIMES)
    for time in TIMES:
        assert torch.equal(velocity(denoiser, [time]), exact[time])
    # Matmuls over a batch may round differently from those over one sample.
    near = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(velocity(denoiser, mixed), exact_mixed, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_time_gives_no_picture_instead_of_a_wrong_one(dtype: torch.dtype) -> None:
    denoiser = make_denoiser(dtype, 0)
    fix_times(denoiser, TIMES)
    velocities = velocity(denoiser, [0.866, 0.87])
    assert velocities[0].isfinite().all()
    assert velocities[1].isnan().all()


def test_the_modulations_weights_are_gone() -> None:
    denoiser = make_denoiser(torch.float32, 5)
    config, before = denoiser.config, weight_bytes(denoiser)
    fix_times(denoiser, TIMES)
    streams = 2 * config.num_blocks
    layer, table = config.width + 1, len(TIMES)  # numbers per output: weights and bias, or times
    assert before - weight_bytes(denoiser) == 4 * streams * 6 * config.width * (layer - table)
