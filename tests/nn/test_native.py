"""The native decoder inside the network, what adds to it, and what mixes across patches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from pid_lightning.checks import Mistake
from pid_lightning.diffusion import flow
from pid_lightning.nn import AdapterConfig, PiD, PiDConfig
from pid_lightning.nn.freezing import freeze_untrained
from pid_lightning.nn.geometry import Geometry
from pid_lightning.nn.native import LatentDenoiser
from pid_lightning.nn.refiner import Refiner

CONFIG = PiDConfig(
    width=32,
    num_heads=2,
    num_blocks=2,
    patch_size=8,
    pixel_width=4,
    pixel_attention_width=16,
    pixel_num_heads=1,
    num_pixel_blocks=1,
    text_length=0,
    rope_reference=None,
    prediction="x0",
    residual=True,
    refiner_width=8,
    adapter=AdapterConfig(
        width=16,
        num_res_blocks=1,
        padding="replicate",
        inject_pixels=True,
        upsampling="shuffle",
        sigma_plane=True,
        unpack=2,
        native="taef2",
        denoise_width=16,
        denoise_blocks=1,
    ),
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def network(config: PiDConfig = CONFIG) -> PiD:
    torch.manual_seed(0)
    return PiD(config, Geometry(128, 16, 4)).eval()


@torch.no_grad()
def predicted_x0(pid: PiD, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    side = 64 * latents.shape[-1]
    x_t = torch.randn(len(latents), 3, side, side, generator=torch.Generator().manual_seed(1))
    t = torch.full((len(latents),), 0.6)
    return flow.x0_from_velocity(x_t, pid(x_t, t, pid.condition(latents, sigma)), t)


def test_a_new_network_shows_the_enlarged_native_decode(generator):
    pid = network()
    latents, sigma = torch.randn(2, 128, 2, 2, generator=generator), torch.tensor([0.0, 0.5])
    unpacked = F.pixel_shuffle(latents, 2)
    native = pid.adapter.native.decoder(pid.adapter.native.denoise(unpacked, sigma)) * 2 - 1
    expected = F.interpolate(native, scale_factor=4, mode="bicubic")
    torch.testing.assert_close(predicted_x0(pid, latents, sigma), expected, rtol=0, atol=1e-5)


def test_the_estimate_is_exact_without_noise_and_the_best_linear_guess_at_first(generator):
    denoiser = LatentDenoiser(4, 8, 2)
    latents, sigma = torch.randn(3, 4, 5, 6, generator=generator), torch.tensor([0.0, 0.5, 1.0])
    denoiser.reset_parameters()
    share = torch.tensor([1.0, 1.0, 0.0]).view(-1, 1, 1, 1)  # E[z | (1-s) z + s eps] for var. 1
    torch.testing.assert_close(denoiser(latents, sigma), latents * share)
    torch.nn.init.ones_(denoiser.last.weight)
    trained = denoiser(latents, sigma)
    torch.testing.assert_close(trained[0], latents[0])
    assert not torch.allclose(trained[1:], latents[1:] * share[1:])


def test_the_refiner_alone_mixes_across_patches(generator):
    refiner = Refiner(8, 4)
    x0 = torch.randn(1, 3, 24, 24, generator=generator, requires_grad=True)
    given = torch.zeros_like(x0), torch.zeros_like(x0), torch.tensor([0.5])
    refiner.reset_parameters()
    assert not refiner(x0, *given).any()
    torch.nn.init.ones_(refiner.last.weight)
    (gradient,) = torch.autograd.grad(refiner(x0, *given)[0, :, 12, 12].sum(), x0)
    seen = gradient[0].abs().sum(0) > 0
    assert seen[4:22, 4:22].all()  # four 3 x 3 convolutions see 9 x 9 squares of 2 x 2 pixels
    assert seen.sum() == 18**2


def test_parts_are_cut_from_what_is_adapted_as_a_whole(generator):
    pid = network()
    latents = torch.randn(2, 128, 3, 3, generator=generator)
    whole = pid.adapt(latents, torch.zeros(2))
    places = [(slice(64, 128), slice(0, 64)), (slice(0, 64), slice(128, 192))]
    parts = whole.parts(places, 8)
    torch.testing.assert_close(parts.base[1], whole.base[1, :, :64, 128:])
    torch.testing.assert_close(parts.tokens[0], whole.tokens[0, 8:16, :8])
    condition = pid.condition_on(parts, torch.zeros(2))
    assert pid(torch.zeros(2, 3, 64, 64), torch.ones(2), condition).shape == (2, 3, 64, 64)


def test_what_is_native_stays_as_it_is_and_everything_else_learns(generator):
    pid = network()
    freeze_untrained(pid, "all", reads_null=False)
    for weight in pid.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    latents, sigma = torch.randn(1, 128, 1, 1, generator=generator), torch.tensor([0.5])
    adapted = pid.adapt(latents, sigma)
    velocity = pid(torch.zeros(1, 3, 64, 64), torch.ones(1), pid.condition_on(adapted, sigma))
    velocity.square().mean().backward()
    still = {name for name, weight in pid.named_parameters() if weight.grad is None}
    assert still == {f"adapter.native.{name}" for name in pid.adapter.native.state_dict()}


def test_the_published_network_has_none_of_it():
    plain = dataclasses.replace(
        CONFIG, residual=False, refiner_width=0, adapter=AdapterConfig(width=16)
    )
    pid = network(plain)
    assert not [n for n in pid.state_dict() if "native" in n or "refiner" in n]
    assert pid.adapt(torch.zeros(1, 128, 1, 1), torch.zeros(1)).base is None


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"prediction": "velocity"}, "residual"),
        ({"adapter": AdapterConfig(unpack=2)}, "residual"),
        ({"residual": False}, "refiner_width"),
    ],
)
def test_parts_that_need_each_other(change, option):
    with pytest.raises(Mistake) as mistake:
        dataclasses.replace(CONFIG, **change)
    assert mistake.value.option == option


@pytest.mark.parametrize("geometry", [(128, 8, 4), (16, 16, 4)])
def test_latents_that_taef2_cannot_decode(geometry):
    with pytest.raises(Mistake) as mistake:
        PiD(CONFIG, Geometry(*geometry))
    assert mistake.value.option == "adapter.native"
