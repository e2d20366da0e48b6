"""The autoencoders and pipelines of diffusers 0.42: spaces, drop-in and early stop."""

from __future__ import annotations

import diffusers
import pytest
import torch
from later_pipelines import LATER, LATER_VAES, tiny_vae, to_normalised
from tiny_pipelines import HEIGHT, SCALE, WIDTH, call, decoder_for, flux, random_tensor
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.decoding.diffusers_vae import PiDAutoencoder
from pid_lightning.decoding.early_stop import stop_early
from pid_lightning.diffusion.noising import add_latent_noise
from pid_lightning.encoders.latent_spaces import KNOWN_SPACES, space_of
from pid_lightning.encoders.vae import VAEEncoder
from pid_lightning.encoders.vae_sources import TINY_VAES

STEPS, AT_STEP = 5, 3
SPACES = {  # name, channels, stride
    "wan": ("qwen", 16, 8),
    "qwen21": ("qwen21", 64, 16),
    "dc": ("dc", 32, 32),
    "tiny": ("tiny-16x8-1-0", 16, 8),
}


@pytest.mark.filterwarnings("ignore:.*have a standard deviation of")
@pytest.mark.parametrize("name", LATER_VAES)
def test_encoding_and_decoding_are_diffusers_own(name: str, tmp_path) -> None:
    """Raw latents are normalised by the numbers in the autoencoder's config, and come back."""
    vae = LATER_VAES[name]()
    space = space_of(vae)
    assert (space.name, space.channels, space.stride) == SPACES[name]
    vae.save_pretrained(tmp_path)
    encoder = VAEEncoder(str(tmp_path))
    encoder.load()
    images = random_tensor(2, 3, HEIGHT, WIDTH).clamp(-1, 1)

    seen = torch.cat((images, torch.ones(2, 1, HEIGHT, WIDTH)), 1) if name == "qwen21" else images
    is_video = name in ("wan", "qwen21")
    raw = vae.encode(seen[:, :, None] if is_video else seen, return_dict=False)[0]
    raw = raw if isinstance(raw, Tensor) else raw.mode()
    config = vae.config
    if is_video:
        mean, std = (
            torch.tensor(config[key]).view(1, -1, 1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        latents = ((raw - mean) / std)[:, :, 0]
    else:
        latents = raw * config.scaling_factor
    assert latents.shape == (2, space.channels, HEIGHT // space.stride, WIDTH // space.stride)
    torch.testing.assert_close(encoder.encode(images), latents)
    native = vae.decode(raw, return_dict=False)[0]
    native = native[:, :3, 0] if is_video else native
    torch.testing.assert_close(encoder.decode(latents), native, atol=1e-4, rtol=1e-4)

    decoder = decoder_for(vae)
    picture = PiDAutoencoder(vae, decoder).decode(raw).sample
    expected = decoder.decode(latents, seed=0, progress=False)
    torch.testing.assert_close(picture.view_as(expected), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TINY_VAES)
def test_distilled_autoencoders_have_the_space_of_another(name: str) -> None:
    for vae in (name, f"madebyollin/{name}"):
        encoder = VAEEncoder(vae)
        space = KNOWN_SPACES[encoder.latent_space]
        assert (encoder.latent_channels, encoder.latent_stride) == (space.channels, space.stride)
    tiny = flux()
    decoder = decoder_for(tiny.pipe.vae)
    tiny.pipe.vae = PiDAutoencoder(tiny_vae(), decoder)
    assert call(tiny).shape == (1, 3, HEIGHT * SCALE, WIDTH * SCALE)
    with pytest.raises(Mistake):
        PiDAutoencoder(tiny_vae(4), decoder)


def test_wan_22_has_a_space_of_its_own() -> None:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=48, num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2,
        is_residual=True, scale_factor_spatial=16, latents_mean=[0.1] * 48, latents_std=[2.0] * 48,
    )  # fmt: skip
    space = space_of(vae)
    assert (space.channels, space.stride) == (48, 16)
    assert space.name.startswith("wan-48x16")


def picture_of(output: Tensor) -> Tensor:
    return output[:, 0] if output.ndim == 5 else output  # the only frame


@pytest.mark.filterwarnings("ignore:.*have a standard deviation of")
@pytest.mark.parametrize("name", LATER)
def test_a_pipeline_returns_the_decoders_picture(name: str) -> None:
    tiny = LATER[name]()
    native, latents = picture_of(call(tiny)), call(tiny, output_type="latent")
    assert native.shape[2:] == (HEIGHT, WIDTH)
    decoder = decoder_for(tiny.pipe.vae)
    tiny.pipe.vae = PiDAutoencoder(tiny.pipe.vae, decoder)
    picture = picture_of(call(tiny))
    assert picture.shape == (1, 3, HEIGHT * SCALE, WIDTH * SCALE)
    by_hand = decoder.decode(to_normalised(name, latents), seed=0, progress=False)
    torch.testing.assert_close(picture, by_hand / 2 + 0.5, atol=1e-4, rtol=0)
    other = decoder.decode(random_tensor(*to_normalised(name, latents).shape), seed=0)
    assert (other - by_hand).abs().mean() > 1e-3


@pytest.mark.filterwarnings("ignore:.*have a standard deviation of")
@pytest.mark.parametrize("name", [name for name in LATER if name != "ernie"])
def test_a_pipeline_stops_early(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An analytic denoiser: the straight line from eps to z at every step."""
    tiny = LATER[name]()
    pipe = tiny.pipe
    decoder = decoder_for(pipe.vae)
    pipe.vae = PiDAutoencoder(pipe.vae, decoder)
    z, eps = random_tensor(*tiny.shape, seed=1), random_tensor(*tiny.shape, seed=2)
    step, condition, seen = pipe.scheduler.step, decoder.denoiser.condition, []
    monkeypatch.setattr(
        pipe.scheduler, "step", lambda v, *given, **more: step(eps - z, *given, **more)
    )
    monkeypatch.setattr(
        decoder.denoiser, "condition", lambda *given: seen.extend(given) or condition(*given)
    )
    stop = stop_early(pipe, AT_STEP)
    call(tiny, STEPS, latents=eps, callback_on_step_end=stop)
    sigma = float(pipe.scheduler.sigmas[AT_STEP])
    assert stop.latent_sigma == pytest.approx(sigma, abs=1e-6)
    expected = to_normalised(name, add_latent_noise(z, eps, torch.tensor([sigma])))
    # Some schedules begin at 0.999, with noise alone.
    torch.testing.assert_close(seen[0], expected, atol=3e-3, rtol=0)
    assert seen[1].tolist() == pytest.approx([sigma], abs=1e-6)


def test_a_pipeline_that_cannot_be_interrupted_is_refused() -> None:
    pipe = LATER["ernie"]().pipe
    pipe.vae = PiDAutoencoder(pipe.vae, decoder_for(pipe.vae))
    with pytest.raises(Mistake) as told:
        stop_early(pipe, 2)
    assert told.value.option == "pipe"
