"""Lightning callbacks around the modules."""

from pid_lightning.training.callbacks.dmd2 import DMD2
from pid_lightning.training.callbacks.ema import EMA
from pid_lightning.training.callbacks.images import DistillationGrids, PictureGrids
from pid_lightning.training.callbacks.last_checkpoint import LastCheckpoint
from pid_lightning.training.callbacks.regression import Regression

__all__ = ["DMD2", "EMA", "DistillationGrids", "LastCheckpoint", "PictureGrids", "Regression"]
