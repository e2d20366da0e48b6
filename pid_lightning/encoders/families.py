"""Selection of the encoder that a model was trained with."""

from __future__ import annotations

from pid_lightning.encoders.base import Encoder
from pid_lightning.files.models import ModelInfo


def build_encoder(info: ModelInfo) -> Encoder:
    """The encoder whose latents a model decodes, without its weights loaded.

    Raises:
        ValueError: the family is not one of this package.
    """
    if info.family == "VAEPiD":
        from pid_lightning.encoders.vae import build_vae_encoder as build
    elif info.family == "DINOv2PiD":
        from pid_lightning.encoders.dinov2 import DINOv2Encoder as build
    elif info.family == "SigLIPPiD":
        from pid_lightning.encoders.siglip import SigLIPEncoder as build
    else:
        raise ValueError(
            f"family: {info.family} is not one of VAEPiD, DINOv2PiD and SigLIPPiD; pass its "
            "encoder to PiDDecoder or decode latents."
        )
    return build(**info.encoder)
