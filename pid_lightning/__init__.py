"""Pixel diffusion decoders with PyTorch Lightning: train, distil, decode.

Public names are imported when first used, so that decoding needs no Lightning.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdapterConfig": "nn",
    "CachedText": "encoders.text_cache",
    "DINOv2PiD": "training.modules",
    "DMD2": "training.callbacks",
    "DistillationGrids": "training.callbacks",
    "EMA": "training.callbacks",
    "ENCODERS": "encoders.families",
    "Encoder": "encoders.base",
    "Evaluation": "training.settings",
    "ImageData": "training.data.image_data",
    "KNOWN_SPACES": "encoders.latent_spaces",
    "LanguageModelText": "encoders.text",
    "LatentCrops": "training.data.latent_crops",
    "LatentSpace": "encoders.latent_spaces",
    "PiD": "nn",
    "PiDAutoencoder": "decoding.diffusers_vae",
    "PiDConfig": "nn",
    "PiDDecoder": "decoding.decoder",
    "PictureGrids": "training.callbacks",
    "Regression": "training.callbacks",
    "SigLIPPiD": "training.modules",
    "Training": "training.settings",
    "VAEPiD": "training.modules",
    "cache_captions": "encoders.text_cache",
    "read_picture": "pictures.files",
    "stop_early": "decoding.early_stop",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pid_lightning' has no attribute {name!r}")
    return getattr(import_module(f"pid_lightning.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
