"""The attention kernel: on a GPU in bf16, without one as interpreted by Triton in fp32."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pid_lightning.nn import attention

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = torch.__version__ >= (2, 8) and importlib.util.find_spec("triton") is not None
ON_HOPPER = attention._runs_kernel(torch.device("cuda"))
DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETS else ("cuda", torch.bfloat16)
ROUNDING = 1e-6 if INTERPRETS else 2**-8

needs_kernel = pytest.mark.skipif(not (INTERPRETS or ON_HOPPER), reason="needs a Hopper GPU")
needs_triton = pytest.mark.skipif(INTERPRETS or not HAS_TRITON, reason="needs Triton 3.4")


def draw(num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q, k, v of 2 samples with 3 heads, as views of what one layer computes."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, max(num_queries, num_keys), 3, 3, 64, generator=generator)
    q, k, v = packed.to(DEVICE, DTYPE).permute(2, 0, 3, 1, 4)
    return q[:, :, :num_queries], k[:, :, :num_keys], v[:, :, :num_keys]


def error(attended: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative to softmax attention in fp64."""
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return ((attended - exact).norm() / exact.norm()).item()


@pytest.mark.skipif(ON_HOPPER, reason="the GPU runs these tests itself")
@needs_triton
def test_on_a_cpu_triton_interprets_the_kernel() -> None:
    """In a process of its own: Triton decides when it is imported."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        pytest.skip("needs Triton 3.8, whose interpreter goes with any numpy")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout
    assert "9 passed" in run.stdout


@needs_triton
def test_compiles_for_a_hopper_gpu() -> None:
    """To asynchronous matrix instructions fed by bulk copies, two tiles a multiprocessor; without
    a GPU, which only runs it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pid_lightning.nn import attention_kernel as kernel

    rows = {"q": kernel.QUERIES, "k": kernel.KEYS, "v": kernel.KEYS, "attended": kernel.QUERIES}
    kinds = {f"{name}_desc": f"tensordesc<bf16[1, 1, {n}, 64]>" for name, n in rows.items()}
    constants = {"QUERIES": kernel.QUERIES, "KEYS": kernel.KEYS, "HEAD_DIM": 64, "SCALE": 0.18}
    names = kernel._attend.arg_names
    kinds |= {"num_keys": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel._attend,
        signature={name: kinds[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={},
    )
    options = {"num_warps": kernel.WARPS, "num_stages": kernel.STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert compiled.metadata.shared < 113 * 2**10


@needs_kernel
@pytest.mark.parametrize(("num_queries", "num_keys"), [(100, 77), (128, 64), (5, 1), (130, 200)])
def test_is_softmax_attention_for_any_number_of_queries_and_keys(num_queries, num_keys) -> None:
    heads = draw(num_queries, num_keys)
    attended = attention.attend_by_kernel(*heads)
    assert attended.shape == heads[0].shape
    assert attended.dtype == DTYPE
    assert error(attended, *heads) < ROUNDING


@needs_kernel
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_scores_of_any_size_are_safe() -> None:
    """Sums that overflow, or are all flushed to zero, are done again with the maximum."""
    q, k, v = draw(140, 90)
    for heads in ((1000 * q, k, v), (-300 * k.abs(), k.abs(), v), (0 * q, k, v)):
        # Scores of 10,000 are rounded themselves.
        assert error(attention.attend_by_kernel(*heads), *heads) < max(ROUNDING, 1e-4)


@needs_kernel
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(("exponent", "size"), [(127, 1.0), (100, 2.0**20), (50, 2.0**80)])
def test_sums_of_values_do_not_overflow(exponent: int, size: float) -> None:
    """The largest weights are 2^exponent, a finite number, until they multiply the values."""
    q, k, v = draw(140, 90)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0] = 8 * exponent * math.log(2) / 2**0.5
    k[:, :, 5:80, 0] = 2**0.5
    assert error(attention.attend_by_kernel(q, k, size * v), q, k, size * v) < ROUNDING


@needs_kernel
def test_is_one_operation_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number of queries and keys, whose heads are joined without a copy."""
    always = torch.compiler.assume_constant_result(lambda device: True)
    monkeypatch.setattr(attention, "_runs_kernel", always)
    monkeypatch.setattr(attention, "MIN_KERNEL_KEYS", 80)
    monkeypatch.setattr(attention, "KERNEL_DTYPE", DTYPE)
    torch._dynamo.reset()
    compiled = torch.compile(attention.attend, fullgraph=True, backend="aot_eager")
    for num_queries, num_keys in ((70, 90), (80, 100), (81, 102)):
        heads = draw(num_queries, num_keys)
        with torch.no_grad():
            attended = compiled(*heads)
        assert attended.is_contiguous()
        assert error(attended.unflatten(2, (3, 64)).transpose(1, 2), *heads) < ROUNDING


@needs_triton
def test_without_a_working_triton_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def fail() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    broken = type("Driver", (), {"get_current_target": staticmethod(fail)})
    monkeypatch.setattr(triton.runtime.driver, "_active", broken)
    with pytest.warns(UserWarning, match=r"^attention: Triton does not work .*\(Failed to find C"):
        assert not attention._runs_kernel(torch.device("cuda", 7))


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_a_hopper_gpu_uses_it_for_long_sequences_without_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = []
    monkeypatch.setattr(attention, "attend_by_kernel", lambda q, k, v: used.append(len(q)) or q)
    q, k, v = draw(300, attention.MIN_KERNEL_KEYS)
    attention.softmax_attention(q, k, v)
    assert not used
    with torch.no_grad():
        attention.softmax_attention(q, k, v)
        attention.softmax_attention(q, k[:, :, 1:], v[:, :, 1:])
        attention.softmax_attention(q.float(), k.float(), v.float())
        attention.softmax_attention(q[..., :32], k[..., :32], v[..., :32])
    assert used == [2]
