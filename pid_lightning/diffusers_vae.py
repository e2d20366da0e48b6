"""PiD in a diffusers pipeline: the pipeline's own autoencoder, but for its `decode`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pid_lightning.decoder import PiDDecoder
from pid_lightning.latent_spaces import LatentSpace, space_of

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DecoderOutput


class PiDAutoencoder:
    """A pipeline's autoencoder whose `decode` is PiD's: ``pipe.vae = PiDAutoencoder(pipe.vae, d)``.

    Pictures come out `decoder.scale` times as large; nothing else changes. The object is of the
    wrapped autoencoder's class too and shares its weights and configuration, so that `encode`,
    `config`, `dtype`, `to`, `isinstance` and `pipe.save_pretrained`, which saves the original
    pipeline, go on as before. ``pipe.vae = pipe.vae.native`` takes PiD out again. Only diffusers'
    `from_pipe`, which asks for the very class, must be given it: ``from_pipe(pipe, vae=pipe.vae)``.

    The decoder goes wherever the pipeline's autoencoder goes, offloading included, but keeps its
    own type: a pipeline in half precision does not halve PiD's.

    Args:
        vae: `AutoencoderKL` (SD3, FLUX.1, SDXL, Z-Image), `AutoencoderKLFlux2` or
            `AutoencoderKLQwenImage`.
        decoder: a decoder of the same latent space.
        prompt, steps, seed, tile, guidance_scale: what `PiDDecoder.decode` is told. They are
            attributes of the same names, to be changed between calls. A pipeline gives no prompt
            and no generator to `decode`; with the seed fixed, equal latents make equal pictures.
            While `tile` is None, `enable_tiling` means ``"auto"``; `enable_slicing` is about the
            wrapped autoencoder alone.

    Attributes:
        native: the wrapped autoencoder.
        pid_decoder: the decoder (`decoder` is the wrapped autoencoder's own).
        space: the latent space of both.

    Raises:
        ValueError: an autoencoder of another class, or a decoder of another latent space.
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
    ) -> None:
        native = vae.native if isinstance(vae, PiDAutoencoder) else vae
        space = space_of(native)
        _check_same_space(type(native).__name__, space, decoder)
        self.__class__ = _with_pid(type(native))
        # Past nn.Module's own bookkeeping: neither the decoder nor the wrapped autoencoder may
        # become a part of this one's state, which is saved, cast and counted.
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
            _expected=None,
        )

    def expect_noise(self, latent_sigma: float, still: Callable[[], bool]) -> None:
        """Take the next latents to be noisy; `early_stop` says so just before they come.

        Args:
            latent_sigma: their noise level, in the frame the decoder was trained in.
            still: asked when they come; if false, these are other latents, and clean.
        """
        self._expected = (latent_sigma, still)

    @torch.no_grad()
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Pictures from the raw latents that a pipeline gives to its autoencoder.

        Args:
            z: raw latents, as `encode` makes them: (B, C, h, w), of Qwen-Image (B, C, 1, h, w).
            return_dict: a `DecoderOutput`, or a tuple of one.
            generator: of PiD's noise; None draws from `seed`.

        Returns:
            Pictures (B, 3, H, W), of Qwen-Image (B, 3, 1, H, W), in [-1, 1] and fp32, on z's
            device, `pid_decoder.scale` times as large as the autoencoder's own.
        """
        from diffusers.models.autoencoders.vae import DecoderOutput

        hook = getattr(self, "_hf_hook", None)  # of accelerate, around every decode of diffusers
        if hook is not None:
            hook.pre_forward(self)
        decoder = self.pid_decoder
        pictures = decoder.decode(
            self.space.normalise(z.float()).to(decoder.device),
            self._take_latent_sigma(),
            self.prompt,
            self.steps,
            generator=generator,
            seed=self.seed if generator is None else None,
            tile="auto" if self.tile is None and self.use_tiling else self.tile,
            progress=False,
            guidance_scale=self.guidance_scale,
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
        """What `to` and offloading call: the autoencoder is moved and cast, PiD only moved."""
        decoder = self.pid_decoder
        decoder.to(device=fn(torch.empty(0, device=decoder.device)).device)
        return super()._apply(fn, recurse)


def _check_same_space(vae: str, space: LatentSpace, decoder: PiDDecoder) -> None:
    theirs = (decoder.latent_space, decoder.latent_channels, decoder.latent_stride)
    if theirs != (space.name, space.channels, space.stride):
        raise ValueError(
            f"decoder: this one decodes {theirs[0]!r} latents ({theirs[1]} channels, stride "
            f"{theirs[2]}), but the pipeline's {vae} makes {space.name!r} ones ({space.channels} "
            f"channels, stride {space.stride}): take a decoder of {space.name!r}."
        )


@functools.cache
def _with_pid(vae_class: type[nn.Module]) -> type[Any]:
    """`vae_class` with PiD's `decode`, under its own name, which diffusers writes into files."""
    return type(
        vae_class.__name__, (PiDAutoencoder, vae_class), {"__module__": vae_class.__module__}
    )
