"""`LastCheckpoint`: a run that another callback stops resumes exactly."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny
import torch

from pid_lightning import EMA
from pid_lightning.training.callbacks import LastCheckpoint

# Two epochs of 5 batches, in steps of 2, 2 and 1; validated after the third, within a step.
RUN = {
    "max_epochs": 2,
    "limit_train_batches": 5,
    "accumulate_grad_batches": 2,
    "val_check_interval": 3,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
}


def run(
    folder: Path, *callbacks: tiny.pl.Callback, resume: Path | None = None, **changes: int
) -> None:
    """A fit with callbacks in the command line's order, up to its last epoch."""
    settings = RUN | changes
    trainer = tiny.trainer(folder, settings.pop("max_steps", -1), EMA(), *callbacks, **settings)
    trainer.callbacks.append(LastCheckpoint())
    trainer.fit(tiny.module(), tiny.data(2), ckpt_path=resume)


class Stop(tiny.pl.Callback):
    """Stops a run as `trainer.max_time` or `EarlyStopping` do; records its batches."""

    def __init__(self, hook: str = "", batch: int = 0) -> None:
        self.hook, self.batch = hook, batch
        self.seen: list[list[int]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(batch["number"].tolist())
        self._stop(trainer, "batch")

    def on_validation_end(self, trainer, pl_module) -> None:
        self._stop(trainer, "validation")

    def _stop(self, trainer: tiny.pl.Trainer, hook: str) -> None:
        trainer.should_stop |= (hook, len(self.seen)) == (self.hook, self.batch)


def fit(folder: Path, stop: Stop, resume: Path | None = None) -> Path:
    run(folder, stop, resume=resume)
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], Path]:
    """An uninterrupted run's batches and its end."""
    stop = Stop()
    return stop.seen, fit(tmp_path_factory.mktemp("whole"), stop)


@pytest.mark.parametrize(
    ("hook", "batch", "stops_at"),
    [
        ("batch", 2, 2),
        ("batch", 3, 4),  # within a step
        ("batch", 5, 5),  # at an epoch's end
        ("batch", 9, 9),
        ("validation", 3, 4),  # within a step
    ],
)
def test_a_run_stopped_by_a_callback_resumes_exactly(
    hook: str, batch: int, stops_at: int, whole: tuple[list[list[int]], Path], tmp_path: Path
) -> None:
    first, second = Stop(hook, batch), Stop()
    last = fit(tmp_path, first)
    assert len(first.seen) == stops_at
    fit(tmp_path, second, resume=last)
    batches, end = whole
    assert first.seen + second.seen == batches
    once, twice = (torch.load(path, weights_only=True) for path in (end, last))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        tiny.assert_equal_states(once[part], twice[part], part)


@pytest.mark.parametrize(("interval", "warns"), [(3, True), (4, False)])
def test_a_checkpoint_within_a_step_is_told(interval: int, warns: bool, tmp_path: Path) -> None:
    saver = tiny.pl.callbacks.ModelCheckpoint(tmp_path, filename="validated", save_top_k=-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, saver, max_epochs=1, val_check_interval=interval)
    assert (tmp_path / "validated.ckpt").exists()
    told = [str(w.message) for w in caught if "accumulated gradients" in str(w.message)]
    assert bool(told) == warns


class Score(tiny.pl.Callback):
    """Logs a quality that rises to its best at the second validation."""

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log("score", {2: 1.0, 4: 2.0}.get(trainer.global_step, 0.0))


@pytest.mark.parametrize("stops", [True, False])
def test_the_last_step_is_saved_with_its_validation(stops: bool, tmp_path: Path) -> None:
    """A checkpoint's best file must be there when the run resumes."""
    changes = {"limit_train_batches": 6, "val_check_interval": 2, "accumulate_grad_batches": 1}

    def resumed_best(stop: Stop, steps: int, resume: Path | None = None) -> Path:
        best = tiny.pl.callbacks.ModelCheckpoint(
            tmp_path, filename="best-{step}", monitor="score", mode="max"
        )
        run(tmp_path, Score(), stop, best, resume=resume, max_steps=steps, **changes)
        return Path(best.best_model_path)

    first = resumed_best(Stop("batch", 4 if stops else 0), -1 if stops else 4)
    assert first.name == "best-step=4.ckpt"
    assert resumed_best(Stop(), 5, tmp_path / "last.ckpt") == first
    assert [path.name for path in tmp_path.glob("best*")] == [first.name]
