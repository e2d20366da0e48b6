"""PiD behind an autoencoder: SD3, FLUX.1, SDXL, FLUX.2, Qwen-Image."""

from __future__ import annotations

from pid_lightning.encoders.text import TextEncoder
from pid_lightning.encoders.vae import build_vae_encoder
from pid_lightning.nn import PiDConfig
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.settings import Evaluation, Training


class VAEPiD(PiDModule):
    """PiD on the latents of an autoencoder.

    Args:
        vae: ``"taef2"`` (bundled, FLUX.2's latents), ``"sd3"``, ``"flux"``, ``"sdxl"``,
            ``"flux2"``, ``"qwen"``, ``"taesd3"``, ``"taef1"``, ``"taesdxl"``, a hub id, or a local
            folder; see `VAEEncoder`.
        pretrained: False uses random weights and warns.
        scale: output side divided by the side of the encoder's input.
        denoiser: sizes of the network.
        text: caption features; null conditions on a learned null.
        training: training settings.
        evaluation: sampling and test settings.
        init_from: a checkpoint, model file, bundled name or hub id to start from.
    """

    def __init__(
        self,
        vae: str = "taef2",
        pretrained: bool = True,
        scale: int = 4,
        denoiser: PiDConfig = PiDConfig(),
        text: TextEncoder | None = None,
        training: Training = Training(),
        evaluation: Evaluation = Evaluation(),
        init_from: str | None = None,
    ) -> None:
        encoder = build_vae_encoder(vae, pretrained)
        arguments = {"vae": vae, "pretrained": pretrained}
        super().__init__(encoder, arguments, scale, denoiser, text, training, evaluation, init_from)
