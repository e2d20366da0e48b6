"""The attention kernel: on a GPU in bf16, without one as interpreted by Triton in fp32."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pid_lightning.nn import attention

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETS else ("cuda", torch.bfloat16)
ROUNDING = 1e-6 if INTERPRETS else 2**-8

needs_kernel = pytest.mark.skipif(not (INTERPRETS or ON_HOPPER), reason="needs a Hopper GPU")


def has_triton() -> bool:
    """Whether this torch brings a Triton whose interpreter goes with the installed numpy."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def draw(num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q, k, v of 2 samples with 3 heads."""
    generator = torch.Generator().manual_seed(0)
    lengths = (num_queries, num_keys, num_keys)
    q, k, v = (torch.randn(2, 3, n, 64, generator=generator) for n in lengths)
    return tuple(x.to(DEVICE, DTYPE) for x in (q, k, v))


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


def error(attended: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    wanted = exact(q, k, v)
    return ((attended - wanted).norm() / wanted.norm()).item()


@pytest.mark.skipif(INTERPRETS or ON_HOPPER or not has_triton(), reason="needs Triton, no GPU")
def test_on_a_cpu_triton_interprets_the_kernel() -> None:
    """In a process of its own: Triton decides when it is imported."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout
    assert "6 passed" in run.stdout


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
def test_is_one_operation_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradient; the views that heads are cut from need no copies."""
    always = torch.compiler.assume_constant_result(lambda *heads: True)
    monkeypatch.setattr(attention, "_has_kernel", always)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(70, 90))
    torch._dynamo.reset()
    compiled = torch.compile(attention.attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        attended = compiled(q, k, v)
        assert torch.equal(attended, attention.attend(q, k, v))
        assert attended.is_contiguous()
    assert error(attended.unflatten(2, (3, 64)).transpose(1, 2), q, k, v) < ROUNDING


@pytest.mark.skipif(INTERPRETS or ON_HOPPER or not has_triton(), reason="needs Triton, no GPU")
def test_without_a_working_triton_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match=r"^attention: Triton does not work here \(.*C compiler"):
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
