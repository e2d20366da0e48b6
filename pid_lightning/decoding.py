"""Latents to pictures: condition once, then the sampler that the network was trained for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pid_lightning import flow, sampling
from pid_lightning.nn import PiD

TEACHER_STEPS = 25


@torch.no_grad()
def decode_latents(
    denoiser: PiD,
    latents: Tensor,
    latent_sigma: Tensor,
    *,
    student_times: Sequence[float] | None,
    steps: int | None = None,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    guidance_scale: float = 1.0,
    generator: sampling.Generators = None,
    on_step: sampling.OnStep | None = None,
) -> Tensor:
    """Pictures from latents.

    Args:
        denoiser: the network, its weights on the device of `latents`.
        latents: normalised latents (B, C, h, w), with the noise that `latent_sigma` tells.
        latent_sigma: noise level (B,) of each.
        student_times: of a distilled student, sampled in few steps; None for a teacher, sampled
            by the solver.
        steps: network evaluations; None is all of a student's times or a teacher's 25.
        text: caption features (B, L, D_text); None is the learned null.
        null_text: features of the empty or negative prompt for guidance; None likewise.
        guidance_scale: of text over no text; 1 is none.
        generator: one, or one a sample; the only source of randomness.
        on_step: called with (number of steps done, x) after each.

    Returns:
        (B, 3, h*latent_stride*scale, w*latent_stride*scale) in [-1, 1], fp32.
    """
    condition = denoiser.condition(latents, latent_sigma, text)

    def with_text(x_t: Tensor, t: Tensor) -> Tensor:
        return denoiser(x_t, t, condition)

    velocity = with_text
    if guidance_scale != 1.0:
        null_condition = denoiser.without_text(condition, null_text)
        velocity = sampling.guided(
            with_text, lambda x_t, t: denoiser(x_t, t, null_condition), guidance_scale
        )

    height, width = condition.rows.shape[0], condition.columns.shape[0]
    shape = (latents.shape[0], 3, height, width)
    noise = sampling.draw_noise(shape, generator, latents.device)
    if student_times is not None:
        x0 = sampling.sample_few_steps(
            velocity,
            noise,
            len(student_times) if steps is None else steps,
            generator,
            student_times=student_times,
            on_step=on_step,
        )
    else:
        shift = flow.resolution_shift(height, width)
        x0 = sampling.sample_solver(
            velocity,
            noise,
            TEACHER_STEPS if steps is None else steps,
            generator,
            shift=shift,
            on_step=on_step,
        )
    return x0.clamp(-1, 1)
