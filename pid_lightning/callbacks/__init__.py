"""Lightning callbacks around the modules."""

from pid_lightning.callbacks.dmd2 import DMD2
from pid_lightning.callbacks.ema import EMA
from pid_lightning.callbacks.graceful_stop import GracefulStop
from pid_lightning.callbacks.images import PictureGrids

__all__ = ["DMD2", "EMA", "GracefulStop", "PictureGrids"]
