"""From noise to a picture: the student's few steps, the teacher's solver, guidance.

Every sampler has the signature `sampler(velocity, noise, steps, generator, ...)` over a function
`velocity(x_t, t)` and draws from the given generator only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pid_lightning import flow

Velocity = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None

STUDENT_TIMES = (0.999, 0.866, 0.634, 0.342)


def draw_noise(shape: Sequence[int], generator: Generators, device: torch.device | str) -> Tensor:
    """Standard normal noise in fp32.

    Args:
        shape: (B, ...).
        generator: one for the batch, or one a sample, so that a sample's noise does not depend
            on the batch that it is in; None draws from torch's own.
        device: where the noise is wanted; it is drawn where the generator lives.

    Raises:
        ValueError: not as many generators as samples.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators for a batch of {shape[0]}: give one each."
            )
        return torch.cat([draw_noise((1, *shape[1:]), g, device) for g in generator])
    drawn_on = generator.device if generator is not None else device
    return torch.randn(tuple(shape), generator=generator, device=drawn_on).to(device)


def few_step_times(student_times: Sequence[float], steps: int) -> tuple[float, ...]:
    """`steps` evenly spread entries of the trained times: of 4, two are the first and third.

    Raises:
        ValueError: fewer than one step, or more than were trained: repeated times give grain.
    """
    trained = len(student_times)
    if not 1 <= steps <= trained:
        raise ValueError(
            f"steps: {steps} must lie between 1 and {trained}, the times this student was trained "
            f"for ({', '.join(map(str, student_times))}); more would repeat times."
        )
    return tuple(student_times[i * trained // steps] for i in range(steps))


def renoise(x0: Tensor, time: float, generator: Generators) -> Tensor:
    """`(1-t) x0 + t eps` with fresh noise, in place: to `time`, where a stochastic step goes on."""
    eps = draw_noise(x0.shape, generator, x0.device)
    return flow.add_noise(x0, eps, x0.new_full((len(x0),), time), out=x0)


def sample_few_steps(
    velocity: Velocity,
    noise: Tensor,
    steps: int = 4,
    generator: Generators = None,
    *,
    student_times: Sequence[float] = STUDENT_TIMES,
    stochastic: bool = True,
) -> Tensor:
    """The distilled student's sampler (DMD2, arXiv 2405.14867, section 4.5).

    For consecutive times (a, b): `x0 = x - a v`, then `x = (1-b) x0 + b eps` with fresh noise
    (stochastic) or `x += (b-a) v` (deterministic); the last step gives x0.

    Args:
        velocity: `velocity(x_t, t)` with t (B,); x_t changes in place afterwards.
        noise: the start (B, 3, H, W), standard normal.
        steps: at most as many as `student_times`.
        generator: source of the fresh noise.
        student_times: times the student was trained for, from noise to clean.
        stochastic: fresh noise at every step, or none.

    Returns:
        x0 (B, 3, H, W) in fp32, near [-1, 1] and not yet clamped to it.

    Raises:
        ValueError: a number of steps that the student was not trained for.
    """
    times = (*few_step_times(student_times, steps), 0.0)
    x = noise.float()
    del noise  # a large picture's tensors are let go as soon as they were read
    for step, (now, after) in enumerate(itertools.pairwise(times), start=1):
        t = x.new_full((len(x),), now)
        v = velocity(x, t)
        if after > 0 and stochastic:
            # A large picture's fresh memory takes seconds: only the caller's noise is left alone.
            x = flow.x0_from_velocity(x, v, t, out=None if step == 1 else x)
            del v
            x = renoise(x, after, generator)
        else:
            x = x.add(v, alpha=after - now)
            del v
    return x


def sample_solver(
    velocity: Velocity,
    noise: Tensor,
    steps: int = 25,
    generator: Generators = None,
    *,
    shift: float,
) -> Tensor:
    """The teacher's sampler: DPM-Solver++ 2M (arXiv 2211.01095) on flow times, by diffusers.

    Deterministic: `generator` is part of the signature and draws nothing.

    Args:
        velocity: `velocity(x_t, t)` with t (B,).
        noise: the start (B, 3, H, W), standard normal.
        steps: evaluations of `velocity`.
        generator: unused.
        shift: see `flow.resolution_shift`.

    Returns:
        x0 (B, 3, H, W) in fp32, near [-1, 1] and not yet clamped to it.

    Raises:
        ValueError: fewer than one step.
    """
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    if steps < 1:
        raise ValueError(f"steps: {steps} must be at least 1.")
    scheduler.set_timesteps(steps, device=noise.device)
    scheduler.set_begin_index(0)  # timesteps are whole numbers and may repeat, so none is looked up
    x = noise.float()
    del noise
    for step, timestep in enumerate(scheduler.timesteps):
        t = x.new_full((len(x),), float(scheduler.sigmas[step]))
        x = scheduler.step(velocity(x, t), timestep, x).prev_sample
    return x


def guided(with_text: Velocity, without_text: Velocity, guidance_scale: float) -> Velocity:
    """Classifier-free guidance on the text: `v_null + g (v_text - v_null)` (arXiv 2207.12598).

    The latents are given to both branches. Two evaluations, not one of a doubled batch: from 512
    pixels a side on they take the same time, and half the memory.
    """

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        null = without_text(x_t, t)
        return null + guidance_scale * (with_text(x_t, t) - null)

    return velocity
