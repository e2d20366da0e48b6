"""Compiled networks: one graph per size, no recompiling between steps, same picture as eager."""

from __future__ import annotations

import copy
from collections.abc import Callable

import decoders
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pid_lightning import AdapterConfig, PiDDecoder
from pid_lightning.checks import Mistake

TEXTLESS = AdapterConfig(width=16, num_res_blocks=1, inject_pixels=True, sigma_plane=True)


def make_decoder() -> PiDDecoder:
    """A student with no zero weights."""
    sizes = {"adapter": TEXTLESS, "prediction": "x0"}
    return decoders.make(latent_channels=16, image_size=64, sizes=sizes)


def draw_latents(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(1, 16, rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fixed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_graph_a_size_whatever_the_steps_and_tiles(fixed: bool) -> None:
    torch._dynamo.reset()
    decoder, counter = make_decoder(), CompileCounter()
    if fixed:
        decoder.fix_times()
    latents = draw_latents(2, 2)
    eager = decoder.decode(latents, seed=0, progress=False)
    decoder.denoiser.compile(backend=counter, fullgraph=True, dynamic=False)
    for steps in (4, 2, 1):
        compiled = decoder.decode(latents, seed=0, steps=steps, progress=False)
        if steps == 4:
            assert torch.equal(compiled, eager)
    assert counter.frame_count == 1
    for size in ((4, 6), (3, 4), (5, 2)):  # a tile is like a whole picture of its size
        decoder.decode(draw_latents(*size), 0.3, seed=0, tile=64, progress=False)
        assert counter.frame_count == 1
    decoder.decode(draw_latents(3, 2), 0.3, seed=0, progress=False)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_decodes_as_eager(dtype: torch.dtype) -> None:
    """Two networks of one shape, each compiled both ways, in one process: four pictures."""
    torch._dynamo.reset()
    latents = draw_latents(2, 3)
    near = 1e-7 if dtype == torch.bfloat16 else 1e-12
    for shift in (0.0, 0.1):
        for freeze in (False, True):
            decoder = make_decoder().to(dtype=dtype)
            decoder.denoiser.out.bias.add_(shift)
            eager = decoder.decode(latents, seed=0, progress=False)
            compiled = decoder.compile(freeze=freeze).decode(latents, seed=0, progress=False)
            assert (compiled - eager).square().mean() < near


@pytest.mark.slow
def test_only_frozen_graphs_do_not_see_weights_that_change() -> None:
    torch._dynamo.reset()
    latents = draw_latents(2, 2)
    for freeze in (False, True):
        decoder = make_decoder().compile(freeze=freeze)
        before = decoder.decode(latents, seed=0, progress=False)
        decoder.denoiser.out.bias.add_(0.1)
        after = decoder.decode(latents, seed=0, progress=False)
        assert torch.equal(before, after) == freeze


def test_what_frozen_graphs_would_not_see_is_refused() -> None:
    decoder = make_decoder().compile(freeze=True)
    for option, change in (
        ("dtype", lambda: decoder.to(dtype=torch.bfloat16)),
        ("quantise", decoder.quantise),
        ("fix_times", decoder.fix_times),
    ):
        with pytest.raises(Mistake) as told:
            change()
        assert told.value.option == option
    make_decoder().compile().to(dtype=torch.bfloat16)


def test_windows_compile_to_one_graph() -> None:
    torch._dynamo.reset()
    decoder, counter = make_decoder(), CompileCounter()
    decoder.attend_in_windows(32)
    latents = draw_latents(2, 3)
    eager = decoder.decode(latents, seed=0, progress=False)
    decoder.denoiser.compile(backend=counter, fullgraph=True, dynamic=False)
    assert torch.equal(decoder.decode(latents, seed=0, progress=False), eager)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_many_sizes_are_compiled_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default limit raises at the ninth size; a copy of the network uses its weights."""
    torch._dynamo.reset()
    compiled = []

    def sizes_of(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        compiled.append(inputs)
        return graph.forward

    compile_function = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, options, **how: compile_function(function, backend=sizes_of, **how),
    )
    decoder = make_decoder()
    decoder.attend_in_windows(None)
    eager = copy.deepcopy(decoder.denoiser)
    decoder.compile()
    twin = copy.deepcopy(decoder.denoiser)
    twin.out.bias.data.add_(0.1)
    sigma, t = torch.zeros(1), torch.full((1,), 0.7)
    with torch.no_grad():
        for columns in range(1, 11):
            latents = draw_latents(1, columns)
            x_t = torch.ones(1, 3, 32, 32 * columns)
            expected = eager(x_t, t, eager.condition(latents, sigma))
            for _ in range(2):
                velocity = decoder.denoiser(x_t, t, decoder.denoiser.condition(latents, sigma))
                assert torch.equal(velocity, expected)
            assert len(compiled) == columns
        moved = twin(x_t, t, twin.condition(latents, sigma))
    assert not torch.allclose(moved, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_decode_as_eager() -> None:
    """Also with two results alive at once: a replay must not overwrite the previous one."""
    torch._dynamo.reset()
    decoder = make_decoder().to("cuda")
    latents = draw_latents(2, 3).to("cuda")
    sigma, t = torch.zeros(1, device="cuda"), torch.full((1,), 0.7, device="cuda")
    eager = decoder.decode(latents, seed=0, progress=False)
    decoder.compile(cuda_graphs=True)
    for _ in range(3):  # the first calls warm up and record
        compiled = decoder.decode(latents, seed=0, progress=False)
        assert (compiled - eager).square().mean() < 1e-10
    condition = decoder.denoiser.condition(latents, sigma)
    x = torch.randn(compiled.shape, device="cuda")
    with torch.no_grad():
        first = decoder.denoiser(x, t, condition)
        kept = first.clone()
        decoder.denoiser(-x, t, condition)
    assert torch.equal(first, kept)
