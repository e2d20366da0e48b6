"""Pixel diffusion decoders with PyTorch Lightning: train, distil, decode."""

from pid_lightning.callbacks import EMA, PictureGrids
from pid_lightning.data import ImageData
from pid_lightning.modules import DINOv2PiD, Evaluation, SigLIPPiD, Training, VAEPiD
from pid_lightning.nn import AdapterConfig, PiD, PiDConfig
from pid_lightning.text import CachedText, LanguageModelText, NoText
from pid_lightning.version import __version__

__all__ = [
    "EMA",
    "AdapterConfig",
    "CachedText",
    "DINOv2PiD",
    "Evaluation",
    "ImageData",
    "LanguageModelText",
    "NoText",
    "PiD",
    "PiDConfig",
    "PictureGrids",
    "SigLIPPiD",
    "Training",
    "VAEPiD",
    "__version__",
]
