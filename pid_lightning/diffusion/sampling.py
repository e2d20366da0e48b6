"""Samplers: the student's few steps, the teacher's solver, and guidance.

Samplers integrate a function `velocity(x_t, t)` from noise and only draw from a given generator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from pid_lightning.checks import Mistake, check_at_least, check_between, shown
from pid_lightning.diffusion import flow
from pid_lightning.diffusion.randomness import Generators, draw_noise

Velocity = Callable[[Tensor, Tensor], Tensor]

STUDENT_TIMES = (0.999, 0.866, 0.634, 0.342)
MOST_TIMES = 1000


def check_student_times(option: str, times: Sequence[float]) -> None:
    """Raise `Mistake` unless times decrease within (0, 1]."""
    decrease = list(times) == sorted(set(times), reverse=True)
    if not 1 <= len(times) <= MOST_TIMES or not decrease or not 0 < times[-1] <= times[0] <= 1:
        raise Mistake(option, f"{shown(times)} must decrease within (0, 1], as [0.9, 0.5].")


def few_step_times(student_times: Sequence[float], steps: int) -> tuple[float, ...]:
    """Pick `steps` evenly spread entries of the trained times: 2 of 4 are the first and third.

    Raises:
        Mistake: fewer than one step, or more than trained: repeated times cause grain.
    """
    trained = len(student_times)
    check_between("steps", steps, 1, trained)
    return tuple(student_times[i * trained // steps] for i in range(steps))


def renoise(x0: Tensor, time: float, generator: Generators) -> Tensor:
    """Noise `x0` to `time` in place for the next stochastic step: `(1-t) x0 + t eps`, fresh eps."""
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
        velocity: `velocity(x_t, t)` with t (B,); x_t is overwritten after the call.
        noise: initial noise (B, 3, H, W), standard normal.
        steps: at most the number of `student_times`.
        generator: source of the fresh noise.
        student_times: times the student was trained for, from noise to clean.
        stochastic: whether to add fresh noise at every step.

    Returns:
        x0 (B, 3, H, W) in fp32, near [-1, 1] and not yet clamped to it.

    Raises:
        Mistake: more steps than the student was trained for, or none.
    """
    times = (*few_step_times(student_times, steps), 0.0)
    x = noise.float()
    del noise  # free a large picture's tensors as soon as possible
    for step, (now, after) in enumerate(itertools.pairwise(times), start=1):
        t = x.new_full((len(x),), now)
        v = velocity(x, t)
        if after > 0 and stochastic:
            # Allocating a large picture takes seconds, so only the caller's noise is not reused.
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
    *,
    shift: float,
) -> Tensor:
    """The teacher's sampler: DPM-Solver++ 2M (arXiv 2211.01095) on flow times, by diffusers.

    Args:
        velocity: `velocity(x_t, t)` with t (B,).
        noise: initial noise (B, 3, H, W), standard normal.
        steps: number of `velocity` evaluations.
        shift: see `flow.resolution_shift`.

    Returns:
        x0 (B, 3, H, W) in fp32, near [-1, 1] and not yet clamped to it.

    Raises:
        Mistake: fewer than one step.
    """
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    check_at_least("steps", steps, 1)
    scheduler.set_timesteps(steps, device=noise.device)
    scheduler.set_begin_index(0)  # integer timesteps may repeat, so avoid a lookup
    x = noise.float()
    del noise
    for step, timestep in enumerate(scheduler.timesteps):
        t = x.new_full((len(x),), float(scheduler.sigmas[step]))
        x = scheduler.step(velocity(x, t), timestep, x).prev_sample
    return x


def guided(with_text: Velocity, without_text: Velocity, guidance_scale: float) -> Velocity:
    """Classifier-free guidance on the text: `v_null + g (v_text - v_null)` (arXiv 2207.12598).

    Both branches get the latents. They are evaluated one after the other, not as a doubled batch:
    from 512 pixels a side on, that takes the same time and half the memory.
    """

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        null = without_text(x_t, t)
        return null + guidance_scale * (with_text(x_t, t) - null)

    return velocity
