"""Attention in windows: equal to masked attention, and to full attention with one window."""

from __future__ import annotations

import itertools

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pid_lightning.nn import Geometry, PiD
from pid_lightning.nn.attention import attend
from pid_lightning.nn.windows import Windows, attend_in_windows


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def network(text_length: int, num_blocks: int = 2) -> PiD:
    config = networks.config(text_length=text_length, num_blocks=num_blocks)
    denoiser = PiD(config, Geometry(4, 8, 4)).double().eval().requires_grad_(False)
    for i, weight in enumerate(denoiser.parameters()):
        weight.copy_(0.2 * draw(*weight.shape, seed=i))
    return denoiser


def test_every_patch_is_in_one_window() -> None:
    for length, side, shifted in itertools.product(range(1, 20), range(2, 9), (False, True)):
        covered = torch.zeros(length, 3)
        for rows, columns in Windows(length, 3, side, shifted):
            assert 0 < rows.stop - rows.start <= side, (length, side, shifted)
            covered[rows, columns] += 1
        assert (covered == 1).all(), (length, side, shifted)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("text_length", "text_queries"), [(0, False), (5, True), (5, False)])
def test_it_is_attention_under_a_mask(shifted: bool, text_length: int, text_queries: bool) -> None:
    rows, columns = 5, 7
    num = rows * columns
    q, k, v = draw(3, 2, 3, text_length + num, 12)
    q = q if text_queries else q[:, :, text_length:]
    windows = Windows(rows, columns, 3, shifted)
    number = torch.empty(rows, columns, dtype=torch.long)
    for i, place in enumerate(windows):
        number[place] = i
    same = number.flatten()[:, None] == number.flatten()
    seen = F.pad(same, (text_length, 0), value=True)  # all patches attend to the text
    if text_queries:
        seen = F.pad(seen, (0, 0, text_length, 0), value=True)  # and the text attends to everything

    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    expected = expected.transpose(1, 2).flatten(2)
    got = attend_in_windows(q, k, v, windows)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_one_window_is_the_whole() -> None:
    q, k, v = draw(3, 1, 2, 5 + 12, 12)
    for shifted in (False, True):
        windowed = attend_in_windows(q, k, v, Windows(3, 4, 4, shifted))
        assert torch.allclose(windowed, attend(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("text_length", [0, 5])
def test_the_network_sees_windows_until_they_are_undone(text_length: int) -> None:
    denoiser = network(text_length)
    latents, text = draw(2, 4, 3, 2), draw(2, 5, 8) if text_length else None
    if text is not None:
        text = draw(2, text_length, denoiser.config.text_width)
    condition = denoiser.condition(latents, torch.tensor([0.0, 0.5]), text)
    x, t = draw(2, 3, 96, 64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    exact = denoiser(x, t, condition)
    denoiser.attend_in_windows(96)
    assert torch.allclose(denoiser(x, t, condition), exact, rtol=0, atol=1e-12)
    denoiser.attend_in_windows(32)
    assert not torch.allclose(denoiser(x, t, condition), exact, rtol=0, atol=1e-3)
    denoiser.attend_in_windows(None)
    assert torch.equal(denoiser(x, t, condition), exact)


def test_the_second_block_sees_across_the_first_ones_borders() -> None:
    """Without text, a change in one corner stays in its window until a shifted block."""
    denoiser = network(0)
    denoiser.attend_in_windows(64)  # 4 x 4 patches, on a grid of 8 x 8
    condition = denoiser.condition(draw(1, 4, 4, 4), torch.zeros(1))
    x, t = draw(1, 3, 128, 128), torch.tensor([0.5], dtype=torch.float64)
    changed = x.clone()
    changed[..., 48:64, 48:64] += 1  # the inner corner of the first window
    moved = [
        (there - here).abs().amax(dim=(0, 1)) > 0
        for here, there in zip(
            denoiser.features(x, t, condition, (0, 1)),
            denoiser.features(changed, t, condition, (0, 1)),
            strict=True,
        )
    ]
    first = torch.zeros(8, 8, dtype=torch.bool)
    first[:4, :4] = True
    assert torch.equal(moved[0], first)
    second = first.clone()  # the shifted windows that overlap the first: rows and columns 0 to 5
    second[:6, :6] = True
    assert torch.equal(moved[1], second)
