"""Samplers on distributions with a known exact velocity, and the source of their randomness."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from decoders import decode_by
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.diffusion import flow, sampling
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.nn import AdapterConfig, Geometry, PiD, PiDConfig

SHAPE = (2, 3, 4, 4)
STEPS = range(1, 5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


def point_mass(x0: Tensor) -> sampling.Velocity:
    """The exact velocity if the data is one picture: `(x_t - x0) / t`."""
    return lambda x_t, t: (x_t - x0) / flow.per_sample(t, x_t)


def gaussian(mean: float, std: float) -> sampling.Velocity:
    """The exact velocity `(x_t - E[x0 | x_t]) / t` if every pixel is N(mean, std^2)."""

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        t = flow.per_sample(t, x_t)
        variance = (1 - t) ** 2 * std**2 + t**2
        x0 = mean + (1 - t) * std**2 / variance * (x_t - (1 - t) * mean)
        return (x_t - x0) / t

    return velocity


# ---------------------------------------------------------------------- few steps


def test_fewer_steps_take_evenly_spread_times() -> None:
    times = sampling.STUDENT_TIMES
    assert times == (0.999, 0.866, 0.634, 0.342)
    taken = [sampling.few_step_times(times, steps) for steps in STEPS]
    assert taken[0] == (0.999,)
    assert taken[1] == (0.999, 0.634)
    assert taken[3] == times
    assert taken[2][0] == 0.999
    assert len(set(taken[2])) == 3


@pytest.mark.parametrize("steps", [0, -1, 5, 8])
def test_steps_that_would_repeat_times_are_refused(steps: int) -> None:
    called = []
    with pytest.raises(Mistake) as told:
        sampling.sample_few_steps(lambda x_t, t: called.append(t), noise(), steps)
    assert told.value.option == "steps"
    assert not called


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("steps", STEPS)
def test_few_steps_recover_a_point_mass(steps: int, stochastic: bool) -> None:
    x0 = noise(seed=1)
    g = torch.Generator().manual_seed(2)
    start = (1 - 0.999) * x0 + 0.999 * noise()
    sampled = sampling.sample_few_steps(point_mass(x0), start, steps, g, stochastic=stochastic)
    assert torch.allclose(sampled, x0, atol=1e-5)


@pytest.mark.parametrize("stochastic", [True, False])
def test_few_steps_are_their_equations(stochastic: bool) -> None:
    velocity = gaussian(0.3, 0.5)
    times = (*sampling.STUDENT_TIMES, 0.0)
    states = []

    def recorded(x_t: Tensor, t: Tensor) -> Tensor:
        states.append(x_t.clone())
        return velocity(x_t, t)

    x, g = noise(), torch.Generator().manual_seed(2)
    last = sampling.sample_few_steps(
        recorded, x, 4, torch.Generator().manual_seed(2), stochastic=stochastic
    )
    assert len(states) == 4
    assert torch.equal(states[0], x)
    after = [*states[1:], last]
    for step, (a, b) in enumerate(itertools.pairwise(times)):
        v = velocity(x, torch.full((2,), a))
        if stochastic and b > 0:
            x = (1 - b) * (x - a * v) + b * torch.randn(x.shape, generator=g)
        else:
            x = x + (b - a) * v
        assert torch.allclose(after[step], x, atol=1e-5)


def test_a_step_is_called_with_one_time_a_sample() -> None:
    seen = []

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x_t)

    sampling.sample_few_steps(velocity, noise().bfloat16(), 2, stochastic=False)
    assert [t.tolist() for t in seen] == [pytest.approx([t, t]) for t in (0.999, 0.634)]
    assert all(t.dtype == torch.float32 for t in seen)


# ------------------------------------------------------------------------- solver


@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_solver_recovers_a_point_mass(shift: float) -> None:
    x0 = noise(seed=1)
    sampled = sampling.sample_solver(point_mass(x0), noise(), 5, shift=shift)
    assert torch.allclose(sampled, x0, atol=1e-3)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.3, 0.5), (-0.6, 0.1)])
def test_solver_follows_a_gaussians_flow(mean: float, std: float) -> None:
    """The exact flow maps `eps` to `mean + std eps`."""
    eps = noise(1, 3, 100, 100)
    sampled = sampling.sample_solver(gaussian(mean, std), eps, 160, shift=1.0)
    assert (sampled - (mean + std * eps)).abs().max() < 0.03 * std
    assert float(sampled.mean()) == pytest.approx(mean, abs=0.02)
    assert float(sampled.std()) == pytest.approx(std, rel=0.02)


def test_solver_is_of_second_order() -> None:
    eps, start = noise().double(), 0.999
    spread = ((1 - start) ** 2 * 0.5**2 + start**2) ** 0.5
    exact = 0.3 + 0.5 * (eps - (1 - start) * 0.3) / spread  # the flow from the solver's start
    errors = [
        float((sampling.sample_solver(gaussian(0.3, 0.5), eps, steps, shift=1.0) - exact).norm())
        for steps in (80, 160)
    ]
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize(("steps", "shift"), [(1, 6.0), (2, 6.0), (25, 8.5), (320, 6.0)])
def test_solver_takes_any_number_of_steps(steps: int, shift: float) -> None:
    """With many steps, integer timesteps repeat although the times do not."""
    times = []

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return point_mass(torch.zeros(SHAPE))(x_t, t)

    sampled = sampling.sample_solver(velocity, noise(), steps, shift=shift)
    assert torch.allclose(sampled, torch.zeros(SHAPE), atol=1e-3)
    assert times == sorted(set(times), reverse=True)
    assert len(times) == steps


def test_solver_walks_down_its_times() -> None:
    times = []

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return gaussian(0, 1)(x_t, t)

    sampling.sample_solver(velocity, noise(), 7, shift=6.0)
    times = torch.stack(times)
    assert times.shape == (7, 2)
    assert (times.diff(dim=0) < 0).all()
    assert times.min() > 0
    assert times.max() <= 1


# ----------------------------------------------------------------------- guidance


def test_guidance_is_its_formula() -> None:
    with_text, without_text = point_mass(noise(seed=1)), point_mass(noise(seed=2))
    x_t, t = noise(), torch.tensor([0.4, 0.9])
    for scale in (0.0, 1.0, 3.0, 5.0):
        guided = sampling.guided(with_text, without_text, scale)(x_t, t)
        null = without_text(x_t, t)
        assert torch.allclose(guided, null + scale * (with_text(x_t, t) - null), atol=1e-5)


# --------------------------------------------------------------------- randomness


def samplers() -> dict[str, Callable[[Tensor, sampling.Generators], Tensor]]:
    velocity = gaussian(0.3, 0.5)
    return {
        "stochastic": lambda x, g: sampling.sample_few_steps(velocity, x, 4, g),
        "deterministic": lambda x, g: sampling.sample_few_steps(
            velocity, x, 4, g, stochastic=False
        ),
        "solver": lambda x, g: sampling.sample_solver(velocity, x, 4, shift=3.0),
    }


@pytest.mark.parametrize("name", samplers())
def test_samplers_leave_global_random_state_alone(name: str) -> None:
    start, state = noise(), torch.get_rng_state()
    first = samplers()[name](start, torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    again = samplers()[name](start, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    torch.set_rng_state(state)
    samplers()[name](start, sample_generators(0, "noise", range(2)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", samplers())
def test_samplers_leave_their_start_alone(name: str) -> None:
    start = noise()
    before = start.clone()
    samplers()[name](start, torch.Generator().manual_seed(1))
    assert torch.equal(start, before)


@pytest.mark.parametrize("name", samplers())
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    start, numbers = noise(3, 3, 4, 4), [7, 1, 4]
    together = samplers()[name](start, sample_generators(0, "noise", numbers))
    for i, number in enumerate(numbers):
        alone = samplers()[name](start[i : i + 1], sample_generators(0, "noise", [number]))
        assert torch.allclose(alone[0], together[i], rtol=0, atol=1e-6)


def test_noise_comes_from_the_generators() -> None:
    one = sampling.draw_noise(SHAPE, torch.Generator().manual_seed(1), "cpu")
    assert torch.equal(one, noise(seed=1))
    assert one.dtype == torch.float32
    each = sampling.draw_noise(SHAPE, sample_generators(0, "noise", [3, 8]), "cpu")
    alone = sampling.draw_noise((1, *SHAPE[1:]), sample_generators(0, "noise", [8]), "cpu")
    assert torch.equal(each[1:], alone)
    torch.manual_seed(5)
    own = sampling.draw_noise(SHAPE, None, "cpu")
    torch.manual_seed(5)
    assert torch.equal(own, torch.randn(SHAPE))


def test_one_generator_a_sample_or_one() -> None:
    with pytest.raises(Mistake) as told:
        sampling.draw_noise(SHAPE, sample_generators(0, "noise", range(3)), "cpu")
    assert told.value.option == "generator"


# ----------------------------------------------------------------------- decoding


def tiny_network() -> PiD:
    """A random network with patch size 8, scale 2 and 4-channel latents of stride 4."""
    config = PiDConfig(
        width=16,
        num_heads=2,
        num_blocks=1,
        patch_size=8,
        pixel_width=4,
        pixel_attention_width=16,
        pixel_num_heads=2,
        num_pixel_blocks=1,
        text_width=6,
        text_length=3,
        adapter=AdapterConfig(width=8, num_res_blocks=1),
    )
    torch.manual_seed(0)
    network = PiD(config, Geometry(4, 4, 2))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize("student_times", [sampling.STUDENT_TIMES, None])
def test_decoding_is_conditioning_then_sampling(student_times: tuple[float, ...] | None) -> None:
    network, latents, sigma = tiny_network(), noise(2, 4, 2, 3), torch.tensor([0.0, 0.3])
    state = torch.get_rng_state()
    decoded = decode_by(
        network,
        latents,
        sigma,
        student_times=student_times,
        steps=3,
        generator=sample_generators(0, "noise", [4, 5]),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert decoded.shape == (2, 3, 16, 24)
    assert decoded.dtype == torch.float32
    assert not decoded.requires_grad
    assert decoded.abs().max() <= 1

    generators = sample_generators(0, "noise", [4, 5])
    start = sampling.draw_noise((2, 3, 16, 24), generators, "cpu")
    with torch.no_grad():
        condition = network.condition(latents, sigma)

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            return network(x_t, t, condition)

        if student_times is not None:
            expected = sampling.sample_few_steps(velocity, start, 3, generators)
        else:
            shift = flow.resolution_shift(16, 24)
            expected = sampling.sample_solver(velocity, start, 3, shift=shift)
    assert torch.equal(decoded, expected.clamp(-1, 1))


def test_guided_decoding_weighs_text_against_null_text() -> None:
    network, latents, sigma = tiny_network(), noise(1, 4, 1, 1), torch.zeros(1)
    text, null = noise(1, 3, 6, seed=1), noise(1, 2, 6, seed=2)

    def decode(**options: object) -> Tensor:
        g = torch.Generator().manual_seed(0)
        times = sampling.STUDENT_TIMES
        return decode_by(network, latents, sigma, student_times=times, generator=g, **options)

    plain = decode(text=text)
    same = decode(text=text, null_text=text, guidance_scale=5.0)
    assert torch.allclose(same, plain, atol=1e-4)
    only_null = decode(text=text, null_text=null, guidance_scale=0.0)
    assert torch.allclose(only_null, decode(text=null), atol=1e-4)


@pytest.mark.parametrize("student_times", [sampling.STUDENT_TIMES, None])
@pytest.mark.parametrize("steps", [0, -1])
def test_decoding_refuses_no_steps(steps: int, student_times: tuple[float, ...] | None) -> None:
    """0 does not silently mean the default."""
    with pytest.raises(ValueError, match=rf"steps: {steps}"):
        decode_by(
            tiny_network(),
            noise(1, 4, 1, 1),
            torch.zeros(1),
            student_times=student_times,
            steps=steps,
        )
