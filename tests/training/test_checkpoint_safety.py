"""Checkpoints of strangers and of runs that go wrong cost a user nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pid_lightning import EMA
from pid_lightning.checks import Diverged, Mistake
from pid_lightning.training.finite import FiniteGradients


def fit(folder: Path, steps: int, *callbacks: tiny.pl.Callback, resume: Path | None = None) -> None:
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    trainer = tiny.quiet_trainer(
        folder,
        max_steps=steps,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[*callbacks, saver],
        log_every_n_steps=1,
    )
    trainer.fit(tiny.module(), tiny.data(1), ckpt_path=resume)


def test_a_checkpoint_removes_only_checkpoints_of_its_own_run(tmp_path: Path) -> None:
    """Lightning removes the paths in the state of `ModelCheckpoint`, which a stranger may have
    written: folders, files of others, links out of the run, what only looks like a checkpoint."""
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    (other / "theirs.ckpt").write_text("precious")
    fit(run, 1)
    (run / "folder.ckpt").mkdir()
    (run / "notes.txt").write_text("precious")
    (run / "link.ckpt").symlink_to(other / "theirs.ckpt")
    kept = [other, other / "theirs.ckpt"]
    kept += [run / name for name in ("folder.ckpt", "notes.txt", "link.ckpt")]
    (named,) = set(run.glob("epoch*.ckpt"))
    for path in [*kept, other / ".." / "other" / "theirs.ckpt", named]:
        checkpoint = torch.load(run / "last.ckpt", weights_only=True)
        (state,) = checkpoint["callbacks"].values()
        for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
            state[name] = str(path)
        state["best_k_models"] = {str(path): torch.tensor(0.0)}
        torch.save(checkpoint, run / "hostile.ckpt")
        fit(run, 2, resume=run / "hostile.ckpt")
        assert all(one.exists() for one in kept)
    assert not named.exists()  # Lightning's own course


def test_a_checkpoint_of_weights_only_is_not_resumed(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for part in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
        del checkpoint[part]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    with pytest.raises(Mistake) as caught:
        fit(tmp_path / "next", 2, resume=tmp_path / "weights.ckpt")
    assert caught.value.option == "ckpt_path"


class Spoil(tiny.pl.Callback):
    """Makes the gradient of one step infinite."""

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == 2:
            pl_module.denoiser.out.weight.grad.fill_(torch.inf)


def test_a_gradient_that_is_not_finite_ends_the_run_before_anything_is_saved(
    tmp_path: Path,
) -> None:
    fit(tmp_path / "whole", 2, EMA())
    with pytest.raises(Diverged, match="step 2 "):
        fit(tmp_path / "spoilt", 5, EMA(), Spoil())
    whole, spoilt = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "spoilt")
    )
    assert whole.keys() == spoilt.keys()
    assert all(value.equal(spoilt[name]) for name, value in whole.items())
    assert len(list((tmp_path / "spoilt").iterdir())) == 2  # last.ckpt and that of step 2


def test_scaled_gradients_may_overflow_for_a_while() -> None:
    norms = FiniteGradients()
    for step, norm in enumerate([1.0, torch.inf, torch.nan, 1.0, torch.inf, torch.inf]):
        norms.see(torch.tensor(norm), step, patience=2)
        norms.check()
    norms.see(torch.tensor(torch.nan), 6, patience=2)
    norms.see(torch.tensor(1.0), 7, patience=2)
    with pytest.raises(Diverged, match="step 6 "):
        norms.check()
