"""Early stop: latents passed to PiD match the frame's formula at the sigma passed with them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, get_args

import diffusers
import pytest
import tiny_pipelines
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDXLCFGCutoffCallback
from tiny_pipelines import HEIGHT, PIPELINES, SCALE, WIDTH, call, decoder_for, random_tensor
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.decoding import early_stop
from pid_lightning.decoding.diffusers_vae import PiDAutoencoder
from pid_lightning.decoding.early_stop import signal_and_noise, stop_early, to_frame
from pid_lightning.diffusion import noising

STEPS, AT_STEP = 5, 3

XL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDXL_SCHEDULERS = {
    "euler": lambda: diffusers.EulerDiscreteScheduler(**XL, timestep_spacing="leading"),
    "euler_karras": lambda: diffusers.EulerDiscreteScheduler(**XL, use_karras_sigmas=True),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**XL),
    "ddim": lambda: diffusers.DDIMScheduler(**XL, clip_sample=False, set_alpha_to_one=False),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**XL),
    "dpm_karras": lambda: diffusers.DPMSolverMultistepScheduler(**XL, use_karras_sigmas=True),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**XL),
}


class Recorder:
    """Records the latents and noise level passed to the network's `condition`."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        denoiser = pipe.vae.pid_decoder.denoiser
        true_condition = denoiser.condition

        def condition(latents: Tensor, latent_sigma: Tensor, *rest: Any, **more: Any) -> Any:
            self.latents, self.latent_sigma = latents, latent_sigma
            return true_condition(latents, latent_sigma, *rest, **more)

        monkeypatch.setattr(denoiser, "condition", condition)


def with_pid(tiny: tiny_pipelines.Tiny, noise_frame: str = "flow") -> tiny_pipelines.Tiny:
    tiny.pipe.vae = PiDAutoencoder(tiny.pipe.vae, decoder_for(tiny.pipe.vae, noise_frame))
    return tiny


def unpacked(name: str, pipe: Any, latents: Tensor) -> Tensor:
    """A pipeline's own layout to (B, C, h, w)."""
    if name in ("flux", "qwen"):
        latents = pipe._unpack_latents(latents, HEIGHT, WIDTH, pipe.vae_scale_factor)
    return latents[:, :, 0] if latents.ndim == 5 else latents


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "sdxl"])
def test_flow_matching_pipelines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An analytic denoiser: the straight line from eps to z at every step."""
    tiny = with_pid(PIPELINES[name]())
    pipe = tiny.pipe
    z, eps = random_tensor(*tiny.shape, seed=1), random_tensor(*tiny.shape, seed=2)
    velocity = eps - z
    if name.startswith("flux2"):
        velocity = velocity.flatten(2).transpose(1, 2)  # (B, N, C)

    def forward(*inputs: Any, **more: Any) -> tuple:
        if name == "z_image":  # a list of pictures, with the velocity negated
            return ([-velocity[0][:, None]],)
        batch_size = more["hidden_states"].shape[0]  # both guidance branches
        return (velocity.expand(batch_size, *velocity.shape[1:]),)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    recorder = Recorder(pipe, monkeypatch)
    stop = stop_early(pipe, AT_STEP)
    picture = call(tiny, STEPS, latents=eps, callback_on_step_end=stop)

    sigma = float(pipe.scheduler.sigmas[AT_STEP])
    assert 0.05 < sigma < 0.95
    assert stop.latent_sigma == pytest.approx(sigma, abs=1e-6)
    assert recorder.latent_sigma.tolist() == pytest.approx([sigma], abs=1e-6)
    expected = noising.add_latent_noise(z, eps, torch.tensor([sigma]))
    torch.testing.assert_close(
        recorder.latents, unpacked(name, pipe, expected), atol=1e-4, rtol=0, check_dtype=False
    )
    assert picture.shape == (1, 3, HEIGHT * SCALE, WIDTH * SCALE)
    assert pipe.scheduler.step_index == AT_STEP  # no further steps


@pytest.mark.parametrize("noise_frame", get_args(noising.Frame))
@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "dpm"])
def test_sdxl_schedulers(name: str, noise_frame: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An analytic denoiser: always the eps that the latents were made with."""
    scheduler = SDXL_SCHEDULERS[name]()
    tiny = with_pid(tiny_pipelines.sdxl(scheduler), noise_frame)
    pipe = tiny.pipe
    z, eps = random_tensor(*tiny.shape, seed=1), random_tensor(*tiny.shape, seed=2)

    def forward(sample: Tensor, *inputs: Any, **more: Any) -> tuple:
        return (eps.expand(sample.shape[0], *eps.shape[1:]),)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    recorder = Recorder(pipe, monkeypatch)
    stop = stop_early(pipe, AT_STEP)
    call(tiny, STEPS, latents=start(scheduler, z, eps), callback_on_step_end=stop)

    # The level from diffusers' own table at the next timestep.
    kept = float(scheduler.alphas_cumprod[round(float(scheduler.timesteps[AT_STEP]))])
    if name == "heun":  # visits timesteps twice: use the schedule
        kept = 1 / (1 + float(scheduler.sigmas[AT_STEP]) ** 2)
    signal, noise = kept**0.5, (1 - kept) ** 0.5
    sigma = noise if noise_frame == "variance_preserving" else noise / (signal + noise)
    assert 0.05 < sigma < 0.95
    assert stop.latent_sigma == pytest.approx(sigma, abs=1e-4)
    assert recorder.latent_sigma.tolist() == pytest.approx([stop.latent_sigma], abs=1e-6)
    level = torch.tensor([stop.latent_sigma])
    expected = noising.add_latent_noise(z, eps, level, noise_frame)
    torch.testing.assert_close(recorder.latents, expected, atol=1e-4, rtol=0)


def start(scheduler: Any, z: Tensor, eps: Tensor) -> Tensor:
    """Latents on the line from eps to z, in the form that the pipeline expects as input."""
    scheduler.set_timesteps(STEPS)
    first = scheduler.timesteps[:1]
    if hasattr(scheduler, "sigmas"):
        sigma = scheduler.sigmas[0]
        if type(scheduler).__name__ in early_stop.EXPLODING:
            return (z + sigma * eps) / scheduler.init_noise_sigma
        return (z + sigma * eps) / (sigma**2 + 1).sqrt()
    return scheduler.add_noise(z, eps, first)


# ------------------------------------------------------------------- schedulers alone

FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS = {
    **SDXL_SCHEDULERS,
    "dpm_single": lambda: diffusers.DPMSolverSinglestepScheduler(**XL),
    "deis": lambda: diffusers.DEISMultistepScheduler(**XL),
    "ddim_trailing": lambda: diffusers.DDIMScheduler(
        **XL, clip_sample=False, timestep_spacing="trailing"
    ),
    "flow_euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow_heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow_map": lambda: diffusers.FlowMapEulerDiscreteScheduler(shift=3.0),
    "flow_ltx": lambda: diffusers.LTXEulerAncestralRFScheduler(eta=0.0),
    "dpm_flow": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW_SIGMAS),
    "unipc_flow": lambda: diffusers.UniPCMultistepScheduler(**FLOW_SIGMAS),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_of_every_scheduler(name: str) -> None:
    """Latents equal `signal * z + noise * eps` after every step, including the last."""
    scheduler = SCHEDULERS[name]()
    z, eps = random_tensor(1, 4, 4, 4), random_tensor(1, 4, 4, 4, seed=1)
    is_flow = "flow" in name
    if is_flow:
        scheduler.set_timesteps(7)
        if name == "flow_map":
            scheduler.set_begin_index(0)
        sigma = scheduler.sigmas[0]
        latents = (1 - sigma) * z + sigma * eps
    else:
        scheduler.set_timesteps(STEPS)
        latents = start(scheduler, z, eps) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        latents = scheduler.step(eps - z if is_flow else eps, timestep, latents).prev_sample
        signal, noise = signal_and_noise(scheduler, timestep)
        torch.testing.assert_close(latents, signal * z + noise * eps, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerAncestralDiscreteScheduler(**XL),
        diffusers.DDPMScheduler(**XL, clip_sample=False),
        diffusers.DDIMScheduler(**XL, clip_sample=False),
        diffusers.DPMSolverMultistepScheduler(**XL, algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_that_draw_fresh_noise(scheduler: Any) -> None:
    """With a perfect denoiser and z = 0, the latents' standard deviation is the reported noise."""
    z = torch.zeros(1, 4, 128, 128)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(z.shape, generator=generator)
    scheduler.set_timesteps(STEPS)
    latents = start(scheduler, z, eps) * scheduler.init_noise_sigma
    eta = {"eta": 1.0} if isinstance(scheduler, diffusers.DDIMScheduler) else {}
    for timestep in scheduler.timesteps:
        now = scheduler.scale_model_input(latents, timestep)
        kept = scheduler.alphas_cumprod[int(timestep)]
        predicted = now / (1 - kept).sqrt()  # z is 0, so all of it is noise
        latents = scheduler.step(
            predicted, timestep, latents, generator=generator, **eta
        ).prev_sample
        _, noise = signal_and_noise(scheduler, timestep)
        assert float(latents.std()) == pytest.approx(noise, rel=0.02, abs=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.FlowMatchLCMScheduler(shift=3.0), diffusers.LTXEulerAncestralRFScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_flow_schedulers_that_draw_fresh_noise(scheduler: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(STEPS)
    latents = scheduler.sigmas[0] * torch.randn(1, 4, 128, 128, generator=generator)
    for i, timestep in enumerate(scheduler.timesteps):
        eps = latents / scheduler.sigmas[i]  # z is 0
        latents = scheduler.step(eps, timestep, latents, generator=generator).prev_sample
        _, noise = signal_and_noise(scheduler, timestep)
        assert float(latents.std()) == pytest.approx(noise, rel=0.02, abs=1e-3)


def test_minimax_h3_predicts_towards_the_data() -> None:
    scheduler = diffusers.MiniMaxH3Scheduler()
    z, eps = random_tensor(1, 4, 4, 4), random_tensor(1, 4, 4, 4, seed=1)
    scheduler.set_timesteps(7)
    latents = eps
    for timestep in scheduler.timesteps:
        latents = scheduler.step(z - eps, timestep, latents).prev_sample
        signal, noise = signal_and_noise(scheduler, timestep)
        torch.testing.assert_close(latents, signal * z + noise * eps, atol=5e-5, rtol=0)


def test_frames_agree_with_the_formulas() -> None:
    z, eps = random_tensor(2, 4, 4, 4), random_tensor(2, 4, 4, 4, seed=1)
    for signal, noise in ((1.0, 1.7), (0.6, 0.8), (0.3, 0.7)):
        for frame in get_args(noising.Frame):
            latents, level = to_frame(signal * z + noise * eps, signal, noise, frame)
            expected = noising.add_latent_noise(z, eps, torch.full((2,), level), frame)
            torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)
    half, _ = to_frame(z.half(), 1.0, 1.7, "flow")
    assert half.dtype == torch.float16


# ------------------------------------------------------------------- calls


def test_no_level_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise level applies to the interrupted call's latents and to no others."""
    tiny = with_pid(tiny_pipelines.sd3())
    recorder = Recorder(tiny.pipe, monkeypatch)
    stop = stop_early(tiny.pipe, 2)
    call(tiny, 6, callback_on_step_end=stop)
    assert recorder.latent_sigma.item() == pytest.approx(stop.latent_sigma)
    assert stop.latent_sigma > 0.1
    tiny.pipe.vae.decode(random_tensor(*tiny.shape))
    assert recorder.latent_sigma.item() == 0.0
    # Interrupted, but its latents never reach the decoder; the next call runs to completion.
    noisy = call(tiny, 6, output_type="latent", callback_on_step_end=stop)
    assert noisy.shape == tiny.shape
    call(tiny)
    assert recorder.latent_sigma.item() == 0.0


def test_the_same_callback_serves_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = with_pid(tiny_pipelines.flux())
    recorder = Recorder(tiny.pipe, monkeypatch)
    stop = stop_early(tiny.pipe, 2)
    levels = []
    for steps in (2, 3, 6):
        picture = call(tiny, steps, callback_on_step_end=stop, num_images_per_prompt=2)
        assert picture.shape[0] == 2
        levels.append(stop.latent_sigma)
        assert recorder.latent_sigma.tolist() == pytest.approx([levels[-1]] * 2)
    assert levels == sorted(levels)
    assert levels[0] == 0.0  # no noise is left after the last of two steps


def test_latents_are_returned_in_the_decoders_frame() -> None:
    tiny = with_pid(tiny_pipelines.sdxl(), "variance_preserving")
    decoder = tiny.pipe.vae.pid_decoder
    stop = stop_early(tiny.pipe, 2)
    picture = call(tiny, callback_on_step_end=stop)
    latents = call(tiny, output_type="latent", callback_on_step_end=stop)
    by_hand = decoder.decode(latents, stop.latent_sigma, seed=0, progress=False)
    torch.testing.assert_close(picture, by_hand / 2 + 0.5, atol=1e-4, rtol=0)


def test_a_level_ends_the_loop_at_the_first_step_at_or_below_it() -> None:
    tiny = with_pid(tiny_pipelines.sd3())
    call(tiny, STEPS)
    sigmas = tiny.pipe.scheduler.sigmas.tolist()
    for i in range(1, STEPS + 1):
        for level in (sigmas[i], (sigmas[i] + sigmas[i - 1]) / 2):
            stop = stop_early(tiny.pipe, sigma=level)
            picture = call(tiny, STEPS, callback_on_step_end=stop)
            assert stop.latent_sigma == pytest.approx(sigmas[i])
            by_step = call(tiny, STEPS, callback_on_step_end=stop_early(tiny.pipe, i))
            assert torch.equal(picture, by_step)


@pytest.mark.parametrize("name", ["sd3", "flux2", "sdxl"])
def test_several_levels_of_one_run(name: str) -> None:
    """Each is the picture of a run of its own; two levels of one step are one."""
    tiny = with_pid(PIPELINES[name]())
    call(tiny, STEPS)
    levels = []
    for step in (2, 3, 4):
        one = stop_early(tiny.pipe, step)
        levels.append((one, call(tiny, STEPS, callback_on_step_end=one)))
    sigmas = [one.latent_sigma for one, _ in levels]
    stop = stop_early(tiny.pipe, sigma=[sigmas[0], sigmas[2], sigmas[0] + 1e-4, sigmas[1]])
    last = call(tiny, STEPS, callback_on_step_end=stop)
    assert torch.equal(last, levels[-1][1])
    assert list(stop.levels) == pytest.approx(sigmas)
    for level, (_, picture) in zip(stop.levels, levels, strict=True):
        again = call(tiny, STEPS, callback_on_step_end=stop.at(level))
        assert torch.equal(again, picture)
        assert stop.latent_sigma == level


# ------------------------------------------------------------------- refused


def refused(option: str) -> AbstractContextManager:
    return pytest.raises(Mistake, match=f"^{option}: ")


def test_a_pipeline_without_pid_is_refused() -> None:
    tiny = tiny_pipelines.sd3()
    with refused("pipe"):
        stop_early(tiny.pipe)


def test_steps_out_of_range_are_refused() -> None:
    tiny = with_pid(tiny_pipelines.sd3())
    with refused("at_step"):
        stop_early(tiny.pipe, 0)
    with refused("at_step"):
        call(tiny, callback_on_step_end=stop_early(tiny.pipe))
    for level in (1, -0.1, [], [0.2, 1.5]):
        with refused("sigma"):
            stop_early(tiny.pipe, sigma=level)
    with refused("sigma"):
        stop_early(tiny.pipe, 2, sigma=0.2)
    with refused("level"):
        stop_early(tiny.pipe, sigma=0.2).at(0.2)
    with refused("callback_on_step_end_tensor_inputs"):
        call(
            tiny,
            callback_on_step_end=stop_early(tiny.pipe, 2),
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: diffusers.KDPM2DiscreteScheduler(**XL),
        diffusers.SCMScheduler,
        diffusers.HeliosScheduler,
    ],
)
def test_an_unknown_scheduler_is_refused(scheduler: Any) -> None:
    tiny = with_pid(tiny_pipelines.sdxl())
    tiny.pipe.scheduler = scheduler()
    with refused("scheduler"):
        stop_early(tiny.pipe)


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 5), ("trailing", 7)])
def test_uneven_steps_of_ddim_are_refused(spacing: str, steps: int) -> None:
    scheduler = diffusers.DDIMScheduler(**XL, timestep_spacing=spacing)
    tiny = with_pid(tiny_pipelines.sdxl(scheduler))
    with refused("scheduler"):
        call(tiny, steps, callback_on_step_end=stop_early(tiny.pipe, 2))


def test_even_steps_of_ddim_are_taken() -> None:
    scheduler = diffusers.DDIMScheduler(**XL, timestep_spacing="trailing")
    tiny = with_pid(tiny_pipelines.sdxl(scheduler))
    stop = stop_early(tiny.pipe, 2)
    call(tiny, 5, callback_on_step_end=stop)
    assert 0 < stop.latent_sigma < 1


def test_it_joins_diffusers_own_callbacks() -> None:
    tiny = with_pid(tiny_pipelines.sdxl())
    pictures = []
    for others in ([], [SDXLCFGCutoffCallback(cutoff_step_ratio=1.0)]):
        stop = stop_early(tiny.pipe, 2)
        pictures.append(call(tiny, callback_on_step_end=MultiPipelineCallbacks([*others, stop])))
        assert 0 < stop.latent_sigma < 1
    assert torch.equal(*pictures)
