"""PiD in a diffusers pipeline: the pipeline's autoencoder with `decode` replaced by PiD's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.decoding.arguments import check_features, check_options
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.encoders.latent_spaces import LatentSpace, space_of

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DecoderOutput


class PiDAutoencoder:
    """A pipeline's autoencoder whose `decode` is PiD's: ``pipe.vae = PiDAutoencoder(pipe.vae, d)``.

    Pictures are `decoder.scale` times as large; nothing else changes. The object is also an
    instance of the wrapped autoencoder's class and shares its weights and configuration, so
    `encode`, `config`, `dtype`, `to`, `isinstance` and `pipe.save_pretrained` (which saves the
    original pipeline) work as before. ``pipe.vae = pipe.vae.native`` removes PiD. Only diffusers'
    `from_pipe` checks for the exact class and needs it passed: ``from_pipe(pipe, vae=pipe.vae)``.

    The decoder follows the autoencoder to its device, also when offloading, but keeps its own
    dtype: a pipeline in half precision does not change PiD's precision.

    Args:
        vae: one of the `latent_spaces.SUPPORTED_CLASSES`.
        decoder: a decoder for the same latent space. Of an `AutoencoderTiny`, which does not state
            its own, only the geometry is compared.
        prompt, steps, seed, tile, guidance_scale, negative_prompt: arguments of
            `PiDDecoder.decode`, kept as attributes that can be changed between calls; prompts given
            as words are encoded now. A pipeline passes neither a prompt nor a generator to
            `decode`; with a fixed seed, equal latents give equal pictures. While `tile` is None,
            `enable_tiling` means ``"auto"``; `enable_slicing` affects only the wrapped autoencoder.

    Attributes:
        native: the wrapped autoencoder.
        pid_decoder: the PiD decoder (`decoder` is the wrapped autoencoder's own).
        space: the latent space of both.

    Raises:
        Mistake: the decoder is for another latent space, or cannot decode with these arguments.
        ValueError: the autoencoder's class is not supported.
    """

    def __init__(
        self,
        vae: nn.Module,
        decoder: PiDDecoder,
        *,
        prompt: str | list[str] | Tensor | None = None,
        steps: int | None = None,
        seed: int | None = 0,
        tile: int | Literal["auto"] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | Tensor | None = None,
    ) -> None:
        native = vae.native if isinstance(vae, PiDAutoencoder) else vae
        space = space_of(native)
        if space.name.startswith("tiny-"):
            space = replace(space, name=decoder.latent_space)
        _check_same_space(type(native).__name__, space, decoder)
        info = decoder.info
        check_options(decoder.denoiser, info.student_times, steps, tile, prompt, guidance_scale)
        if guidance_scale != 1 and not info.config.learned_null and negative_prompt is None:
            negative_prompt = ""
        # Now, not after the pipeline's loop.
        prompt, negative_prompt = (_encoded(decoder, p) for p in (prompt, negative_prompt))
        self.__class__ = _with_pid(type(native))
        # Bypass nn.Module's registration: neither the decoder nor the wrapped autoencoder may
        # become a submodule, which would be saved, cast and counted.
        self.__dict__.update(native.__dict__)
        self.__dict__.update(
            native=native,
            space=space,
            pid_decoder=decoder,
            prompt=prompt,
            steps=steps,
            seed=seed,
            tile=tile,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            _expected=None,
        )

    def expect_noise(self, latent_sigma: float, still: Callable[[], bool]) -> None:
        """Treat the next latents as noisy; called by `early_stop` just before they arrive.

        Args:
            latent_sigma: their noise level, in the frame the decoder was trained in.
            still: called when latents arrive; False means that these are other, clean latents.
        """
        self._expected = (latent_sigma, still)

    @torch.no_grad()
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode the raw latents that a pipeline passes to its autoencoder.

        Args:
            z: raw latents, as `encode` returns them: (B, C, h, w), or (B, C, 1, h, w) for
                autoencoders of videos.
            return_dict: return a `DecoderOutput` instead of a tuple with one element.
            generator: generator of PiD's noise; None uses `seed`.

        Returns:
            fp32 pictures (B, 3, H, W), or (B, 3, 1, H, W) for videos', in [-1, 1] on z's device,
            `pid_decoder.scale` times as large as the autoencoder's own.
        """
        from diffusers.models.autoencoders.vae import DecoderOutput

        hook = getattr(self, "_hf_hook", None)  # accelerate's, called by diffusers on each decode
        if hook is not None:
            hook.pre_forward(self)
        decoder = self.pid_decoder
        pictures = decoder.decode(
            self.space.normalise(z.float()).to(decoder.device),
            self._take_latent_sigma(),
            _repeated(self.prompt, len(z)),
            self.steps,
            generator=generator,
            seed=self.seed if generator is None else None,
            tile="auto" if self.tile is None and self.use_tiling else self.tile,
            progress=False,
            guidance_scale=self.guidance_scale,
            negative_prompt=_repeated(self.negative_prompt, len(z)),
        ).to(z.device)
        if z.ndim == 5:
            pictures = pictures[:, :, None]  # (B, 3, 1, H, W)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)

    def _take_latent_sigma(self) -> float:
        expected, self._expected = self._expected, None
        if expected is None:
            return 0.0
        latent_sigma, still = expected
        return latent_sigma if still() else 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PiDAutoencoder:
        """Called by `to` and offloading: moves and casts the autoencoder, only moves PiD."""
        decoder = self.pid_decoder
        decoder.to(device=fn(torch.empty(0, device=decoder.device)).device)
        return super()._apply(fn, recurse)


def _encoded(decoder: PiDDecoder, prompt: str | list[str] | Tensor | None) -> Tensor | None:
    """Features of a prompt that `decode` can take; None stays."""
    if prompt is None:
        return None
    text = prompt if isinstance(prompt, Tensor) else decoder.encode_prompt(prompt)
    check_features(text, decoder.info.config.text_width, len(text) if text.ndim == 3 else 1)
    return text


def _repeated(prompt: str | list[str] | Tensor | None, num: int) -> Any:
    """A prompt for each of `num` pictures, in diffusers' order of several per prompt."""
    is_list = isinstance(prompt, list | tuple) or (isinstance(prompt, Tensor) and prompt.ndim == 3)
    if not is_list or len(prompt) == 0 or num % len(prompt):
        return prompt
    places = [i for i in range(len(prompt)) for _ in range(num // len(prompt))]
    return prompt[places] if isinstance(prompt, Tensor) else [prompt[i] for i in places]


def _check_same_space(vae: str, space: LatentSpace, decoder: PiDDecoder) -> None:
    geometry = decoder.info.geometry
    theirs = (decoder.latent_space, geometry.latent_channels, geometry.latent_stride)
    if theirs != (space.name, space.channels, space.stride):
        raise Mistake(
            "decoder",
            f"this one decodes {theirs[0]!r} latents ({theirs[1]} channels, stride {theirs[2]}), "
            f"but the pipeline's {vae} produces {space.name!r} latents ({space.channels} channels, "
            f"stride {space.stride}); use a decoder for {space.name!r}.",
        )


@functools.cache
def _with_pid(vae_class: type[nn.Module]) -> type[Any]:
    """`vae_class` with PiD's `decode`, under the same name, which diffusers saves to files."""
    return type(
        vae_class.__name__, (PiDAutoencoder, vae_class), {"__module__": vae_class.__module__}
    )
