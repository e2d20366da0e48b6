"""PiD in diffusers' modular pipelines: a decode step, and loops that stop early."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
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

    It takes the place of the pipeline's own decode step, whose autoencoder is then not used. Its
    output is `images`, its inputs are:
        latents: normalised, (B, C, h, w), or (B, C, 1, h, w) of a video model's picture, as the
            decode steps of diffusers take them.
        latent_sigma: their noise level, from a loop of `stopping`; 0 where there is none.
        generator: of PiD's noise, as in `PiDDecoder.decode`; None is seed 0.
        output_type: ``"pil"``, ``"np"`` or ``"pt"``.
        pid_prompt, pid_steps, pid_tile: as in `PiDDecoder.decode`; tile is ``"auto"`` by default.
    """
    from diffusers.modular_pipelines import ComponentSpec

    defaults = {"latent_sigma": 0.0, "generator": None, "output_type": "pil"}
    defaults |= {"pid_prompt": None, "pid_steps": None, "pid_tile": "auto"}
    spec = ComponentSpec("diffusion_decoder", PiDDecoder)
    return _block("PiDDecodeStep", _decode, defaults, ["images"], [spec])


def stopping(loop: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """A copy of a denoising loop that ends after the first step that leaves as much noise as its
    input ``stop_sigma``, or less; None, the default, runs all steps.

    The level is that of the decoder's frame, as in `early_stop.stop_early`. What is left is the
    output ``latent_sigma``, which `decode_step` takes; a component ``vae`` that is a
    `PiDAutoencoder` is told, too.
    """
    loop = copy.deepcopy(loop)
    loop.__class__ = type("StoppingLoop", (_StoppingLoop, type(loop)), {"__module__": __name__})
    outputs = ["latents", "latent_sigma"]
    loop.sub_blocks["stop"] = _block("StopStep", _stop, {"stop_sigma": None}, outputs)
    return loop


def _decode(self: Any, components: Any, state: Any) -> tuple[Any, Any]:
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


def _stop(self: Any, components: Any, block: Any, i: int, t: Tensor) -> tuple[Any, Any]:
    """The last step of a loop's iteration: ends the loop where enough noise is gone."""
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


def _block(
    name: str,
    call: Callable[..., tuple[Any, Any]],
    defaults: Mapping[str, Any],
    outputs: Sequence[str],
    components: Sequence[Any] = (),
) -> Any:
    """A block that takes latents and inputs with defaults."""
    from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam

    inputs = [InputParam("latents", required=True)]
    inputs += [InputParam(key, default=value) for key, value in defaults.items()]
    members = {
        "description": "Step of pid_lightning's diffusers_blocks.",
        "inputs": inputs,
        "intermediate_outputs": [OutputParam(key) for key in outputs],
        "expected_components": list(components),
        "__call__": torch.no_grad()(call),
        "__module__": __name__,
    }
    return type(name, (ModularPipelineBlocks,), members)()


def _stop_loops(blocks: Any) -> None:
    from diffusers import LoopSequentialPipelineBlocks

    for name, block in blocks.sub_blocks.items():
        if isinstance(block, LoopSequentialPipelineBlocks):
            blocks.sub_blocks[name] = stopping(block)
        else:
            _stop_loops(block)
