"""DINOv2 family: patch tokens of a frozen timm transformer as latents, as in RAE."""

from __future__ import annotations

import torch
from torch import Tensor

from pid_lightning.encoders.pretrained import find_weights
from pid_lightning.encoders.vit import STRIDE, ViTEncoder, build_vit
from pid_lightning.files.tensors import read_tensors

STATISTICS_EPS = 1e-5


class DINOv2Encoder(ViTEncoder):
    """timm's DINOv2: last hidden state, final LayerNorm without affine, patch tokens only.

    Preprocessing follows RAE: plain bicubic resize by 14/16 (512 to 448, not antialiased, as in
    RAE's public code), ImageNet mean and std. Positions are resampled as in transformers: with
    antialiasing for networks with registers, without it for the others.

    Args:
        model: any timm DINOv2, e.g. ``vit_base_patch14_reg4_dinov2.lvd142m``.
        pretrained: whether `load` loads weights; False keeps random weights and warns.
        checkpoint: weights file of timm or of the original release (``.safetensors``, ``.bin``,
            ``.pth``), or a folder that contains one.
        statistics: file (``.safetensors`` or ``.pt``) with ``mean`` and ``var`` of the latents,
            (C,), (C, 1, 1) or per element (C, h, w): latents become (x - mean) / sqrt(var + 1e-5).

    Raises:
        FileNotFoundError: the checkpoint or statistics file does not exist.
        ValueError: the model is not a timm vision transformer, or the statistics do not fit it.
    """

    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)
    antialias_images = False

    def __init__(
        self,
        model: str = "vit_base_patch14_reg4_dinov2.lvd142m",
        pretrained: bool = True,
        checkpoint: str | None = None,
        statistics: str | None = None,
    ) -> None:
        network = build_vit(model, pretrained, {})
        super().__init__(model, network, pretrained, checkpoint, network.reg_token is not None)
        # Not buffers, so that the statistics stay float32 when the encoder is cast.
        self.statistics = None if statistics is None else self._read_statistics(statistics)
        self.latent_space = "dinov2" if statistics is None else "dinov2-normalised"

    def finish(self, latents: Tensor) -> Tensor:
        if self.statistics is None:
            return latents
        mean, var = (s.to(latents.device, latents.dtype) for s in self.statistics)
        grid = tuple(latents.shape[-2:])
        if tuple(mean.shape[-2:]) not in ((1, 1), grid):
            raise ValueError(
                f"statistics: a grid of {tuple(mean.shape[-2:])} cells does not fit the images' "
                f"{grid}; use images of {tuple(STRIDE * s for s in mean.shape[-2:])} pixels "
                "or per-channel statistics."
            )
        return (latents - mean) / torch.sqrt(var + STATISTICS_EPS)

    def _read_statistics(self, path: str) -> tuple[Tensor, Tensor]:
        tensors = read_tensors(find_weights(path))
        if not {"mean", "var"} <= set(tensors):
            raise ValueError(
                f"statistics: {path} holds {sorted(tensors)}; it needs the keys mean and var."
            )
        statistics = []
        for key in ("mean", "var"):
            table = tensors[key].float()
            if table.ndim == 4 and table.shape[0] == 1:
                table = table[0]
            if table.ndim == 1:
                table = table[:, None, None]
            if table.ndim != 3 or table.shape[0] != self.latent_channels:
                raise ValueError(
                    f"statistics: {key} in {path} has shape {tuple(tensors[key].shape)}; "
                    f"it must be ({self.latent_channels},) or ({self.latent_channels}, h, w)."
                )
            statistics.append(table)  # (C, h, w) or (C, 1, 1)
        return statistics[0], statistics[1]
