"""PiD behind SigLIP's features, as Scale-RAE uses them (arXiv 2601.16208)."""

from __future__ import annotations

from pid_lightning.encoders.siglip import SigLIPEncoder
from pid_lightning.modules.base import PiDModule
from pid_lightning.modules.settings import Evaluation, Training
from pid_lightning.nn import PiDConfig
from pid_lightning.text import TextEncoder


class SigLIPPiD(PiDModule):
    """PiD on the patch features of a SigLIP image tower.

    Args:
        model: open_clip's name of a SigLIP, or timm's name of an image tower.
        pretrained: False runs with random weights, on purpose, and warns.
        checkpoint: local file of the model's weights; null asks the hub.
        scale: side of the output over the side of the picture that the encoder sees.
        denoiser: sizes of the network.
        text: caption features; null conditions on a learned null.
        training: how it learns.
        evaluation: how it is sampled and judged.
        init_from: a run's checkpoint or a model file to start from.
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
        super().__init__(
            SigLIPEncoder(**arguments),
            arguments,
            scale,
            denoiser,
            text,
            training,
            evaluation,
            init_from,
        )
