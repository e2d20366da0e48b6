"""Tiles: coverage, weights that sum to one, exactness of per-pixel velocities, no seams."""

from __future__ import annotations

import itertools
import math

import networks
import pytest
import torch
from decoders import decode_by
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.decoding.latents import adapt_tile
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.diffusion.sampling import Velocity, sample_few_steps
from pid_lightning.diffusion.tiling import Tile, Tiles, blended_velocity, default_overlap
from pid_lightning.nn import Geometry, PiD

TIMES = (0.999, 0.866, 0.634, 0.342)
SHAPES = [(64, 64), (96, 160), (128, 64), (176, 80), (16, 208), (512, 144)]


def covered(tiles: Tiles) -> Tensor:
    total = torch.zeros(tiles.height, tiles.width, dtype=torch.float64)
    for tile in tiles:
        total[tile.rows, tile.columns] += tile.row_weights * tile.column_weights
    return total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("overlap", [None, 0, 16, 32, 48])
def test_weights_sum_to_one_at_every_pixel(shape: tuple[int, int], overlap: int | None) -> None:
    tiles = Tiles(*shape, tile=64, step=16, overlap=overlap)
    assert torch.allclose(covered(tiles), torch.ones(shape, dtype=torch.float64), atol=1e-12)
    assert all((tile.row_weights >= 0).all() for tile in tiles)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_aligned_alike_and_inside(shape: tuple[int, int]) -> None:
    tiles = Tiles(*shape, tile=64, step=16, overlap=32)
    for tile in tiles:
        for span, length, side in zip((tile.rows, tile.columns), shape, tiles.shape, strict=True):
            assert span.start % 16 == 0
            assert span.stop - span.start == side == min(64, length)
            assert 0 <= span.start < span.stop <= length
    assert max(tile.rows.stop for tile in tiles) == shape[0]
    assert max(tile.columns.stop for tile in tiles) == shape[1]


@pytest.mark.parametrize("overlap", [16, 32])
def test_neighbours_overlap_by_no_less_than_asked(overlap: int) -> None:
    for length in range(80, 800, 16):
        spans = sorted({(t.rows.start, t.rows.stop) for t in Tiles(length, 64, 64, 16, overlap)})
        pairs = itertools.pairwise(spans)
        assert all(first[1] - second[0] >= overlap for first, second in pairs)
        assert len(spans) == math.ceil((length - overlap) / (64 - overlap))


def test_cost_grows_linearly_with_pixels() -> None:
    per_pixel = [len(Tiles(n, n, 128, 16)) / n**2 for n in (512, 1024, 2048, 4096)]
    assert max(per_pixel[1:]) < 1.2 * min(per_pixel[1:])
    assert default_overlap(128, 16) == 32


@pytest.mark.parametrize(
    ("tile", "overlap", "option"),
    [
        (50, None, "tile"),
        (16, None, "tile"),
        (0, None, "tile"),
        (64, 64, "overlap"),
        (64, 8, "overlap"),
        (64, -16, "overlap"),
    ],
)
def test_tiles_that_make_no_progress_are_refused(tile: int, overlap: int, option: str) -> None:
    with pytest.raises(Mistake) as told:
        Tiles(128, 128, tile, 16, overlap)
    assert told.value.option == option


def test_a_velocity_of_each_pixel_alone_is_exact_when_tiled() -> None:
    """Through the whole sampler: tiles do not change a velocity that ignores neighbours."""
    tiles = Tiles(96, 160, 64, 16)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x_t - 0.2 + t.view(-1, 1, 1, 1)

    tiled = blended_velocity(lambda tile: velocity, tiles)
    noise = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    whole, parts = (
        sample_few_steps(v, noise, 4, sample_generators(3, "test", range(2)))
        for v in (velocity, tiled)
    )
    assert (whole - parts).abs().max() < 1e-5


def test_blended_velocity_has_no_jump_at_any_border() -> None:
    """Even if neighbouring tiles disagree completely, the blend is smooth."""
    tiles = Tiles(32, 512, 128, 16, 32)
    constants = {tile.columns.start: (-1.0) ** i for i, tile in enumerate(tiles)}

    def velocity_of(tile: Tile):
        return lambda x_t, t: torch.full_like(x_t, constants[tile.columns.start])

    blended = blended_velocity(velocity_of, tiles)(torch.zeros(1, 3, 32, 512), torch.zeros(1))
    assert blended.min() == -1
    assert blended.max() == 1
    steps = blended.diff(dim=-1).abs()
    # A cosine from 1 to -1 over 32 pixels is steepest at pi/32 per pixel; sin^2 windows divided by
    # their sum are a little steeper; a hard border would be 2.
    assert steps.max() < 2 * math.pi / 32


def network(seed: int = 0) -> PiD:
    """A network with random weights, so that the output depends on every input."""
    denoiser = PiD(networks.config(), Geometry(4, 4, 4)).eval()
    return networks.randomise(denoiser, seed, std=0.15).requires_grad_(False)


def decode(denoiser: PiD, latents: Tensor, tile: int | None) -> Tensor:
    return decode_by(
        denoiser,
        latents,
        torch.zeros(len(latents)),
        student_times=TIMES,
        generator=sample_generators(0, "test", range(len(latents))),
        tile=tile,
    )


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_tile_that_covers_all_is_the_whole() -> None:
    denoiser, latents = network(), noise(1, 4, 4, 6)
    whole = decode(denoiser, latents, None)
    assert torch.equal(decode(denoiser, latents, 96), whole)
    assert not torch.equal(decode(denoiser, latents, 64), whole)


def seam_ratio(denoiser: PiD, latents: Tensor, tiles: Tiles) -> float:
    """Mean gradient across tile borders divided by that across other patch borders, for tiles that
    disagree: each has its own positions and adds a constant of its own."""
    places = {(tile.rows.start, tile.columns.start): i for i, tile in enumerate(tiles)}
    sigma = torch.zeros(len(latents))

    def velocity_of(tile: Tile) -> Velocity:
        adapted = adapt_tile(denoiser, latents, sigma, tiles, tile)
        condition = denoiser.condition_on(adapted, sigma)
        own = 0.4 * (-1) ** places[tile.rows.start, tile.columns.start]
        return lambda x_t, t: denoiser(x_t, t, condition) + own

    start = noise(len(latents), 3, tiles.height, tiles.width)
    generator = torch.Generator().manual_seed(0)
    pictures = sample_few_steps(blended_velocity(velocity_of, tiles), start, 4, generator)
    across = pictures.diff(dim=-1).abs().mean(dim=(0, 1, 2))
    down = pictures.diff(dim=-2).abs().mean(dim=(0, 1, 3))
    borders = {b for t in tiles for b in (t.columns.start, t.columns.stop)} - {0, tiles.width}
    at = [i - 1 for i in borders]
    elsewhere = [i - 1 for i in range(16, tiles.width, 16) if i not in borders]
    return float((across[at] + down[at]).mean() / (across[elsewhere] + down[elsewhere]).mean())


def test_no_seams() -> None:
    """Gradients across tile borders are as elsewhere; without overlap they are larger."""
    denoiser, latents = network(), noise(1, 4, 12, 12)
    assert abs(seam_ratio(denoiser, latents, Tiles(192, 192, 64, 16)) - 1) < 0.02
    assert seam_ratio(denoiser, latents, Tiles(192, 192, 64, 16, overlap=0)) > 1.05


def test_features_at_a_tiles_border_have_seen_the_margin() -> None:
    """The margin is one step (one latent cell here): changes further away have no effect."""
    denoiser, latents = network(), noise(1, 4, 12, 4)
    near, far = latents.clone(), latents.clone()
    near[..., 4, :] += 1  # just below the first tile of 64 pixels = 4 cells
    far[..., 6:, :] += 1

    def first_tile(latents: Tensor) -> Tensor:
        tiles = Tiles(192, 64, 64, denoiser.alignment)
        return adapt_tile(denoiser, latents, torch.zeros(1), tiles, next(iter(tiles))).tokens

    assert first_tile(latents).shape[1:3] == (4, 4)
    assert not torch.equal(first_tile(near), first_tile(latents))
    assert torch.equal(first_tile(far), first_tile(latents))


@pytest.mark.parametrize("dim", [-2, -1])
def test_features_have_seen_the_margin_before_a_tile_too(dim: int) -> None:
    denoiser, latents = network(), noise(1, 4, 12, 12)
    near, far = latents.clone(), latents.clone()
    near.select(dim, 7).add_(1)  # the last tile of 64 pixels = 4 cells starts at cell 8
    far.narrow(dim, 0, 6).add_(1)

    def last_tile(latents: Tensor) -> Tensor:
        tiles = Tiles(192, 192, 64, denoiser.alignment)
        return adapt_tile(denoiser, latents, torch.zeros(1), tiles, [*tiles][-1]).tokens

    assert not torch.equal(last_tile(near), last_tile(latents))
    assert torch.equal(last_tile(far), last_tile(latents))


def test_latents_pass_the_adapter_once_a_tile() -> None:
    denoiser, latents = network(), noise(1, 4, 8, 8)
    passes = []
    denoiser.adapter.register_forward_hook(lambda *_: passes.append(1))
    num_tiles = len(Tiles(128, 128, 64, denoiser.alignment))
    decode(denoiser, latents, 64)
    assert len(passes) == num_tiles > 4


def test_cells_larger_and_smaller_than_patches_align() -> None:
    for stride, scale, step in ((8, 4, 32), (4, 2, 16), (4, 4, 16), (8, 1, 16)):
        denoiser = PiD(networks.config(), Geometry(4, stride, scale)).eval().requires_grad_(False)
        assert denoiser.alignment == step
        cells = 3 * step // (stride * scale)
        assert decode(denoiser, noise(1, 4, cells, cells), 2 * step).shape[-1] == 3 * step
