"""A run's folder is its own: claimed when it begins, and held while it is trained."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from pid_lightning.checks import Mistake
from pid_lightning.files.atomic import locked

HELD = ".held"  # a file that the process which trains a run keeps locked


def claim_version(trainer: Trainer) -> None:
    """Make the folder ``version_N`` of a new run, so that of several runs which begin at once each
    has its own. Lightning takes the first number that is free when it looks."""
    logger = trainer.logger
    is_numbered = isinstance(logger, (TensorBoardLogger, CSVLogger)) and logger._version is None
    if not is_numbered or not trainer.is_global_zero or trainer.fast_dev_run:
        return
    folder = Path(logger.root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    names = (re.fullmatch(r"version_(\d+)", path.name) for path in folder.iterdir())
    number = max((int(name[1]) + 1 for name in names if name), default=0)
    while True:
        try:
            (folder / f"version_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            logger._version = number
            return


def hold(trainer: Trainer, held: ExitStack) -> None:
    """Hold the folder of a run that is trained, until `held` is closed.

    Raises:
        Mistake: another process trains it.
    """
    folder = None if trainer.logger is None else trainer.log_dir
    if folder is None or not trainer.is_global_zero or trainer.fast_dev_run:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not held.enter_context(locked(Path(folder) / HELD)):
        raise Mistake(
            "ckpt_path",
            f"another process is training the run in {folder}; wait for its end, or start a new "
            "run with --model.init_from.",
        )
