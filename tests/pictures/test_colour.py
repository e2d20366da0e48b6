"""Colour shifts against a native decode: measured, and matched without loss of detail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pid_lightning.pictures.colour import colour_shift, match_colour


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_colour_is_matched_and_detail_kept() -> None:
    native = 0.4 * noise(3, 48, 64).clamp(-1, 1)
    picture = torch.nn.functional.interpolate(native[None], scale_factor=4)[0]
    assert colour_shift(picture, native).largest < 1e-3
    cast = torch.tensor([0.1, 0.0, -0.2]).view(3, 1, 1)
    shift = colour_shift(picture + cast, native)
    assert shift.mean == pytest.approx((12.75, 0.0, -25.5), abs=1e-3)
    assert "red +12.8, green +0.0, blue -25.5" in str(shift).replace("-0.0", "+0.0")
    assert torch.allclose(match_colour(picture + cast, native), picture, atol=1e-5)
    checks = 0.1 * (-1.0) ** (torch.arange(192).view(-1, 1) + torch.arange(256))
    assert torch.allclose(
        match_colour(picture + checks + cast, native), picture + checks, atol=1e-5
    )


@pytest.mark.parametrize("size", [(88, 104), (7, 25)])
def test_an_enlargement_has_the_colours_of_its_native_decode(size: tuple[int, int]) -> None:
    native = noise(3, *size).clamp(-1, 1)
    picture = torch.nn.functional.interpolate(native[None], scale_factor=4)[0]
    assert colour_shift(picture, native).largest < 1e-3


def test_a_cast_of_half_a_picture_is_seen_and_matched() -> None:
    native = torch.zeros(3, 64, 128)
    sides = torch.where(torch.arange(512) < 256, 0.2, -0.2).expand(3, 256, -1)
    shift = colour_shift(sides, native)
    assert shift.mean == pytest.approx((0, 0, 0), abs=1e-3)
    assert shift.largest == pytest.approx(25.5, abs=1e-3)
    matched = match_colour(sides, native)
    away = torch.cat((matched[..., :192], matched[..., 320:]), dim=-1)
    assert away.abs().max() < 1e-4
    fine = 0.2 * (-1.0) ** (torch.arange(512) // 32).expand(3, 256, -1)  # 8 native pixels: detail
    assert torch.allclose(match_colour(fine, native), fine, atol=1e-4)
