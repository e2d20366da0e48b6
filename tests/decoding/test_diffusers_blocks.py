"""Modular pipelines of diffusers: PiD as a decode step, and loops that stop at a noise level."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import (
    HEIGHT,
    SCALE,
    WIDTH,
    decoder_for,
    flux2_vae,
    qwen_vae,
    random_tensor,
    randomise,
)
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.decoding.diffusers_blocks import with_pid
from pid_lightning.decoding.diffusers_vae import PiDAutoencoder

STEPS = 4


def flux3_transformer(flow_map: bool) -> Any:
    return randomise(
        diffusers.Flux3Transformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=flow_map,
        )
    )


TEXT = {"prompt_embeds": random_tensor(1, 3, 16)}
GUIDED = {"negative_prompt_embeds": random_tensor(1, 3, 16, seed=1)}
MASKS = {f"{name}_mask": torch.ones(1, 3, dtype=torch.int64) for name in (*TEXT, *GUIDED)}
PIPELINES = {  # blocks, transformer, autoencoder, text
    "flux2": (
        diffusers.Flux2AutoBlocks,
        lambda: tiny_pipelines.flux2().pipe.transformer,
        flux2_vae,
        TEXT,
    ),
    "flux3": (
        diffusers.Flux3AutoBlocks,
        lambda: flux3_transformer(False),
        flux2_vae,
        TEXT | GUIDED,
    ),
    "flux3_distilled": (
        diffusers.Flux3DistilledAutoBlocks,
        lambda: flux3_transformer(True),
        flux2_vae,
        TEXT,
    ),
    "qwen": (
        diffusers.QwenImageAutoBlocks,
        lambda: tiny_pipelines.qwen().pipe.transformer,
        qwen_vae,
        TEXT | GUIDED | MASKS,
    ),
}
every = pytest.mark.parametrize("name", PIPELINES)


def modular(name: str, wrap: Any = with_pid) -> tuple[Any, Any, Any]:
    """A pipeline without its text encoder, its decoder, and how to call it."""
    blocks, transformer, vae, text = PIPELINES[name]
    blocks = blocks()
    for unused in ("text_encoder", "prompt_upsampler"):
        blocks.sub_blocks.pop(unused, None)
    pipe = wrap(blocks).init_pipeline()
    components = {"transformer": transformer(), "vae": vae()}
    if pipe.scheduler is None:
        components["scheduler"] = tiny_pipelines.dynamic_shift()
    pipe.update_components(**components)
    decoder = decoder_for(components["vae"])
    if "diffusion_decoder" in pipe.component_names:
        pipe.update_components(diffusion_decoder=decoder)
    pipe.set_progress_bar_config(disable=True)

    def call(output: str = "images", **more: Any) -> Any:
        size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS}
        given = size | {"output_type": "pt"} | text | more
        given = {"generator": torch.Generator().manual_seed(0)} | given
        return pipe(**given, output=output)

    return pipe, decoder, call


def plain(blocks: Any) -> Any:
    return blocks


def normalised(pipe: Any, call: Any, **more: Any) -> Tensor:
    """Latents (B, C, h, w) of what diffusers' own decode step gives to its autoencoder."""
    taken = []
    pipe.vae.decode = lambda z, **more: taken.append(z) or (torch.zeros(len(z), 3, 1, 8, 8),)
    call(**more)
    return tiny_pipelines.space_of(pipe.vae).normalise(taken[0])


@every
def test_the_decode_step_is_pids(name: str) -> None:
    """The generator of its noise is the pipeline's, which has drawn that of the latents."""
    own, decoder, call_own = modular(name, plain)
    generator = torch.Generator().manual_seed(0)
    latents = normalised(own, call_own, generator=generator)
    by_hand = decoder.decode(latents, generator=generator, progress=False)
    pipe, _, call = modular(name)
    pipe.update_components(diffusion_decoder=decoder)
    picture = call()
    assert picture.shape == (1, 3, HEIGHT * SCALE, WIDTH * SCALE)
    torch.testing.assert_close(picture, by_hand / 2 + 0.5, atol=1e-4, rtol=0)
    assert (call(pid_steps=1, pid_tile=None) - picture).abs().mean() > 1e-3
    assert call(output_type="pil")[0].size == (WIDTH * SCALE, HEIGHT * SCALE)
    assert len(call(num_images_per_prompt=2, generator=None)) == 2


def random_noise(name: str, pipe: Any, call: Any) -> Tensor:
    """The noise that a call begins with, in the pipeline's layout."""
    begun = []
    step = pipe.scheduler.step

    def first(v: Tensor, t: Tensor, x: Tensor, **more: Any) -> Any:
        begun.append(x)
        return step(v, t, x, **more)

    pipe.scheduler.step = first
    call()
    pipe.scheduler.step = step
    return begun[0]


@every
@pytest.mark.parametrize("in_vae", [False, True], ids=["step", "vae"])
def test_a_loop_stops_at_a_noise_level(name: str, in_vae: bool, monkeypatch) -> None:
    """An analytic denoiser: the straight line from eps to z at every step."""
    if in_vae:  # the decode step stays diffusers' own, the autoencoder is PiD's
        pipe, decoder, call = modular(name, keeping_decode)
        pipe.update_components(vae=PiDAutoencoder(pipe.vae, decoder))
    else:
        pipe, decoder, call = modular(name)
    eps = random_noise(name, pipe, call)
    z = random_tensor(*eps.shape, seed=1)
    step, decode, seen = pipe.scheduler.step, decoder.decode, []
    monkeypatch.setattr(
        pipe.scheduler, "step", lambda v, *given, **more: step(eps - z, *given, **more)
    )
    monkeypatch.setattr(
        decoder, "decode", lambda *given, **more: seen.append(given) or decode(*given, **more)
    )
    picture = call()
    assert picture.shape == (1, 3, HEIGHT * SCALE, WIDTH * SCALE)
    clean, level = seen.pop()[:2]
    assert level == 0
    sigmas = pipe.scheduler.sigmas.tolist()
    for i in (1, 3):
        assert call(stop_sigma=(sigmas[i] + sigmas[i - 1]) / 2).shape == picture.shape
        latents, level = seen.pop()[:2]
        assert level == pytest.approx(sigmas[i], abs=1e-6)
        noisy = clean + sigmas[i] * (start(name, decoder, eps) - clean)
        torch.testing.assert_close(latents, noisy, atol=1e-3, rtol=0)
    assert torch.equal(call(), picture)  # no level is left behind


def start(name: str, decoder: Any, eps: Tensor) -> Tensor:
    """Tokens as latents (B, C, h, w)."""
    stride = 8 if name == "qwen" else 16
    height, width = HEIGHT // stride, WIDTH // stride
    if name == "qwen":  # of 2 x 2 cells
        return diffusers.QwenImagePipeline._unpack_latents(eps, HEIGHT, WIDTH, 8)[:, :, 0]
    return eps.transpose(1, 2).unflatten(2, (height, width))


def keeping_decode(blocks: Any) -> Any:
    decode = blocks.sub_blocks["decode"]
    blocks = with_pid(blocks)
    blocks.sub_blocks["decode"] = decode
    return blocks


@every
def test_an_autoencoder_with_pid_is_a_component(name: str) -> None:
    pipe, decoder, call = modular(name, plain)
    native = call()
    pipe.update_components(vae=PiDAutoencoder(pipe.vae, decoder))
    assert call().shape == (1, 3, HEIGHT * SCALE, WIDTH * SCALE)
    pipe.update_components(vae=pipe.vae.native)
    assert torch.equal(call(), native)


def test_blocks_of_diffusers_stay_as_they_are() -> None:
    """Theirs are shared by all pipelines."""
    before = repr(diffusers.Flux2AutoBlocks())
    with_pid(diffusers.Flux2AutoBlocks())
    assert repr(diffusers.Flux2AutoBlocks()) == before


def test_a_level_that_is_none_is_refused() -> None:
    _, _, call = modular("flux2")
    with pytest.raises(Mistake) as told:
        call(stop_sigma=1.5)
    assert told.value.option == "stop_sigma"
