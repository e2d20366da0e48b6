"""Decodes latents to pictures: condition once, then run the sampler of the plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pid_lightning.decoding.plan import Plan
from pid_lightning.diffusion.randomness import Generators
from pid_lightning.diffusion.sampling import Velocity, guided
from pid_lightning.diffusion.tiling import Tile, Tiles, blended_velocity
from pid_lightning.nn import Condition, PiD
from pid_lightning.nn.condition import Adapted


@torch.no_grad()
def decode_latents(
    denoiser: PiD,
    plan: Plan,
    latents: Tensor,
    latent_sigma: Tensor,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    generator: Generators = None,
    on_forward: Callable[[], object] | None = None,
) -> Tensor:
    """Decode latents to pictures as planned for them.

    Args:
        denoiser: the network, on the device of `latents`.
        plan: what `Plan.of` made for this network and latents of this shape.
        latents: normalised latents (B, C, h, w), with noise of level `latent_sigma`.
        latent_sigma: noise level (B,) of each sample's latents.
        text: caption features (B, L, D_text); None is the learned null.
        null_text: features of the empty or negative prompt for guidance; None likewise.
        generator: one, or one per sample; the only source of randomness.
        on_forward: called after each of the plan's forward passes.

    Returns:
        (B, 3, H, W) in [-1, 1], fp32.
    """

    def velocity_of(condition: Condition) -> Velocity:
        return conditioned_velocity(denoiser, condition, null_text, plan.guidance_scale, on_forward)

    # Cached across steps: about one picture in total, where whole conditions would be several.
    adapted: dict[tuple[int, int], Adapted] = {}
    whole: Adapted | None = None
    if plan.tiles is not None and is_adapted_whole(denoiser):
        whole = denoiser.adapt(latents, latent_sigma)

    def velocity_of_tile(place: Tile) -> Velocity:
        if whole is not None:
            part = part_of(whole, place, len(latents), denoiser.config.patch_size)
            return velocity_of(denoiser.condition_on(part, latent_sigma, text))
        corner = (place.rows.start, place.columns.start)
        if corner not in adapted:
            adapted[corner] = adapt_tile(denoiser, latents, latent_sigma, plan.tiles, place)
        return velocity_of(denoiser.condition_on(adapted[corner], latent_sigma, text))

    if plan.tiles is None:
        velocity = velocity_of(denoiser.condition(latents, latent_sigma, text))
    else:
        velocity = blended_velocity(velocity_of_tile, plan.tiles)
    return plan.sample(velocity, len(latents), generator, latents.device).clamp_(-1, 1)


def is_adapted_whole(denoiser: PiD) -> bool:
    """Whether tiles are parts of what the adapter makes of the whole picture: a native decoder
    norms over all it sees, and of a tile alone it shows paler colours."""
    return denoiser.adapter.native is not None


def part_of(whole: Adapted, place: Tile, batch_size: int, patch_size: int) -> Adapted:
    """A tile's part of what `PiD.adapt` made of whole pictures."""
    return whole.parts([(place.rows, place.columns)] * batch_size, patch_size)


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
    on_forward: Callable[[], object] | None = None,
) -> Velocity:
    """The velocity function under a condition, with optional guidance; see `decode_latents`."""

    def velocity_under(condition: Condition) -> Velocity:
        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            v = denoiser(x_t, t, condition).to(x_t.dtype)
            if on_forward is not None:
                on_forward()
            return v

        return velocity

    if guidance_scale == 1.0:
        return velocity_under(condition)
    null_condition = denoiser.without_text(condition, null_text)
    return guided(velocity_under(condition), velocity_under(null_condition), guidance_scale)
