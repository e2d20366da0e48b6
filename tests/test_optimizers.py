"""Muon beside AdamW as one optimiser: who steps what, one schedule, exact resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from pid_lightning import Training
from pid_lightning.modules.optimizers import Together, make_optimizer

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
MUON = {"optimizer": "muon", "learning_rate": 1e-3, "warmup_steps": 2}


@needs_muon
def test_matrices_are_muons_and_every_parameter_has_one_optimizer() -> None:
    denoiser = tiny.module().denoiser
    together = make_optimizer(denoiser, "muon", 1e-3, 0.0, fused=False)
    muon, adamw = ([p for g in part.param_groups for p in g["params"]] for part in together.parts)
    assert all(p.ndim == 2 for p in muon)
    assert {id(p) for p in muon}.isdisjoint(id(p) for p in adamw)
    assert {id(p) for p in (*muon, *adamw)} == {id(p) for p in denoiser.parameters()}
    narrow = (denoiser.out.weight, denoiser.pixel_embedding.weight)
    assert {id(p) for p in narrow} <= {id(p) for p in adamw}


@needs_muon
def test_together_steps_as_its_parts_alone() -> None:
    def start() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 6), (6,))]

    def parts(matrix: torch.nn.Parameter, bias: torch.nn.Parameter) -> list:
        return [
            torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0),
            torch.optim.AdamW([bias], lr=0.1, weight_decay=0.0),
        ]

    one, other = start(), start()
    together, alone = Together(*parts(*one)), parts(*other)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (together, *alone)]
    for _ in range(5):
        for matrix, bias in (one, other):
            matrix.grad, bias.grad = matrix.detach().sin(), bias.detach().cos()
        for optimizer in (together, *alone):
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@needs_muon
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


def test_muon_is_refused_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"muon needs torch 2\.9 or later, here is .*; take adamw"):
        Training(optimizer="muon")


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="'lion' is not one of adamw, muon"):
        Training(optimizer="lion")
