"""Normalised latents: values against the published formulas, packing against diffusers."""

from __future__ import annotations

import warnings

import pytest
import torch

from pid_lightning.encoders.latent_spaces import (
    FLUX2,
    KNOWN_SPACES,
    QWEN,
    autoencoder_kl_space,
    flux2_space,
    qwen_space,
    warn_if_not_normalised,
)
from pid_lightning.encoders.taef2 import TAEF2
from pid_lightning.nn.geometry import pack, unpack
from pid_lightning.pictures.files import read_picture
from pid_lightning.pictures.resizing import reduce_picture
from pid_lightning.training.data.samples import centre_crop
from pid_lightning.training.data.sources import BUNDLED_PHOTOS


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("name", "channels", "scale", "shift"),
    [("sd3", 16, 1.5305, 0.0609), ("flux", 16, 0.3611, 0.1159), ("sdxl", 4, 0.13025, 0.0)],
)
def test_scalar_spaces_follow_the_published_formula(name, channels, scale, shift, generator):
    space = KNOWN_SPACES[name]
    raw = torch.randn(2, channels, 4, 6, generator=generator)
    assert (space.channels, space.stride) == (channels, 8)
    torch.testing.assert_close(space.normalise(raw), (raw - shift) * scale)
    torch.testing.assert_close(space.denormalise(space.normalise(raw)), raw)


def test_flux2_is_the_batch_norm_of_its_packed_latents(generator):
    space = KNOWN_SPACES["flux2"]
    norm = torch.nn.BatchNorm2d(128, eps=1e-4, affine=False).eval()
    norm.running_mean = torch.tensor(FLUX2["mean"])
    norm.running_var = torch.tensor(FLUX2["variance"])
    raw = 2 * torch.randn(2, 32, 4, 6, generator=generator)
    torch.testing.assert_close(space.normalise(raw), norm(pack(raw)))
    torch.testing.assert_close(space.denormalise(space.normalise(raw)), raw)


def test_qwen_is_per_channel_and_takes_a_frame_axis(generator):
    space = KNOWN_SPACES["qwen"]
    raw = torch.randn(2, 16, 1, 4, 6, generator=generator)
    expected = raw[:, :, 0]
    mean, std = (torch.tensor(QWEN[name]).view(1, 16, 1, 1) for name in ("mean", "std"))
    expected = (expected - mean) / std
    torch.testing.assert_close(space.normalise(raw), expected)
    torch.testing.assert_close(space.denormalise(expected), raw[:, :, 0])


def test_packing_is_that_of_diffusers(generator):
    from diffusers import Flux2Pipeline

    raw = torch.randn(2, 8, 6, 10, generator=generator)
    packed = pack(raw)
    assert torch.equal(packed, Flux2Pipeline._patchify_latents(raw))
    assert torch.equal(unpack(packed), Flux2Pipeline._unpatchify_latents(packed))
    # c*4 + row*2 + col
    assert torch.equal(packed[:, 3 * 4 + 1 * 2 + 0], raw[:, 3, 1::2, 0::2])


def test_flux2_statistics_come_from_the_batch_norm(generator):
    mean = torch.randn(128, generator=generator)
    var = torch.rand(128, generator=generator) * 3 + 0.1
    space = flux2_space(mean, var)
    assert (space.name, space.channels, space.stride) == ("flux2", 128, 16)
    raw = torch.randn(1, 32, 4, 6, generator=generator)
    norm = torch.nn.BatchNorm2d(128, eps=1e-4, affine=False).eval()
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    torch.testing.assert_close(space.normalise(raw), norm(pack(raw)))
    torch.testing.assert_close(space.denormalise(space.normalise(raw)), raw)


def test_configurations_are_recognised_by_their_numbers():
    blocks = [128, 256, 512, 512]
    flux = {"latent_channels": 16, "block_out_channels": blocks}
    flux |= {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    assert autoencoder_kl_space(flux) is KNOWN_SPACES["flux"]
    assert autoencoder_kl_space({**flux, "shift_factor": None}).name == "kl-16x8-0.3611-0"
    assert qwen_space({}) is KNOWN_SPACES["qwen"]


def test_spaces_of_other_statistics_have_other_names():
    config = {"z_dim": 2, "latents_mean": [0.0, 1.0], "latents_std": [1.0, 2.0]}
    space = qwen_space(config)
    assert space.name.startswith("qwen-2x8-")
    assert space.channels == 2
    assert qwen_space(config | {"latents_std": [1.0, 2.0000001]}).name == space.name
    for changed in ({"latents_mean": [0.0, 1.1]}, {"latents_std": [2.0, 1.0]}):
        assert qwen_space(config | changed).name != space.name


def test_per_channel_statistics_of_autoencoder_kl(generator):
    """diffusers denormalises by ``latents * std / scaling_factor + mean`` (SDXL pipeline)."""
    mean, std = [0.1, -0.2, 0.3, 0.4], [5.0, 6.0, 7.0, 8.0]
    config = {"latent_channels": 4, "block_out_channels": [8] * 4, "scaling_factor": 0.5}
    space = autoencoder_kl_space({**config, "latents_mean": mean, "latents_std": std})
    latents = torch.randn(1, 4, 2, 2, generator=generator)
    expected = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(
        1, 4, 1, 1
    )
    torch.testing.assert_close(space.denormalise(latents), expected)


def test_dtype_is_kept_and_computed_in_float32():
    raw = torch.full((1, 16, 1, 1), 0.1159, dtype=torch.bfloat16)
    latents = KNOWN_SPACES["flux"].normalise(raw)
    assert latents.dtype == torch.bfloat16
    expected = ((raw.float() - 0.1159) * 0.3611).bfloat16()
    assert torch.equal(latents, expected)
    assert KNOWN_SPACES["flux"].normalise(raw.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("factor", "cause"),
    [(1 / 0.3611, "raw"), (1 / 0.13025, "raw"), (0.3611, "twice"), (float("nan"), "NaN")],
)
def test_warns_when_the_std_is_far_from_one(factor, cause, generator):
    latents = torch.randn(1, 16, 16, 16, generator=generator) * factor
    with pytest.warns(UserWarning, match=cause) as caught:
        warn_if_not_normalised(latents, "flux")
    assert len(caught) == 1
    assert f"{latents.std():.2f}" in str(caught[0].message)


def test_silent_on_normalised_latents(generator):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_not_normalised(torch.randn(1, 16, 16, 16, generator=generator))


def test_silent_on_a_small_picture_of_strong_contrast():
    """The central 256 x 256 pixels of each bundled photograph, reduced by 8."""
    encoder = TAEF2()
    encoder.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in sorted((BUNDLED_PHOTOS / "test").glob("*.jpg")):
            low = reduce_picture(centre_crop(read_picture(path), 256)[None], 8)
            warn_if_not_normalised(encoder.encode(low))
