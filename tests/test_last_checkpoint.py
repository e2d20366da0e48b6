"""`LastCheckpoint`: a run that another callback stops resumes exactly."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny
import torch

from pid_lightning import EMA
from pid_lightning.callbacks import LastCheckpoint

# Two epochs of 5 batches, in steps of 2, 2 and 1; validated after the third, within a step.
RUN = {
    "max_epochs": 2,
    "limit_train_batches": 5,
    "accumulate_grad_batches": 2,
    "val_check_interval": 3,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
    "batch_size": 2,
}


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
    tiny.fit(folder, -1, EMA(), stop, LastCheckpoint(), resume=resume, **RUN)
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
        changes = RUN | {"max_epochs": 1, "val_check_interval": interval}
        tiny.fit(tmp_path, -1, EMA(), saver, LastCheckpoint(), **changes)
    assert (tmp_path / "validated.ckpt").exists()
    told = [str(w.message) for w in caught if "accumulated gradients" in str(w.message)]
    assert bool(told) == warns
