"""Runs that begin at once have folders of their own, and one process trains a run at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from pid_lightning.checks import Mistake
from pid_lightning.commands.run_folder import claim_version, hold
from pid_lightning.files.hub import find_last_checkpoint


def trainer(folder: Path) -> SimpleNamespace:
    logger = TensorBoardLogger(folder, "name")
    return SimpleNamespace(logger=logger, is_global_zero=True, fast_dev_run=False)


def test_runs_that_begin_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "name" / "version_7").mkdir(parents=True)
    trainers = [trainer(tmp_path) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(claim_version, trainers))
    assert {one.logger.version for one in trainers} == set(range(8, 28))
    assert all(Path(one.logger.log_dir).is_dir() for one in trainers)


def test_one_process_trains_a_run_at_a_time(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    claim_version(one)
    one.log_dir = one.logger.log_dir
    with ExitStack() as first, ExitStack() as second:
        hold(one, first)
        with pytest.raises(Mistake) as caught:
            hold(one, second)
        assert caught.value.option == "ckpt_path"
    with ExitStack() as third:
        hold(one, third)


def test_the_newest_checkpoint_is_found_where_a_metric_made_a_folder(tmp_path: Path) -> None:
    checkpoints = tmp_path / "version_0" / "checkpoints"
    inner = checkpoints / "step=2-val" / "loss=0.5.ckpt"
    inner.parent.mkdir(parents=True)
    inner.touch()
    for folder in (tmp_path, tmp_path / "version_0", checkpoints):
        assert find_last_checkpoint(folder) in (inner, None)
    assert find_last_checkpoint(tmp_path) == inner
    assert find_last_checkpoint(tmp_path / "version_0") == inner
