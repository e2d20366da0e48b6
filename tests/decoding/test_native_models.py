"""Models that build on TAEF2's decoder, from latents to pictures."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from pid_lightning import AdapterConfig, PiDDecoder, VAEPiD
from pid_lightning.checks import Mistake
from pid_lightning.encoders.taef2 import decoder_weights
from pid_lightning.encoders.vae import VAEEncoder
from pid_lightning.files import models
from pid_lightning.files.published_layout import to_released
from pid_lightning.pictures.metrics import psnr
from pid_lightning.pictures.resizing import enlarge_picture


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model whose prediction is zero, so that it shows the enlarged native decode."""
    adapter = AdapterConfig(
        width=16,
        num_res_blocks=1,
        padding="replicate",
        unpack=2,
        upsampling="shuffle",
        native="taef2",
        denoise_width=8,
        denoise_blocks=1,
    )
    config = tiny.config(
        patch_size=8, prediction="x0", residual=True, refiner_width=8, adapter=adapter
    )
    module = VAEPiD(vae="taef2", denoiser=config)
    module.denoiser.adapter.native.decoder.load_state_dict(decoder_weights())
    info = dataclasses.replace(module.info, student_times=(0.999, 0.5), image_size=192)
    path = tmp_path_factory.mktemp("native") / "model.safetensors"
    models.save_model(module.denoiser, info, path, torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def latents():
    """Of a smooth picture, larger than a tile and not square."""
    return 0.8 * torch.randn(1, 128, 5, 4, generator=torch.Generator().manual_seed(0))


def test_a_file_holds_all_that_it_shows(path, latents):
    decoder = PiDDecoder.from_pretrained(path)
    native = enlarge_picture(decoder.encoder.decode(latents), 4).clamp(-1, 1)
    whole = decoder.decode(latents, tile=None, seed=0, progress=False)
    assert whole.shape == (1, 3, 320, 256)
    assert psnr(whole, native).item() > 35  # the file's weights are in bfloat16


def test_tiles_show_nearly_what_the_whole_shows(path, latents):
    """Not exactly: the native decoder's group norm sees a tile and its margin."""
    decoder = PiDDecoder.from_pretrained(path)
    whole = decoder.decode(latents, tile=None, seed=0, progress=False)
    tiled = decoder.decode(latents, tile=192, seed=0, progress=False)
    assert psnr(tiled, whole).item() > 20
    assert not torch.equal(tiled, whole)


def test_flux2s_own_autoencoder_makes_its_latents(path):
    decoder = PiDDecoder.from_pretrained(path)
    with torch.device("meta"):
        theirs = VAEEncoder("flux2")
    assert theirs.latent_channels == decoder.info.geometry.latent_channels
    assert theirs.latent_stride == decoder.info.geometry.latent_stride
    assert theirs.latent_space == decoder.latent_space


def test_the_published_layout_has_no_place_for_it(path):
    decoder = PiDDecoder.from_pretrained(path)
    with pytest.raises(Mistake):
        to_released(decoder.denoiser)
