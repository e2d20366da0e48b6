"""TAEF2 against values computed in fp64 from its published weights, and its place in FLUX.2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pid_lightning.checks import Mistake
from pid_lightning.encoders.latent_spaces import KNOWN_SPACES
from pid_lightning.encoders.taef2 import TAEF2
from pid_lightning.encoders.vae import build_vae_encoder
from pid_lightning.nn.geometry import pack
from pid_lightning.pictures.files import read_picture
from pid_lightning.pictures.metrics import psnr
from pid_lightning.pictures.resizing import reduce_picture
from pid_lightning.training.data.samples import centre_crop
from pid_lightning.training.data.sources import BUNDLED_PHOTOS

VECTORS = Path(__file__).parents[1] / "data" / "taef2.safetensors"


@pytest.fixture(scope="module")
def encoder():
    encoder = build_vae_encoder("taef2")
    encoder.load()
    return encoder


def test_it_equals_its_published_weights(encoder):
    vectors = load_file(VECTORS)
    close = {"rtol": 0, "atol": 1e-5}
    latents = encoder.encode(vectors["in.picture"] * 2 - 1)
    torch.testing.assert_close(latents, vectors["out.packed"], **close)
    for given, expected in (
        ("out.latents", "out.decoded"),
        ("in.noisy_latents", "out.decoded_noisy"),
    ):
        picture = encoder.decode(pack(vectors[given]))
        torch.testing.assert_close(picture, vectors[expected] * 2 - 1, **close)


def test_its_latents_are_flux2s(encoder):
    space = KNOWN_SPACES["flux2"]
    assert (encoder.latent_space, encoder.latent_channels) == (space.name, space.channels)
    assert encoder.latent_stride == space.stride
    photograph = read_picture(next(BUNDLED_PHOTOS.glob("test/lemur.jpg")))
    seen = reduce_picture(centre_crop(photograph, 512)[None], 2)
    latents = encoder.encode(seen)
    assert 0.7 < latents.std() < 1.1
    assert psnr(encoder.decode(latents).clamp(-1, 1), seen).item() > 25


def test_the_whole_picture_matters(encoder):
    """Why training crops latents and not pictures before they are encoded."""
    picture = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, part = encoder.encode(picture), encoder.encode(picture[..., :64])
    assert not torch.allclose(whole[..., 0], part[..., 0], atol=1e-3)


def test_construction_reads_nothing_and_dtypes_are_kept():
    encoder = TAEF2()
    assert not encoder.loaded
    encoder.load()
    encoder.bfloat16()
    latents = encoder.encode(torch.zeros(1, 3, 32, 48))
    assert (latents.dtype, latents.shape) == (torch.float32, (1, 128, 2, 3))
    assert encoder.decode(latents.double()).dtype == torch.float64


def test_its_weights_are_never_random():
    with pytest.raises(Mistake) as mistake:
        build_vae_encoder("taef2", pretrained=False)
    assert mistake.value.option == "vae"
