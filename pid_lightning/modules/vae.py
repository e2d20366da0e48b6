"""PiD behind an autoencoder: SD3, FLUX.1, SDXL, FLUX.2, Qwen-Image, or the small one that ships."""

from __future__ import annotations

from pid_lightning.encoders.vae import build_vae_encoder
from pid_lightning.modules.base import PiDModule
from pid_lightning.modules.settings import Evaluation, Training
from pid_lightning.nn import PiDConfig
from pid_lightning.text import TextEncoder


class VAEPiD(PiDModule):
    """PiD on the latents of a KL autoencoder.

    Args:
        vae: ``"bundled"``, ``"sd3"``, ``"flux"``, ``"sdxl"``, ``"flux2"``, ``"qwen"``, a hub id,
            or a local folder.
        pretrained: False runs with random weights, on purpose, and warns.
        scale: side of the output over the side of the picture that the encoder sees.
        denoiser: sizes of the network.
        text: caption features; null conditions on a learned null.
        training: how it learns.
        evaluation: how it is sampled and judged.
        init_from: a run's checkpoint or a model file to start from.
    """

    def __init__(
        self,
        vae: str = "bundled",
        pretrained: bool = True,
        scale: int = 4,
        denoiser: PiDConfig = PiDConfig(),
        text: TextEncoder | None = None,
        training: Training = Training(),
        evaluation: Evaluation = Evaluation(),
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            build_vae_encoder(vae, pretrained),
            {"vae": vae, "pretrained": pretrained},
            scale,
            denoiser,
            text,
            training,
            evaluation,
            init_from,
        )
