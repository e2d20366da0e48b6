"""What a teacher learns from: times, noise and losses; and the optimiser that follows them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor

from pid_lightning import PiD, Training
from pid_lightning.diffusion.flow import per_sample
from pid_lightning.diffusion.losses import rgb_alignment_loss
from pid_lightning.encoders.text import NoText
from pid_lightning.nn import AdapterConfig, Geometry
from pid_lightning.training.objective import FlowMatching
from pid_lightning.training.optimizers import make_optimizer, make_schedule
from pid_lightning.training.sample import Sample, draw_sample


def sample_of(x0: Tensor) -> Sample:
    num = len(x0)
    nothing = torch.zeros(num, 128, 1, 1)
    return Sample(x0, x0, nothing, torch.zeros(num), None, None, None, list(range(num)))


def test_the_exact_velocity_of_the_data_has_no_loss_at_times_as_configured() -> None:
    x0 = torch.rand(2000, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []

    class Oracle:
        config = SimpleNamespace(adapter=SimpleNamespace(rgb_head=False))

        def condition(self, *_: object, **__: object) -> None: ...

        def __call__(self, x_t: Tensor, t: Tensor, condition: None) -> Tensor:
            seen.append(t)
            return (x_t - x0) / per_sample(t, x_t)

    objective = FlowMatching(Oracle(), Training(time_shift=3.0, time_std=2.0))
    loss, _ = objective.losses(sample_of(x0), "train")
    assert loss < 1e-9
    logits = torch.cat(seen).double().logit()  # of k u / (1 + (k - 1) u): logit(u) + log k
    assert logits.mean().item() == pytest.approx(torch.tensor(3.0).log().item(), abs=0.15)
    assert logits.std().item() == pytest.approx(2, abs=0.1)


def test_the_rgb_heads_loss_has_its_weight() -> None:
    adapter = AdapterConfig(width=16, num_res_blocks=1, rgb_head=True)
    module = tiny.module(Training(rgb_loss_weight=0.7), adapter=adapter)
    x0 = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sample = Sample(
        x0, x0[..., ::4, ::4], torch.ones(2, 128, 1, 1), torch.zeros(2), None, None, None, [0, 1]
    )
    loss, parts = module.objective.losses(sample, "train")
    adapted = module.denoiser.adapt(sample.latents, sample.latent_sigma, with_rgb=True)
    expected = rgb_alignment_loss(adapted.rgb, sample.low_resolution, sample.latent_sigma)
    assert parts["rgb_loss"] == pytest.approx(expected.item(), rel=1e-5)
    together = parts["velocity_loss"] + 0.7 * parts["rgb_loss"]
    assert loss.item() == pytest.approx(together.item(), rel=1e-5)


def test_latents_are_noised_in_the_frame_of_their_diffusion() -> None:
    image = torch.zeros(5, 3, 64, 64)
    batch = {"image": image, "caption": [""] * 5, "number": torch.arange(5)}
    encoder = SimpleNamespace(encode=lambda images: torch.ones(5, 1, 2, 2))
    denoiser, samples = tiny.module().denoiser, []
    for frame in ("flow", "variance_preserving"):
        settings = Training(noise_frame=frame, latent_sigma_probability=1.0)
        samples.append(draw_sample(batch, "train", encoder, NoText(), denoiser, settings))
    flow, preserving = samples
    sigma = per_sample(flow.latent_sigma, flow.latents)
    assert torch.equal(flow.latent_sigma, preserving.latent_sigma)
    noise = flow.latents - (1 - sigma)  # the latents are 1
    torch.testing.assert_close(preserving.latents - (1 - sigma**2).sqrt(), noise)
    assert not torch.allclose(flow.latents, preserving.latents)


def test_the_learning_rate_rises_and_falls_as_configured() -> None:
    weight = torch.nn.Parameter(torch.zeros(()))
    rates = {}
    for decay in (110, None):
        optimizer = torch.optim.SGD([weight], lr=2.0)
        schedule, rates[decay] = make_schedule(optimizer, 10, decay), []
        for _ in range(120):
            rates[decay].append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    for decay in rates:
        assert rates[decay][:11] == pytest.approx([*(0.2 * i for i in range(1, 11)), 2.0])
    assert rates[None][10:] == [2.0] * 110
    assert rates[110][60] == pytest.approx(1.0)  # half-way through the cosine
    assert rates[110][110:] == pytest.approx([0.0] * 10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_group_learns_as_configured(name: str) -> None:
    settings = Training(optimizer=name, learning_rate=3e-4, weight_decay=0.07)
    groups = make_optimizer(tiny.module().denoiser, settings, fused=True).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(3e-4, 0.07)] * len(groups)


def test_validation_judges_the_average_with_equal_draws() -> None:
    module = tiny.module()
    module.encoder.load()
    module.denoiser_ema = tiny.randomise(PiD(tiny.config(), Geometry(128, 16, 4))).eval()
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = {"image": image, "caption": ["", ""], "number": torch.arange(2)}
    logged = []
    module.log_dict = lambda parts, **_: logged.append(parts["validate/loss"].item())
    validate = partial(module.validation_step, batch, 0)
    with torch.no_grad():
        validate()
        tiny.randomise(module.denoiser, seed=2)
        validate()
        module.denoiser_ema.out.weight.mul_(2)
        validate()
    assert logged[0] == logged[1] != logged[2]
