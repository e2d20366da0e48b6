"""PiDAutoencoder in diffusers' own pipelines: 4x pictures, everything else unchanged."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from tiny import Text
from tiny_pipelines import HEIGHT, PIPELINES, SCALE, WIDTH, call, decoder_for, random_tensor
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.decoding.diffusers_vae import PiDAutoencoder, space_of
from pid_lightning.encoders.vae import VAEEncoder
from pid_lightning.nn.geometry import pack


def normalised(name: str, pipe: Any, returned: Tensor) -> Tensor:
    """A pipeline's output for output_type="latent", as normalised latents (B, C, h, w).

    Every pipeline has its own layout; this follows diffusers, independently of the package.
    """
    if name in ("flux", "qwen"):  # tokens of 2 x 2 cells
        latents = pipe._unpack_latents(returned, HEIGHT, WIDTH, pipe.vae_scale_factor)
        return latents[:, :, 0] if latents.ndim == 5 else latents
    if name == "flux2":  # tokens, normalised, in rows
        return returned.transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16))
    if name == "flux2_klein":  # 32 channels, denormalised
        packed = pipe._patchify_latents(returned)
        bn = pipe.vae.bn
        mean, var = bn.running_mean.view(1, -1, 1, 1), bn.running_var.view(1, -1, 1, 1)
        return (packed - mean) / (var + pipe.vae.config.batch_norm_eps).sqrt()
    return returned


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_returns_the_decoders_picture(name: str) -> None:
    tiny = PIPELINES[name]()
    native, latents = call(tiny), call(tiny, output_type="latent")
    assert native.shape == (1, 3, HEIGHT, WIDTH)
    decoder = decoder_for(tiny.pipe.vae)
    tiny.pipe.vae = PiDAutoencoder(tiny.pipe.vae, decoder)

    picture = call(tiny)
    assert picture.shape == (1, 3, HEIGHT * SCALE, WIDTH * SCALE)
    by_hand = decoder.decode(normalised(name, tiny.pipe, latents), seed=0, progress=False)
    torch.testing.assert_close(picture, by_hand / 2 + 0.5, atol=1e-5, rtol=0)
    assert picture.std() > 0.05
    # The latents matter: others give pictures that differ by far more than the tolerance above.
    other = decoder.decode(random_tensor(*by_hand_shape(tiny.pipe.vae)), seed=0, progress=False)
    assert (other - by_hand).abs().mean() > 2e-3

    tiny.pipe.vae = tiny.pipe.vae.native
    assert torch.equal(call(tiny), native)


def by_hand_shape(vae: Any) -> tuple[int, ...]:
    space = space_of(vae)
    return (1, space.channels, HEIGHT // space.stride, WIDTH // space.stride)


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_postprocessing_copes_with_the_size(output_type: str) -> None:
    tiny = tiny_pipelines.flux()
    tiny.pipe.vae = PiDAutoencoder(tiny.pipe.vae, decoder_for(tiny.pipe.vae))
    picture = call(tiny, output_type=output_type, num_images_per_prompt=2)
    assert len(picture) == 2
    size = (HEIGHT * SCALE, WIDTH * SCALE)
    assert (picture[1].size[::-1] if output_type == "pil" else picture[1].shape[:2]) == size


# ------------------------------------------------------------------- the autoencoder itself

AUTOENCODERS = {
    "sd3": tiny_pipelines.sd3_vae,
    "flux": tiny_pipelines.flux_vae,
    "sdxl": tiny_pipelines.sdxl_vae,
    "flux2": tiny_pipelines.flux2_vae,
    "qwen": tiny_pipelines.qwen_vae,
}


@pytest.mark.filterwarnings("ignore:.*have a standard deviation of")  # it is untrained
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_decode_undoes_what_the_encoder_of_the_space_does(name: str, tmp_path: Any) -> None:
    """Raw latents are normalised exactly as the encoder used in training does."""
    vae = AUTOENCODERS[name]()
    assert space_of(vae).name == name
    vae.save_pretrained(tmp_path)
    encoder = VAEEncoder(str(tmp_path))
    encoder.load()
    decoder = decoder_for(vae)
    wrapped = PiDAutoencoder(vae, decoder)

    images = random_tensor(2, 3, HEIGHT, WIDTH).clamp(-1, 1)
    is_video = name == "qwen"
    raw = wrapped.encode(images[:, :, None] if is_video else images).latent_dist.mode()
    picture = wrapped.decode(raw).sample
    assert torch.equal(picture, wrapped.decode(raw, return_dict=False)[0])
    expected = decoder.decode(encoder.encode(images), seed=0, progress=False)
    assert picture.ndim == (5 if is_video else 4)
    torch.testing.assert_close(
        picture[:, :, 0] if is_video else picture, expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_all_but_decode_is_the_wrapped_autoencoders(name: str) -> None:
    vae = AUTOENCODERS[name]()
    wrapped = PiDAutoencoder(vae, decoder_for(vae))
    assert isinstance(wrapped, PiDAutoencoder)
    assert isinstance(wrapped, type(vae))
    assert type(wrapped).__name__ == type(vae).__name__
    assert wrapped.config is vae.config
    assert (wrapped.dtype, wrapped.device) == (vae.dtype, vae.device)
    assert wrapped.decoder is vae.decoder
    ours, theirs = wrapped.state_dict(), vae.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].data_ptr() == theirs[key].data_ptr() for key in ours)

    images = (
        random_tensor(1, 3, 32, 32)[:, :, None] if name == "qwen" else random_tensor(1, 3, 32, 32)
    )
    before = vae.encode(images).latent_dist.mode()
    assert torch.equal(wrapped.encode(images).latent_dist.mode(), before)
    assert PiDAutoencoder(wrapped, wrapped.pid_decoder).native is vae

    assert wrapped.to(torch.float64) is wrapped
    assert wrapped.dtype == vae.dtype == torch.float64
    assert wrapped.pid_decoder.dtype == torch.float32


def test_the_decoder_goes_where_the_autoencoder_goes() -> None:
    vae = tiny_pipelines.sdxl_vae()
    decoder = decoder_for(vae)
    wrapped = PiDAutoencoder(vae, decoder)
    wrapped.to("meta")
    assert decoder.denoiser.out.weight.device.type == "meta"
    assert decoder.dtype == torch.float32

    # Offloading: accelerate's hook is called before each decode, as in diffusers.
    vae = tiny_pipelines.sdxl_vae()
    wrapped = PiDAutoencoder(vae, decoder_for(vae))
    asked = []
    wrapped._hf_hook = SimpleNamespace(pre_forward=asked.append)
    wrapped.decode(random_tensor(1, 4, 2, 2) / 0.13025)
    assert asked == [wrapped]


def test_settings_reach_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_pipelines.sd3_vae()
    decoder = decoder_for(vae)
    arguments: dict[str, Any] = {}

    def decode(
        latents: Tensor, latent_sigma: float, prompt: Any, steps: Any, **rest: Any
    ) -> Tensor:
        arguments.update(rest, latent_sigma=latent_sigma, prompt=prompt, steps=steps)
        return torch.zeros(1, 3, 8, 8)

    monkeypatch.setattr(decoder, "decode", decode)
    wrapped = PiDAutoencoder(vae, decoder, steps=1, seed=5, tile=64)
    wrapped.prompt = "a cat"
    z = random_tensor(1, 16, 2, 2)
    wrapped.decode(z)
    passed = [arguments[name] for name in ("prompt", "steps", "seed", "tile")]
    assert passed == ["a cat", 1, 5, 64]
    assert arguments["latent_sigma"] == 0.0
    assert arguments["generator"] is None
    wrapped.tile, wrapped.steps = None, 2
    generator = torch.Generator()
    wrapped.decode(z, generator=generator)
    assert [arguments[name] for name in ("steps", "tile", "seed")] == [2, None, None]
    assert arguments["generator"] is generator
    wrapped.enable_tiling()
    wrapped.decode(z)
    assert arguments["tile"] == "auto"
    wrapped.disable_tiling()
    wrapped.decode(z)
    assert arguments["tile"] is None


def test_the_pipeline_goes_on_as_before(tmp_path: Any) -> None:
    tiny = tiny_pipelines.sdxl()
    native = call(tiny)
    before = dict(tiny.pipe.config)
    tiny.pipe.vae = PiDAutoencoder(tiny.pipe.vae, decoder_for(tiny.pipe.vae))
    assert dict(tiny.pipe.config) == before
    assert tiny.pipe.vae_scale_factor == 8
    assert tiny.pipe.device.type == "cpu"

    tiny.pipe.save_pretrained(tmp_path)  # without PiD, loadable without this package
    loaded = diffusers.StableDiffusionXLPipeline.from_pretrained(
        tmp_path, low_cpu_mem_usage=False, add_watermarker=False
    )
    assert type(loaded.vae) is diffusers.AutoencoderKL
    assert torch.equal(call(tiny._replace(pipe=loaded)), native)


def test_a_pipeline_in_half_precision_leaves_the_decoder_alone() -> None:
    tiny = tiny_pipelines.sd3()
    tiny.pipe.vae = PiDAutoencoder(tiny.pipe.vae, decoder_for(tiny.pipe.vae))
    full = call(tiny)
    half = {key: value.bfloat16() for key, value in tiny.arguments.items()}
    tiny.pipe.to(torch.bfloat16)
    assert tiny.pipe.vae.dtype == tiny.pipe.vae.native.dtype == torch.bfloat16
    assert tiny.pipe.vae.pid_decoder.dtype == torch.float32
    picture = call(tiny._replace(arguments=half))
    assert picture.shape == full.shape
    assert (picture - full).abs().mean() < 0.02


def test_a_picture_goes_in_and_a_larger_one_comes_out() -> None:
    """Image to image: `encode` is the autoencoder's, `decode` is PiD's."""
    tiny = tiny_pipelines.sd3()
    tiny.pipe.vae = PiDAutoencoder(tiny.pipe.vae, decoder_for(tiny.pipe.vae))
    # from_pipe carries over only components of diffusers' exact classes
    pipe = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(tiny.pipe, vae=tiny.pipe.vae)
    assert pipe.vae is tiny.pipe.vae
    picture = call(
        tiny._replace(pipe=pipe), image=random_tensor(1, 3, HEIGHT, WIDTH).sigmoid(), strength=0.7
    )
    assert picture.shape == (1, 3, HEIGHT * SCALE, WIDTH * SCALE)


def test_the_same_latents_make_the_same_picture() -> None:
    vae = tiny_pipelines.flux_vae()
    wrapped = PiDAutoencoder(vae, decoder_for(vae))
    z = random_tensor(2, 16, 2, 4) / 0.3611
    state = torch.get_rng_state()
    picture = wrapped.decode(z).sample
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(wrapped.decode(z).sample, picture)
    assert torch.equal(copy.deepcopy(wrapped).decode(z).sample, picture)
    wrapped.seed = 1
    assert not torch.equal(wrapped.decode(z).sample, picture)
    assert wrapped.decode(z.half()).sample.dtype == torch.float32


def test_prompts_are_encoded_once_when_it_is_made() -> None:
    """Afterwards the language model may go, and other features be given."""
    vae = tiny_pipelines.sd3_vae()
    config = dataclasses.replace(
        decoder_for(vae).info.config, text_length=3, text_width=6, learned_null=False
    )
    decoder = decoder_for(vae, config=config, student_times=None)
    decoder.text_encoder = text = Text()
    wrapped = PiDAutoencoder(vae, decoder, prompt="a cat", steps=1, guidance_scale=2.0)
    assert text.asked == ["a cat", ""]
    decoder.text_encoder = None
    z = random_tensor(1, 16, 2, 2)
    picture = wrapped.decode(z).sample
    assert torch.equal(wrapped.decode(z).sample, picture)
    wrapped.prompt = Text().encode(["a dog"])
    assert not torch.equal(wrapped.decode(z).sample, picture)


# ------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 9), ("tile", 33), ("prompt", "a cat"), ("guidance_scale", 2.0)]
)
def test_options_that_cannot_work_are_refused_before_the_diffusion(option, value) -> None:
    vae = tiny_pipelines.sd3_vae()
    with pytest.raises(ValueError, match=f"^{option}: "):
        PiDAutoencoder(vae, decoder_for(vae), **{option: value})


def test_a_decoder_of_another_space_is_refused() -> None:
    vae = tiny_pipelines.flux_vae()
    of_sd3 = decoder_for(tiny_pipelines.sd3_vae())
    for other in (of_sd3, decoder_for(tiny_pipelines.sdxl_vae())):
        with pytest.raises(Mistake) as told:
            PiDAutoencoder(vae, other)
        assert told.value.option == "decoder"


def test_an_unknown_autoencoder_is_refused() -> None:
    decoder = decoder_for(tiny_pipelines.flux_vae())
    vae = diffusers.VQModel(block_out_channels=(32,))
    with pytest.raises(ValueError, match="VQModel is not supported"):
        PiDAutoencoder(vae, decoder)
    with pytest.raises(ValueError, match="NoneType is not supported"):
        PiDAutoencoder(None, decoder)


def test_latents_of_several_frames_are_refused() -> None:
    vae = tiny_pipelines.qwen_vae()
    with pytest.raises(Mistake) as told:
        PiDAutoencoder(vae, decoder_for(vae)).decode(random_tensor(1, 16, 2, 2, 2))
    assert told.value.option == "latents"


def test_flux2_statistics_are_the_autoencoders() -> None:
    vae = tiny_pipelines.flux2_vae()
    space = space_of(vae)
    raw = random_tensor(1, 32, 4, 4)
    packed = pack(raw)
    var = vae.bn.running_var.view(1, -1, 1, 1) + 1e-4
    expected = (packed - vae.bn.running_mean.view(1, -1, 1, 1)) / var.sqrt()
    torch.testing.assert_close(space.normalise(raw), expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_that_of_each_of_its_pictures() -> None:
    vae = tiny_pipelines.sd3_vae()
    plain = decoder_for(vae).info.config
    config = dataclasses.replace(plain, text_length=3, text_width=6, learned_null=False)
    decoder = decoder_for(vae, config=config)
    text = random_tensor(2, 3, decoder.info.config.text_width)
    latents = random_tensor(1, 16, 2, 2).repeat(4, 1, 1, 1)
    together = PiDAutoencoder(vae, decoder, prompt=text).decode(latents).sample
    by_hand = PiDAutoencoder(vae, decoder, prompt=text[[0, 0, 1, 1]]).decode(latents).sample
    assert torch.equal(together, by_hand)
    with pytest.raises(Mistake):
        PiDAutoencoder(vae, decoder, prompt=text).decode(latents[:3])
