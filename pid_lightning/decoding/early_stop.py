"""Early stop: end a diffusers pipeline while its latents are still noisy and let PiD finish."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pid_lightning.checks import (
    Mistake,
    check_at_least,
    check_between,
    check_choice,
    check_whole,
)
from pid_lightning.decoding.diffusers_vae import PiDAutoencoder

# Schedulers by the form of their latents between steps, at noise level `sigma` of their schedule.
FLOW = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
)
EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
)
VARIANCE_PRESERVING = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
DISCRETE = ("DDIMScheduler", "DDPMScheduler")  # variance-preserving, without a table of sigmas
ROUNDING = 1e-6  # of a schedule's levels
KNOWN_SCHEDULERS = (*FLOW, *EXPLODING, *VARIANCE_PRESERVING, *DISCRETE)


class EarlyStop:
    """A `callback_on_step_end` that ends the loop while latents are noisy; see `stop_early`.

    Attributes:
        at_step: number of steps to run; None goes by `sigmas`.
        sigmas: noise levels to stop at, or at the next lower ones of the schedule.
        latent_sigma: noise level, in the decoder's frame, of the latents that the last pipeline
            call passed on; None before.
        levels: the latents of that call at each level, in the pipeline's own layout.
        tensor_inputs: what diffusers' `MultiPipelineCallbacks` gives it among other callbacks.
    """

    tensor_inputs = ("latents",)

    def __init__(self, at_step: int | None, sigmas: Sequence[float] = ()) -> None:
        self.at_step = at_step
        self.sigmas = tuple(sigmas)
        self.latent_sigma: float | None = None
        self.levels: dict[float, Tensor] = {}

    def __call__(
        self, pipe: Any, step: int, timestep: Tensor, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by the pipeline after each step; returns the tensors to continue with."""
        if step == 0:
            self._begin(pipe, callback_kwargs)
        if self.at_step not in (None, step + 1):
            return callback_kwargs
        signal, noise = signal_and_noise(pipe.scheduler, timestep)
        frame = pipe.vae.pid_decoder.info.noise_frame
        latents, level = to_frame(callback_kwargs["latents"], signal, noise, frame)
        ahead = [sigma for sigma in self.sigmas if level > sigma + ROUNDING]
        if self.at_step is None and len(ahead) == self._num_ahead:
            return callback_kwargs
        self._num_ahead, self.levels[level] = len(ahead), latents
        if ahead:
            return callback_kwargs
        return self._stop(pipe, level, callback_kwargs)

    def at(self, level: float) -> Callable[..., dict[str, Any]]:
        """A callback for another call of the same pipeline, with the same arguments, that ends it
        after its first step with the latents of one of `levels`."""
        check_choice("level", level, self.levels)

        def callback(
            pipe: Any, step: int, timestep: Tensor, callback_kwargs: dict[str, Any]
        ) -> dict[str, Any]:
            return self._stop(pipe, level, callback_kwargs)

        callback.tensor_inputs = self.tensor_inputs
        return callback

    def _stop(self, pipe: Any, level: float, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        self.latent_sigma = level
        pipe.vae.expect_noise(level, lambda: pipe.interrupt)
        pipe._interrupt = True  # diffusers' documented way to stop from a callback
        return {**callback_kwargs, "latents": self.levels[level]}

    def _begin(self, pipe: Any, callback_kwargs: dict[str, Any]) -> None:
        self.latent_sigma, self.levels, self._num_ahead = None, {}, len(self.sigmas)
        _check_pipeline(pipe)
        _check_spacing(pipe.scheduler)
        if self.at_step is not None:
            check_between("at_step", self.at_step, 1, pipe.num_timesteps)
        if "latents" not in callback_kwargs:
            raise Mistake(
                "callback_on_step_end_tensor_inputs",
                f"{[*callback_kwargs]} must include 'latents' for an early stop; add it or omit "
                "the argument.",
            )


def stop_early(
    pipe: Any, at_step: int | None = None, sigma: float | Sequence[float] | None = None
) -> EarlyStop:
    """End a pipeline's loop early and decode the still noisy latents with PiD.

    ::

        pipe.vae = PiDAutoencoder(pipe.vae, decoder)
        early = stop_early(pipe, sigma=[0.4, 0.2])
        picture = pipe(prompt, callback_on_step_end=early).images[0]  # of the lowest level
        for level in early.levels:  # one step of the diffusion each
            another = pipe(prompt, callback_on_step_end=early.at(level)).images[0]

    PiD receives the remaining noise level, which is the sigma of the next step. Latents in a
    different frame than the decoder was trained in (SDXL's `z + sigma eps`) are converted. With
    `output_type="latent"` the pipeline returns the converted latents, and `latent_sigma` of the
    callback is their noise level; the autoencoder takes the latents of its next `decode` to be
    these, once, and `pipe.vae.pid_decoder.decode` takes latents and level at any time.

    Args:
        pipe: a diffusers pipeline whose `vae` is a `PiDAutoencoder`.
        at_step: number of steps to run, at most the number of steps of the call; 24 where neither
            this nor `sigma` is given.
        sigma: instead of it, a noise level in [0, 1) in the decoder's frame: the loop ends after
            the first step that leaves as much or less. Of several, the loop ends at the lowest.

    Returns:
        The callback, which can be used for any number of calls, also among others in diffusers'
        `MultiPipelineCallbacks`.

    Raises:
        Mistake: `vae` is not a `PiDAutoencoder`, the pipeline cannot be interrupted, the noise
            levels of its scheduler are not known, `at_step` is less than 1, or `sigma` is no such
            level. At the first step: `at_step` exceeds the call's steps, or DDIM's steps are
            uneven.
    """
    if at_step is not None and sigma is not None:
        raise Mistake("sigma", f"{sigma} with at_step {at_step}; give one of them.")
    _check_pipeline(pipe)
    if sigma is None:
        at_step = 24 if at_step is None else at_step
        check_whole("at_step", at_step)
        check_at_least("at_step", at_step, 1)
        return EarlyStop(at_step)
    sigmas = list(sigma) if isinstance(sigma, Sequence) else [sigma]
    check_levels("sigma", sigmas)
    return EarlyStop(None, sigmas)


def check_levels(option: str, sigmas: Sequence[float]) -> None:
    """Raise `Mistake` unless these are noise levels to stop at, at least one."""
    if not sigmas or not all(0 <= level < 1 for level in sigmas):
        raise Mistake(option, f"{sigmas} must be levels from 0 (clean) to below 1 (noise).")


def signal_and_noise(scheduler: Any, timestep: Tensor | int) -> tuple[float, float]:
    """Coefficients of the latents after a step, which are `signal * z + noise * eps`.

    Args:
        scheduler: a diffusers scheduler whose `step` has just been called.
        timestep: the timestep that `step` was called with.

    Raises:
        Mistake: the scheduler is not supported.
    """
    kind = _kind(scheduler)
    if kind in DISCRETE:
        return _discrete(scheduler, int(timestep), kind)
    sigma = float(scheduler.sigmas[scheduler.step_index])  # `step` has already advanced the index
    if kind in FLOW or scheduler.config.get("use_flow_sigmas", False):
        return 1 - sigma, sigma
    if kind in EXPLODING:
        return 1.0, sigma
    spread = (sigma**2 + 1) ** 0.5
    return 1 / spread, sigma / spread


def to_frame(latents: Tensor, signal: float, noise: float, frame: str) -> tuple[Tensor, float]:
    """Latents `signal * z + noise * eps` converted to a frame of `noising`, and their level there.

    Args:
        latents: of any shape; computed in fp32, returned in their own dtype.
        signal: coefficient of the clean latents.
        noise: coefficient of the noise.
        frame: ``"flow"`` or ``"variance_preserving"``.
    """
    # A frame's signal and noise sum to 1, or their squares do.
    spread = signal + noise if frame == "flow" else math.hypot(signal, noise)
    return (latents.float() / spread).to(latents.dtype), noise / spread


def _discrete(scheduler: Any, timestep: int, kind: str) -> tuple[float, float]:
    """Signal and noise from the cumulative alpha at the timestep after the step."""
    if kind == "DDPMScheduler":
        previous, last = int(scheduler.previous_timestep(timestep)), scheduler.one
    else:
        config = scheduler.config
        previous = timestep - config.num_train_timesteps // scheduler.num_inference_steps
        last = scheduler.final_alpha_cumprod
    kept = float(scheduler.alphas_cumprod[previous] if previous >= 0 else last)
    return kept**0.5, (1 - kept) ** 0.5


def _check_spacing(scheduler: Any) -> None:
    """Refuse steps of DDIM after which latents are not where the next step takes them to be."""
    if _kind(scheduler) != "DDIMScheduler":
        return
    num_steps, timesteps = scheduler.num_inference_steps, scheduler.timesteps
    if (timesteps[:-1] - timesteps[1:] != scheduler.config.num_train_timesteps // num_steps).any():
        raise Mistake(
            "scheduler",
            f"with timestep_spacing {scheduler.config.timestep_spacing!r} and {num_steps} steps, "
            "DDIM leaves latents at other noise levels than it states; use timestep_spacing "
            "'leading', or another scheduler.",
        )


def _kind(scheduler: Any) -> str:
    for ancestor in type(scheduler).__mro__:
        if ancestor.__name__ in KNOWN_SCHEDULERS:
            return ancestor.__name__
    raise Mistake(
        "scheduler",
        f"the noise level of a {type(scheduler).__name__} is not known; use one of "
        f"{', '.join(KNOWN_SCHEDULERS)}.",
    )


def _check_pipeline(pipe: Any) -> None:
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, PiDAutoencoder) or not hasattr(type(pipe), "interrupt"):
        raise Mistake(
            "pipe",
            f"a {type(pipe).__name__} with a {type(vae).__name__} cannot be stopped early; use a "
            "pipeline with an `interrupt` property, and set pipe.vae = PiDAutoencoder(pipe.vae, "
            "decoder) first.",
        )
    _kind(pipe.scheduler)
