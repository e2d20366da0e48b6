"""Models that build on TAEF2's decoder, from latents to pictures."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import tiny_pipelines
import torch
import torch.nn.functional as F

from pid_lightning import AdapterConfig, PiDAutoencoder, PiDDecoder, VAEPiD, stop_early
from pid_lightning.checks import Mistake
from pid_lightning.encoders.taef2 import decoder_weights
from pid_lightning.encoders.vae import VAEEncoder
from pid_lightning.files import models
from pid_lightning.files.published_layout import to_published
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


def test_tiles_show_what_the_whole_shows(path, latents):
    """The native decoder, whose group norm sees all of a picture, sees it once for all tiles."""
    decoder = PiDDecoder.from_pretrained(path)
    whole = decoder.decode(latents, tile=None, seed=0, progress=False)
    tiled = decoder.decode(latents, tile=192, seed=0, progress=False)
    assert psnr(tiled, whole).item() > 80


def test_flux2s_own_autoencoder_makes_its_latents(path):
    decoder = PiDDecoder.from_pretrained(path)
    with torch.device("meta"):
        theirs = VAEEncoder("flux2")
    assert theirs.latent_channels == decoder.info.geometry.latent_channels
    assert theirs.latent_stride == decoder.info.geometry.latent_stride
    assert theirs.latent_space == decoder.latent_space


@pytest.mark.parametrize("name", ["flux2", "flux2_klein"])
def test_it_stands_in_a_pipeline_that_stops_early(path, name, monkeypatch):
    """Two pictures that are not square, from latents packed in each pipeline's own way."""
    made = tiny_pipelines.PIPELINES[name]()
    decoder = PiDDecoder.from_pretrained(path)
    made.pipe.vae = PiDAutoencoder(made.pipe.vae, decoder)
    seen, condition = {}, decoder.denoiser.condition

    def record(latents, latent_sigma, *rest, **more):
        seen.update(latents=latents, sigma=latent_sigma)
        return condition(latents, latent_sigma, *rest, **more)

    monkeypatch.setattr(decoder.denoiser, "condition", record)
    stop = stop_early(made.pipe, 2)
    more = {"num_images_per_prompt": 2, "callback_on_step_end": stop}
    pictures = tiny_pipelines.call(made, 4, **more)
    assert pictures.shape == (2, 3, 128, 256)
    assert seen["latents"].shape == (2, 128, 2, 4)
    assert 0 < stop.latent_sigma == pytest.approx(seen["sigma"][0].item())
    by_hand = decoder.decode(seen["latents"], stop.latent_sigma, seed=0, progress=False)
    torch.testing.assert_close(pictures, by_hand / 2 + 0.5, atol=1e-5, rtol=0)
    unpacked = F.pixel_shuffle(seen["latents"], 2).to(decoder.dtype)
    native = decoder.denoiser.adapter.native(unpacked, seen["sigma"]).picture.float()
    assert psnr(by_hand, enlarge_picture(native, 4)).min() > 30


def test_the_published_layout_has_no_place_for_it(path):
    decoder = PiDDecoder.from_pretrained(path)
    with pytest.raises(Mistake):
        to_published(decoder.denoiser)
