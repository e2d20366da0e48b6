"""Which encoder a model's file means."""

from __future__ import annotations

from pid_lightning.encoders.base import Encoder
from pid_lightning.weights import ModelInfo


def build_encoder(info: ModelInfo) -> Encoder:
    """The encoder whose latents a model decodes, its weights not yet loaded.

    Raises:
        ValueError: a family that is not one of this package.
    """
    if info.family == "VAEPiD":
        from pid_lightning.encoders.vae import build_vae_encoder as build
    elif info.family == "DINOv2PiD":
        from pid_lightning.encoders.dinov2 import DINOv2Encoder as build
    elif info.family == "SigLIPPiD":
        from pid_lightning.encoders.siglip import SigLIPEncoder as build
    else:
        raise ValueError(
            f"this model's family {info.family} is not one of pid_lightning: give its encoder to "
            "PiDDecoder, or decode latents."
        )
    return build(**info.encoder)
