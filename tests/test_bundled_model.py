"""The model that ships: small, self-describing, offline, ahead of bicubic on noisy latents."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from pid_lightning import PiDDecoder, hub
from pid_lightning.noising import add_latent_noise
from pid_lightning.pictures import enlarge_picture, read_picture, reduce_picture
from pid_lightning.sources import BUNDLED_PHOTOS

NAME = "pid-small-vae-4x"
SIDE = 128  # what it was trained on
LARGEST_BYTES = 16 * 2**20


def test_the_file_is_small_and_says_what_it_was_made_of() -> None:
    path = hub.find_model(NAME)
    assert path.stat().st_size <= LARGEST_BYTES
    with safe_open(str(path), framework="pt") as file:
        assert "photographs" in file.metadata()["description"]
    decoder = PiDDecoder.from_pretrained(NAME)
    assert (decoder.latent_space, decoder.scale) == ("pid-small", 4)
    assert decoder.info.image_size == SIDE
    assert len(decoder.info.student_times) == 4


def test_noisy_latents_decode_better_than_natively() -> None:
    """On photographs it was not trained on: one decibel at least at sigma 0.4, half at 0.8."""
    decoder = PiDDecoder.from_pretrained(NAME, torch.float32)
    photos = torch.cat([_centre(path) for path in sorted((BUNDLED_PHOTOS / "test").glob("*.jpg"))])
    clean = decoder.encode(reduce_picture(photos, decoder.scale))
    eps = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for sigma, gain in ((0.4, 1.0), (0.8, 0.5)):
        level = torch.full((len(clean),), sigma)
        latents = add_latent_noise(clean, eps, level)
        ours = decoder.decode(latents, level, seed=0, progress=False)
        native = enlarge_picture(decoder.encoder.decode(latents), decoder.scale).clamp(-1, 1)
        assert _psnr(ours, photos) > _psnr(native, photos) + gain


def test_a_picture_is_enlarged_by_one_command(tmp_path: Path) -> None:
    from pid_lightning.__main__ import main

    Image.new("RGB", (64, 40), (90, 140, 60)).save(tmp_path / "a.png")
    main(["decode", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--steps", "1"])
    assert Image.open(tmp_path / "out" / "a.png").size == (256, 160)
    told = json.loads((tmp_path / "out" / "a.json").read_text())
    assert told["model"] == NAME


def _centre(path: Path) -> torch.Tensor:
    picture = read_picture(path)
    top, left = ((side - SIDE) // 2 for side in picture.shape[-2:])
    return picture[None, :, top : top + SIDE, left : left + SIDE]


def _psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    return float(10 * (4 / (images - others).square().mean()).log10())
