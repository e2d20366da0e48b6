"""Muon and AdamW as one optimiser: parameter split, schedule and exact resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from pid_lightning import Training
from pid_lightning.training.optimizers import MuonAndAdamW, make_optimizer, orthogonalised

MUON = {"optimizer": "muon", "learning_rate": 1e-3, "warmup_steps": 2}


def test_matrices_and_kernels_are_muons_and_every_parameter_has_one_optimizer() -> None:
    denoiser = tiny.module().denoiser
    settings = Training(**MUON, weight_decay=0.0)
    optimizer = make_optimizer(denoiser, settings, fused=False)
    muon, adamw = (group["params"] for group in optimizer.param_groups)
    assert any(p.ndim == 4 for p in muon)
    assert {id(p) for p in muon}.isdisjoint(id(p) for p in adamw)
    assert {id(p) for p in (*muon, *adamw)} == {id(p) for p in denoiser.parameters()}
    narrow = (denoiser.out.weight, denoiser.pixel_embedding.weight, denoiser.out_norm.weight)
    assert {id(p) for p in narrow} <= {id(p) for p in adamw}


def start(seed: int = 0) -> tuple[torch.nn.Parameter, ...]:
    """A wide and a tall matrix, a kernel and a bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 6), (7, 3), (5, 2, 3, 3), (6,))
    return tuple(torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (24, 24)])
def test_orthogonalised_keeps_singular_vectors_and_levels_singular_values(shape: tuple) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = u.T @ orthogonalised(matrix).double() @ v.T
    assert ((made.diagonal() > 0.4) & (made.diagonal() < 1.6)).all()
    assert (made - made.diagonal().diag()).abs().max() < 0.05  # bfloat16


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_both_step_as_torchs_own_and_a_kernel_as_a_matrix() -> None:
    one, (wide, tall, kernel, bias) = start(), start()
    kernel = torch.nn.Parameter(kernel.detach().flatten(1))
    other = (wide, tall, kernel, bias)
    optimizer = MuonAndAdamW(one[:3], one[3:], 0.1, 0.01, fused=False)
    alone = (
        torch.optim.Muon(
            [wide, tall, kernel], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([bias], lr=0.1, weight_decay=0.01),
    )
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, *alone)]
    for _ in range(5):
        for parameter in (*one, *other):
            parameter.grad = parameter.detach().sin()
        for stepping in (optimizer, *alone):
            stepping.step()
        for schedule in schedules:
            schedule.step()
    for a, b in zip(one, other, strict=True):
        # bfloat16 products in different orders: 5 steps of 0.1 differ by up to 1e-2.
        assert (a.flatten() - b.flatten()).abs().max() < 1e-2
    assert torch.equal(one[3], bias)


def test_three_and_three_steps_of_muon_are_six(tmp_path: Path) -> None:
    for steps, folder, resume in (
        (6, "once", None),
        (3, "twice", None),
        (6, "twice", tmp_path / "twice" / "last.ckpt"),
    ):
        tiny.fit(tmp_path / folder, steps, fitted=tiny.module(Training(**MUON)), resume=resume)
    once, twice = (
        torch.load(tmp_path / folder / "last.ckpt", weights_only=True)
        for folder in ("once", "twice")
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        tiny.assert_equal_states(once[part], twice[part], part)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="'lion' is not one of adamw, muon"):
        Training(optimizer="lion")
