"""The encoders by latent family: what a model file's family name stands for."""

from __future__ import annotations

from collections.abc import Callable

from pid_lightning.checks import Mistake, check_arguments
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.dinov2 import DINOv2Encoder
from pid_lightning.encoders.siglip import SigLIPEncoder
from pid_lightning.encoders.vae import build_vae_encoder
from pid_lightning.files.models import ModelInfo

# How to build the encoder of a family, named after the LightningModule that trains it. For a
# family of your own, write `ENCODERS["MyPiD"] = MyEncoder` beside its encoder: nothing is ever
# imported because a model file names it.
ENCODERS: dict[str, Callable[..., Encoder]] = {
    "DINOv2PiD": DINOv2Encoder,
    "SigLIPPiD": SigLIPEncoder,
    "VAEPiD": build_vae_encoder,
}


def build_encoder(info: ModelInfo) -> Encoder:
    """The encoder whose latents a model decodes, without its weights loaded.

    Raises:
        Mistake: no encoder is known for the family, or not with these arguments.
    """
    if info.family not in ENCODERS:
        raise Mistake(
            "family",
            f"{info.family} is not one of {', '.join(ENCODERS)}; import the file that adds its "
            "encoder to pid_lightning.ENCODERS, pass the encoder to PiDDecoder, or decode latents.",
        )
    check_arguments(ENCODERS[info.family], info.encoder)
    return ENCODERS[info.family](**info.encoder)
