"""PiD behind SigLIP's features, as Scale-RAE uses them (arXiv 2601.16208)."""

from __future__ import annotations

from pid_lightning.encoders.siglip import SigLIPEncoder
from pid_lightning.encoders.text import TextEncoder
from pid_lightning.nn import PiDConfig
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.settings import Evaluation, Training


class SigLIPPiD(PiDModule):
    """PiD on the patch features of a SigLIP image tower.

    Args:
        model: open_clip name of a SigLIP, or timm name of an image tower.
        pretrained: False uses random weights and warns.
        checkpoint: local file of the model's weights; null loads them from the hub.
        scale: output side divided by the side of the encoder's input.
        denoiser: sizes of the network.
        text: caption features; null conditions on a learned null.
        training: training settings.
        evaluation: sampling and test settings.
        init_from: a checkpoint, model file, bundled name or hub id to start from.
    """

    def __init__(
        self,
        model: str = "ViT-SO400M-14-SigLIP2",
        pretrained: bool = True,
        checkpoint: str | None = None,
        scale: int = 8,
        denoiser: PiDConfig = PiDConfig(),
        text: TextEncoder | None = None,
        training: Training = Training(),
        evaluation: Evaluation = Evaluation(),
        init_from: str | None = None,
    ) -> None:
        arguments = {"model": model, "pretrained": pretrained, "checkpoint": checkpoint}
        encoder = SigLIPEncoder(**arguments)
        super().__init__(encoder, arguments, scale, denoiser, text, training, evaluation, init_from)
