"""PiD in diffusers' modular pipelines: a decode step, and loops that stop early."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.diffusers_vae import PiDAutoencoder
from pid_lightning.decoding.early_stop import (
    ROUNDING,
    check_levels,
    signal_and_noise,
    to_frame,
)

if TYPE_CHECKING:
    from diffusers import ModularPipelineBlocks


def with_pid(blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """A copy of a modular pipeline's blocks that decodes with PiD and can stop early.

    ::

        pipe = with_pid(Flux2AutoBlocks()).init_pipeline("black-forest-labs/FLUX.2-dev")
        pipe.load_components(dtype=torch.bfloat16)
        pipe.update_components(diffusion_decoder=PiDDecoder.from_pretrained())
        picture = pipe(prompt="a lemur", stop_sigma=0.2, output="images")[0]

    Its step named ``decode`` is a `decode_step`, and each of its loops is one of `stopping`.
    """
    blocks = copy.deepcopy(blocks)  # diffusers shares the instances between pipelines
    if "decode" in blocks.sub_blocks:
        blocks.sub_blocks["decode"] = decode_step()
    _stop_loops(blocks)
    return blocks


def decode_step() -> ModularPipelineBlocks:
    """A block that decodes a pipeline's latents with its component ``diffusion_decoder``.

    It takes the place of the pipeline's own decode step, whose autoencoder is then not used.
    Inputs:
        latents: normalised, (B, C, h, w), or (B, C, 1, h, w) of a video model's picture, as the
            decode steps of diffusers take them.
        latent_sigma: their noise level, from a loop of `stopping`; 0 where there is none.
        generator: of PiD's noise, as in `PiDDecoder.decode`; None is seed 0.
        output_type: ``"pil"``, ``"np"`` or ``"pt"``.
        pid_prompt, pid_steps, pid_tile: `prompt`, `steps` and `tile` of `PiDDecoder.decode`; tile
            is ``"auto"`` by default.
    Output: images.
    """
    return _class(PiDDecodeStep)()


def stopping(loop: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """A copy of a denoising loop that ends after the first step that leaves as much noise as its
    input ``stop_sigma``, or less; None, the default, runs all steps.

    The level is that of the decoder's frame, as in `early_stop.stop_early`. What is left is the
    output ``latent_sigma``, which `decode_step` takes; a component ``vae`` that is a
    `PiDAutoencoder` is told, too.
    """
    loop = copy.deepcopy(loop)
    loop.__class__ = _class(_StoppingLoop, type(loop))
    loop.sub_blocks["stop"] = _class(_StopStep)()
    return loop


class PiDDecodeStep:
    """See `decode_step`."""

    description = "Step that decodes normalised latents to larger pictures by pixel diffusion."

    @property
    def expected_components(self) -> list[Any]:
        """One `PiDDecoder`."""
        from diffusers.modular_pipelines import ComponentSpec

        return [ComponentSpec("diffusion_decoder", PiDDecoder)]

    @property
    def inputs(self) -> list[Any]:
        """See `decode_step`."""
        return [
            _input("latents", Tensor, "normalised latents", required=True),
            _input("latent_sigma", float, "noise level of the latents", default=0.0),
            _input("generator", torch.Generator, "of the decoder's noise"),
            _input("output_type", str, "pil, np or pt", default="pil"),
            _input("pid_prompt", Tensor, "caption: words, or features"),
            _input("pid_steps", int, "sampling steps of the decoder"),
            _input("pid_tile", int, "side of the decoder's tiles in pixels", default="auto"),
        ]

    @property
    def intermediate_outputs(self) -> list[Any]:
        """The pictures."""
        from diffusers.modular_pipelines import OutputParam

        return [OutputParam("images", description="pictures, the decoder's scale times as large")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Called by the pipeline."""
        from diffusers.image_processor import VaeImageProcessor

        block = self.get_block_state(state)
        latents = block.latents
        latents = latents[:, :, 0] if latents.ndim == 5 and latents.shape[2] == 1 else latents
        pictures = components.diffusion_decoder.to(latents.device).decode(
            latents.float(),
            block.latent_sigma,
            block.pid_prompt,
            block.pid_steps,
            generator=block.generator,
            seed=0 if block.generator is None else None,
            tile=block.pid_tile,
            progress=False,
        )
        block.images = VaeImageProcessor().postprocess(pictures, output_type=block.output_type)
        self.set_block_state(state, block)
        return components, state


class _StopStep:
    """The last step of a loop's iteration: ends the loop where enough noise is gone."""

    description = "Step within the denoising loop that ends it at a noise level."

    @property
    def inputs(self) -> list[Any]:
        return [
            _input("latents", Tensor, "latents after a step", required=True),
            _input("stop_sigma", float, "noise level to stop at; None runs all steps"),
        ]

    @property
    def intermediate_outputs(self) -> list[Any]:
        from diffusers.modular_pipelines import OutputParam

        names = {"latents": "the latents", "latent_sigma": "their noise level"}
        return [OutputParam(name, description=told) for name, told in names.items()]

    @torch.no_grad()
    def __call__(self, components: Any, block: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        block.latent_sigma = 0.0
        if block.stop_sigma is None:
            return components, block
        check_levels("stop_sigma", [block.stop_sigma])
        vae = getattr(components, "vae", None)
        takes_vae = isinstance(vae, PiDAutoencoder)
        decoder = vae.pid_decoder if takes_vae else components.diffusion_decoder
        signal, noise = signal_and_noise(components.scheduler, t)
        latents, level = to_frame(block.latents, signal, noise, decoder.info.noise_frame)
        if level > block.stop_sigma + ROUNDING:
            return components, block
        block.latents, block.latent_sigma = latents, level
        if takes_vae:
            vae.expect_noise(level, lambda: True)
        raise _Reached(components, block)


class _StoppingLoop:
    """A denoising loop that what it holds may end."""

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        try:
            return super().__call__(components, state)
        except _Reached as reached:
            components, block = reached.args
        self.set_block_state(state, block)
        return components, state


class _Reached(BaseException):
    """Ends a loop; diffusers logs what is an `Exception` as an error."""


@functools.cache
def _class(part: type, *bases: type) -> type[Any]:
    """A class of blocks, made on first use, since diffusers is slow to import."""
    from diffusers import ModularPipelineBlocks

    bases = bases or (ModularPipelineBlocks,)
    return type(part.__name__, (part, *bases), {"__module__": __name__})


def _stop_loops(blocks: Any) -> None:
    from diffusers import LoopSequentialPipelineBlocks

    for name, block in blocks.sub_blocks.items():
        if isinstance(block, LoopSequentialPipelineBlocks):
            blocks.sub_blocks[name] = stopping(block)
        else:
            _stop_loops(block)


def _input(name: str, kind: type, told: str, default: Any = None, required: bool = False) -> Any:
    from diffusers.modular_pipelines import InputParam

    return InputParam(name, type_hint=kind, default=default, required=required, description=told)
