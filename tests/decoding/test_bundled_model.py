"""The model that ships: small, self-describing, offline, ahead of bicubic on noisy latents."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from PIL import Image
from safetensors import safe_open

from pid_lightning import PiDAutoencoder, PiDDecoder, stop_early
from pid_lightning.diffusion import tiling
from pid_lightning.diffusion.noising import add_latent_noise
from pid_lightning.files import hub
from pid_lightning.pictures.files import read_picture
from pid_lightning.pictures.resizing import enlarge_picture, reduce_picture
from pid_lightning.training.data.sources import BUNDLED_PHOTOS

NAME = "pid-small-flux2-4x"
SIDE = 192
LARGEST_BYTES = 24_000_000


def test_the_file_is_small_and_says_what_it_was_made_of() -> None:
    path = hub.find_model(NAME)
    assert path.stat().st_size <= LARGEST_BYTES
    with safe_open(str(path), framework="pt") as file:
        assert "photographs" in file.metadata()["description"]
    decoder = PiDDecoder.from_pretrained()
    assert decoder.info == PiDDecoder.from_pretrained(NAME).info
    assert (decoder.latent_space, decoder.scale) == ("flux2", 4)
    assert decoder.info.image_size is not None  # decides the tiles
    assert len(decoder.info.student_times) == 4


def test_noisy_latents_decode_better_than_natively() -> None:
    """On photographs it was not trained on."""
    decoder = PiDDecoder.from_pretrained(NAME, torch.float32)
    photos = torch.cat([_centre(path) for path in sorted((BUNDLED_PHOTOS / "test").glob("*.jpg"))])
    clean = decoder.encode(reduce_picture(photos, decoder.scale))
    eps = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for sigma, gain in ((0.2, 0.0), (0.4, 0.5)):
        level = torch.full((len(clean),), sigma)
        latents = add_latent_noise(clean, eps, level)
        ours = decoder.decode(latents, level, seed=0, progress=False)
        native = enlarge_picture(decoder.encoder.decode(latents), decoder.scale).clamp(-1, 1)
        assert _psnr(ours, photos) > _psnr(native, photos) + gain


@pytest.mark.slow
def test_tiles_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients across the borders of tiles are those at the same places of the same picture
    decoded with its tiles elsewhere, within 2%."""
    decoder, at_borders, elsewhere = PiDDecoder.from_pretrained(NAME, torch.float32), [], []
    for path in sorted((BUNDLED_PHOTOS / "test").glob("*.jpg")):
        latents = decoder.encode(reduce_picture(_centre(path, 448), decoder.scale))
        gradients, borders = [], []
        for overlap in (64, 128):
            monkeypatch.setattr(
                tiling, "default_overlap", lambda tile, step, overlap=overlap: overlap
            )
            picture = decoder.decode(latents, seed=0, tile=SIDE, progress=False)
            gradients.append(picture.diff(dim=-1).abs().mean(dim=(0, 1, 2)))
            tiles = tiling.Tiles(448, 448, SIDE, 64)
            sides = {side for t in tiles for side in (t.columns.start, t.columns.stop)}
            borders.append(sides - {0, 448})
        for mine, other in ((0, 1), (1, 0)):
            for column in borders[mine] - borders[other]:
                at_borders.append(gradients[mine][column - 1])
                elsewhere.append(gradients[other][column - 1])
    assert len(at_borders) >= 10
    assert sum(at_borders) / sum(elsewhere) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_tiles_are_near_the_whole() -> None:
    """Tiles against a whole of twice their side, on clean latents: above 26 dB."""
    decoder = PiDDecoder.from_pretrained(NAME, torch.float32)
    photos = torch.cat([_centre(path, 384) for path in sorted(BUNDLED_PHOTOS.glob("test/*.jpg"))])
    latents = decoder.encode(reduce_picture(photos, decoder.scale))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole is larger than what it was trained on
        whole, tiled = (
            decoder.decode(latents, seed=0, tile=tile, progress=False) for tile in (None, SIDE)
        )
    assert not torch.equal(whole, tiled)
    assert _psnr(whole, tiled) > 26


def test_a_picture_is_enlarged_by_one_command(tmp_path: Path) -> None:
    from pid_lightning.__main__ import main

    Image.new("RGB", (64, 40), (90, 140, 60)).save(tmp_path / "a.png")
    main(["decode", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--steps", "1"])
    assert Image.open(tmp_path / "out" / "a.png").size == (256, 160)
    told = json.loads((tmp_path / "out" / "a.json").read_text())
    assert told["model"] == NAME


def _centre(path: Path, side: int = SIDE) -> torch.Tensor:
    picture = read_picture(path)
    top, left = ((length - side) // 2 for length in picture.shape[-2:])
    return picture[None, :, top : top + side, left : left + side]


def _psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    return float(10 * (4 / (images - others).square().mean()).log10())


@pytest.mark.parametrize("name", ["flux2", "flux2_klein"])
def test_it_stands_in_flux2s_pipelines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures that are not square, of a loop that stops early and of one that ends."""
    made = tiny_pipelines.PIPELINES[name]()
    decoder = PiDDecoder.from_pretrained(dtype=torch.float32)
    made.pipe.vae = PiDAutoencoder(made.pipe.vae, decoder, steps=1)
    decode, given = decoder.decode, []

    def record(latents: torch.Tensor, sigma: float, *rest: object, **more: object) -> torch.Tensor:
        given.append((latents, sigma))
        return decode(latents, sigma, *rest, **more)

    monkeypatch.setattr(decoder, "decode", record)
    for stop in (stop_early(made.pipe, 3), None):
        more = {"num_images_per_prompt": 2, "callback_on_step_end": stop}
        pictures = tiny_pipelines.call(made, 4, **more)
        latents, sigma = given[-1]
        assert pictures.shape == (2, 3, 128, 256)
        assert latents.shape == (2, 128, 2, 4)
        assert sigma == (0 if stop is None else stop.latent_sigma)
        by_hand = decode(latents, sigma, steps=1, seed=0, progress=False)
        torch.testing.assert_close(pictures, by_hand / 2 + 0.5, atol=1e-5, rtol=0)
    early, late = given
    assert early[1] > late[1]
    assert not torch.allclose(early[0], late[0])
