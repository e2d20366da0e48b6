"""Pixel diffusion decoders with PyTorch Lightning: train, distil, decode.

Public names are imported when first used, so that decoding needs no Lightning.
"""

from importlib import import_module
from typing import Any

from pid_lightning.version import __version__

_HOMES = {
    "AdapterConfig": "nn",
    "CachedText": "text",
    "DINOv2PiD": "modules",
    "DMD2": "callbacks",
    "DistillationGrids": "callbacks",
    "EMA": "callbacks",
    "Evaluation": "modules",
    "ImageData": "data",
    "LanguageModelText": "text",
    "PiD": "nn",
    "PiDAutoencoder": "diffusers_vae",
    "PiDConfig": "nn",
    "PiDDecoder": "decoder",
    "PictureGrids": "callbacks",
    "SigLIPPiD": "modules",
    "Training": "modules",
    "VAEPiD": "modules",
    "stop_early": "early_stop",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pid_lightning' has no attribute {name!r}")
    return getattr(import_module(f"pid_lightning.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
