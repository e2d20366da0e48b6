"""PiD behind DINOv2's features, as RAE uses them (arXiv 2510.11690)."""

from __future__ import annotations

from pid_lightning.encoders.dinov2 import DINOv2Encoder
from pid_lightning.encoders.text import TextEncoder
from pid_lightning.nn import PiDConfig
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.settings import Evaluation, Training


class DINOv2PiD(PiDModule):
    """PiD on the patch features of a DINOv2 vision transformer.

    Args:
        model: timm name of a DINOv2.
        pretrained: False uses random weights and warns.
        checkpoint: local file of the model's weights; null loads them from the hub.
        statistics: local file of the latents' mean and variance; null applies none.
        scale: output side divided by the side of the encoder's input.
        denoiser: sizes of the network.
        text: caption features; null conditions on a learned null.
        training: training settings.
        evaluation: sampling and test settings.
        init_from: a checkpoint, model file, bundled name or hub id to start from.
    """

    def __init__(
        self,
        model: str = "vit_base_patch14_reg4_dinov2.lvd142m",
        pretrained: bool = True,
        checkpoint: str | None = None,
        statistics: str | None = None,
        scale: int = 4,
        denoiser: PiDConfig = PiDConfig(),
        text: TextEncoder | None = None,
        training: Training = Training(),
        evaluation: Evaluation = Evaluation(),
        init_from: str | None = None,
    ) -> None:
        arguments = {
            "model": model,
            "pretrained": pretrained,
            "checkpoint": checkpoint,
            "statistics": statistics,
        }
        encoder = DINOv2Encoder(**arguments)
        super().__init__(encoder, arguments, scale, denoiser, text, training, evaluation, init_from)
