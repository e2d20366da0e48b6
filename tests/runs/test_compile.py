"""Compiled networks: one graph per size, no recompiling between steps, same picture as eager."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

from pid_lightning import AdapterConfig, PiDDecoder
from pid_lightning.nn.compilation import compile_for_inference

TEXTLESS = AdapterConfig(width=16, num_res_blocks=1, inject_pixels=True, sigma_plane=True)


def make_decoder() -> PiDDecoder:
    """A student with no zero weights."""
    module = tiny.module(adapter=TEXTLESS, prediction="x0")
    module.student_times, module.image_size = (0.999, 0.866, 0.634, 0.342), 64
    return PiDDecoder(tiny.randomise(module.denoiser), module.info)


def draw_latents(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(1, 16, rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fixed", [False, True])
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
    message = "comes too late: compiled graphs hold the weights"
    with pytest.raises(ValueError, match=rf"^dtype: torch.bfloat16 {message}"):
        decoder.to(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"^quantise {message}"):
        decoder.quantise()
    make_decoder().compile().to(dtype=torch.bfloat16)


def test_more_sizes_than_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pid_lightning.nn.compilation.MAX_GRAPHS", 1)
    decoder = make_decoder()
    torch._dynamo.reset()
    decoder.denoiser.compile = lambda **_: setattr(
        decoder.denoiser, "_compiled_call_impl", decoder.denoiser.forward
    )
    decoder.compile().decode(draw_latents(2, 2), seed=0, progress=False)
    with pytest.raises(ValueError, match="compile: 2 sizes of input, but at most 1 are compiled"):
        decoder.decode(draw_latents(2, 3), seed=0, progress=False)
    decoder.decode(draw_latents(2, 2), seed=0, progress=False)  # its graph is still there


def test_inference_mode_takes_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pid_lightning.nn.compilation.MAX_GRAPHS", 1)
    torch._dynamo.reset()
    network = OneProduct()
    compile_for_inference(network)
    with torch.no_grad():
        network(torch.ones(1, 2))
    with torch.inference_mode(), pytest.raises(ValueError, match="at most 1 are compiled"):
        network(torch.ones(1, 2))


@pytest.mark.parametrize("named", [False, True])
def test_a_size_is_that_of_all_inputs(monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """A caption's length counts too, and the way the inputs are given does not matter."""
    monkeypatch.setattr("pid_lightning.nn.compilation.MAX_GRAPHS", 2)
    torch._dynamo.reset()
    network = Sum()
    compile_for_inference(network)
    with torch.no_grad():
        for length in (1, 2, 1):
            inputs = {"x": torch.ones(1, 2), "captions": [torch.ones(length, 2)]}
            result = network(**inputs) if named else network(*inputs.values())
            assert result.sum() == 2 + 2 * length
        with pytest.raises(ValueError, match=r"^compile: 3 sizes of input, but at most 2"):
            network(torch.ones(1, 2), [torch.ones(3, 2)])


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"^cuda_graphs: this network is on cpu, .* to a GPU"):
        make_decoder().compile(cuda_graphs=True)


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


class OneProduct(torch.nn.Module):
    """Not one of torch's own modules, which old torch versions do not compile on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Sum(torch.nn.Module):
    """Like a denoiser under a condition: a tensor, and others inside of something."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, captions: list[torch.Tensor]) -> torch.Tensor:
        return self.one * x.sum() + captions[0].sum()


def test_many_sizes_are_compiled_each_once() -> None:
    """torch's default limit raises at the ninth size."""
    torch._dynamo.reset()
    network = OneProduct()
    compile_for_inference(network)
    batches = [torch.ones(size, 2) for size in range(1, 13)]
    with torch.no_grad():
        for batch in batches[:-1]:
            network(batch)
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in batches[:-1]:
                network(batch)
            with pytest.raises(RuntimeError, match="fail_on_recompile"):
                network(batches[-1])
