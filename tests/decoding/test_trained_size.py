"""What the trained size and the trained times of a model decide about its decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from decoders import decode_by
from networks import random_network

from pid_lightning import PiDDecoder
from pid_lightning.checks import Mistake
from pid_lightning.decoding.tile_choice import trained_tile
from pid_lightning.diffusion.randomness import sample_generators

TIMES = (0.999, 0.866, 0.634, 0.342)


def test_the_trained_size_is_the_tile_of_larger_pictures_only() -> None:
    denoiser = random_network()
    assert trained_tile(denoiser, 128, 96, 128) is None
    assert trained_tile(denoiser, 129, 96, None) is None
    assert trained_tile(denoiser, 128, 144, 128) == 128
    assert trained_tile(denoiser, 144, 144, 100) == 96


def test_modules_decode_larger_pictures_in_tiles_of_the_trained_size() -> None:
    module = tiny.module()
    for weight in module.denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    module.image_size, module.student_times = 128, TIMES
    latents, sigma = torch.randn(1, 128, 2, 3), torch.zeros(1)
    generators = [sample_generators(0, "test", [0]) for _ in range(2)]
    ours = module.decode(latents, sigma, None, generators[0])
    options = {"student_times": TIMES, "steps": 2, "generator": generators[1]}
    tiled = decode_by(module.denoiser, latents, sigma, tile=128, **options)
    assert torch.equal(ours, tiled)


def test_a_bundled_student_decodes_the_same_and_is_not_saved(tmp_path: Path) -> None:
    decoder = PiDDecoder.from_pretrained(dtype=torch.float32)
    latents = torch.randn(1, decoder.info.geometry.latent_channels, 1, 2)
    exact = decoder.decode(latents, seed=0, progress=False)
    assert torch.allclose(decoder.fix_times().decode(latents, seed=0, progress=False), exact)
    with pytest.raises(Mistake) as told:
        decoder.save_pretrained(tmp_path)
    assert told.value.option == "save"
