"""Decodes latents to pictures: condition once, then run the sampler the network was trained for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pid_lightning.diffusion import flow, sampling
from pid_lightning.diffusion.tiling import Tile, Tiles, blended_velocity
from pid_lightning.nn import Condition, PiD
from pid_lightning.nn.condition import Adapted

TEACHER_STEPS = 25


@torch.no_grad()
def decode_latents(
    denoiser: PiD,
    latents: Tensor,
    latent_sigma: Tensor,
    *,
    student_times: Sequence[float] | None,
    time_shift: float | None = None,
    steps: int | None = None,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    guidance_scale: float = 1.0,
    generator: sampling.Generators = None,
    tile: int | None = None,
    on_forward: Callable[[], None] | None = None,
) -> Tensor:
    """Decode latents to pictures.

    Args:
        denoiser: the network, on the device of `latents`.
        latents: normalised latents (B, C, h, w), with noise of level `latent_sigma`.
        latent_sigma: noise level (B,) of each sample's latents.
        student_times: times of a distilled student, sampled in few steps; None for a teacher,
            sampled by the solver.
        time_shift: shift of the teacher's solver, as in its training; None follows the size.
        steps: sampling steps; None is all of a student's times, or 25 for a teacher.
        text: caption features (B, L, D_text); None is the learned null.
        null_text: features of the empty or negative prompt for guidance; None likewise.
        guidance_scale: strength of the text guidance; 1 turns it off.
        generator: one, or one per sample; the only source of randomness.
        tile: side of the tiles in output pixels, see `tiling.Tiles`; None decodes without tiles.
        on_forward: called after each network evaluation: once per step, tile and branch.

    Returns:
        (B, 3, h*latent_stride*scale, w*latent_stride*scale) in [-1, 1], fp32.

    Raises:
        ValueError: latents, text, steps or tile do not fit the network.
    """
    steps = num_sampling_steps(student_times, steps)
    height, width = output_size(denoiser, latents)
    tiles = tiles_for(denoiser, height, width, tile)

    def velocity_of(condition: Condition) -> sampling.Velocity:
        return conditioned_velocity(denoiser, condition, null_text, guidance_scale, on_forward)

    shape = (latents.shape[0], 3, height, width)
    # Cached across steps: about one picture in total, where whole conditions would be several.
    adapted: dict[tuple[int, int], Adapted] = {}

    def velocity_of_tile(place: Tile) -> sampling.Velocity:
        corner = (place.rows.start, place.columns.start)
        if corner not in adapted:
            adapted[corner] = adapt_tile(denoiser, latents, latent_sigma, tiles, place)
        return velocity_of(denoiser.condition_on(adapted[corner], latent_sigma, text))

    if tiles is None:
        velocity = velocity_of(denoiser.condition(latents, latent_sigma, text))
    else:
        velocity = blended_velocity(velocity_of_tile, tiles)
    if student_times is not None:
        x0 = sampling.sample_few_steps(
            velocity,
            sampling.draw_noise(shape, generator, latents.device),
            steps,
            generator,
            student_times=student_times,
        )
    else:
        # The shift for the size that the network sees, as in its training.
        seen = (height, width) if tiles is None else tiles.shape
        shift = flow.resolution_shift(*seen) if time_shift is None else time_shift
        x0 = sampling.sample_solver(
            velocity,
            sampling.draw_noise(shape, generator, latents.device),
            steps,
            shift=shift,
        )
    return x0.clamp_(-1, 1)


def num_sampling_steps(student_times: Sequence[float] | None, steps: int | None) -> int:
    """The steps asked for, else as many as a student was trained for, or 25 of a teacher."""
    if steps is not None:
        return steps
    return TEACHER_STEPS if student_times is None else len(student_times)


def output_size(denoiser: PiD, latents: Tensor) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that latents (B, C, h, w) decode to."""
    return denoiser.geometry.output_size(latents)


def adapt_tile(
    denoiser: PiD, latents: Tensor, latent_sigma: Tensor, tiles: Tiles, place: Tile
) -> Adapted:
    """`PiD.adapt` for one tile, computed from its latents and a margin around them."""
    seen = place.widened(tiles.step, tiles.height, tiles.width)
    cell = denoiser.geometry.cell
    cells = (slice(span.start // cell, span.stop // cell) for span in seen)
    adapted = denoiser.adapt(latents[(..., *cells)], latent_sigma)
    rows, columns = (
        slice(span.start - wide.start, span.stop - wide.start)
        for span, wide in zip((place.rows, place.columns), seen, strict=True)
    )
    return adapted.parts([(rows, columns)] * len(latents), denoiser.config.patch_size)


def conditioned_velocity(
    denoiser: PiD,
    condition: Condition,
    null_text: Tensor | None = None,
    guidance_scale: float = 1.0,
    on_forward: Callable[[], None] | None = None,
) -> sampling.Velocity:
    """The velocity function under a condition, with optional guidance; see `decode_latents`."""

    def velocity_under(condition: Condition) -> sampling.Velocity:
        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            v = denoiser(x_t, t, condition).to(x_t.dtype)
            if on_forward is not None:
                on_forward()
            return v

        return velocity

    if guidance_scale == 1.0:
        return velocity_under(condition)
    null_condition = denoiser.without_text(condition, null_text)
    return sampling.guided(
        velocity_under(condition), velocity_under(null_condition), guidance_scale
    )


def tiles_for(denoiser: PiD, height: int, width: int, tile: int | None) -> Tiles | None:
    """The tiles of a picture of height x width output pixels; None if one covers it.

    Raises:
        ValueError: the size or the tile is not aligned.
    """
    denoiser.check_size(height, width)
    if tile is None:
        return None
    tiles = Tiles(height, width, tile, denoiser.alignment)
    return tiles if len(tiles) > 1 else None
