"""Random numbers depend only on seed, purpose and sample."""

from __future__ import annotations

import itertools

import torch

from pid_lightning.diffusion.randomness import sample_generators


def draw(seed: int, purpose: str, samples: list[int]) -> list[list[float]]:
    generators = sample_generators(seed, purpose, samples)
    return [torch.randn(4, generator=g).tolist() for g in generators]


def test_equal_names_give_equal_numbers() -> None:
    assert draw(3, "noise", [5, 6]) == draw(3, "noise", [5, 6])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    first, second = draw(3, "noise", [5, 6])
    assert draw(3, "noise", [6]) == [second]
    assert draw(3, "noise", [6, 9, 5]) == [second, *draw(3, "noise", [9]), first]


def test_different_names_never_share_numbers() -> None:
    seeds, purposes, samples = (0, 1, 11), ("noise", "time", "noise 1"), [0, 1, 10, 11]
    drawn = [
        tuple(numbers)
        for seed, purpose in itertools.product(seeds, purposes)
        for numbers in draw(seed, purpose, samples)
    ]
    assert len(set(drawn)) == len(seeds) * len(purposes) * len(samples)


def test_numbers_are_those_of_every_run_to_come() -> None:
    """Changing them would change what resumed runs draw and the pictures of a seed."""
    (generator,) = sample_generators(1, "noise", [2])
    assert generator.initial_seed() == 6040257919019760522


def test_samples_are_independent_standard_normals() -> None:
    generators = sample_generators(0, "noise", range(2000))
    drawn = torch.stack([torch.randn(2, generator=g) for g in generators])
    assert (drawn.mean(0).abs() < 0.08).all()
    assert (drawn.std(0) - 1).abs().max() < 0.06
    assert abs(float(torch.corrcoef(torch.stack((drawn[:-1, 0], drawn[1:, 0])))[0, 1])) < 0.08


def test_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    draw(0, "noise", [1, 2, 3])
    assert torch.equal(torch.get_rng_state(), state)
