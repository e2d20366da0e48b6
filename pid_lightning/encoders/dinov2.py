"""DINOv2 family: patch tokens of a frozen timm transformer as latents, as in RAE."""

from __future__ import annotations

import torch
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.encoders.pretrained import find_weights
from pid_lightning.encoders.vit import STRIDE, ViTEncoder, build_vit
from pid_lightning.files.tensors import check_weights, read_tensors

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
        Mistake: the model is not a timm vision transformer, or the statistics do not fit it.
    """

    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    antialias_images = False

    def __init__(
        self,
        model: str = "vit_base_patch14_reg4_dinov2.lvd142m",
        pretrained: bool = True,
        checkpoint: str | None = None,
        statistics: str | None = None,
    ) -> None:
        network = build_vit(model, pretrained)
        super().__init__(model, network, checkpoint)
        self.antialias_positions: bool = network.reg_token is not None
        # Not buffers, so that the statistics stay float32 when the encoder is cast.
        self.statistics: list[Tensor] | None = (
            None if statistics is None else self._read_statistics(statistics)
        )
        self.latent_space = "dinov2" if statistics is None else "dinov2-normalised"

    def finish(self, latents: Tensor) -> Tensor:
        if self.statistics is None:
            return latents
        mean, var = (s.to(latents.device, latents.dtype) for s in self.statistics)
        grid = tuple(mean.shape[-2:])
        if grid not in ((1, 1), tuple(latents.shape[-2:])):
            raise Mistake(
                "statistics",
                f"a grid of {grid} cells does not fit the images' {tuple(latents.shape[-2:])}; use "
                f"images of {tuple(STRIDE * s for s in grid)} pixels or per-channel statistics.",
            )
        return (latents - mean) / torch.sqrt(var + STATISTICS_EPS)

    def _read_statistics(self, path: str) -> list[Tensor]:
        """Mean and variance, (C, h, w) or (C, 1, 1)."""
        tensors = read_tensors(find_weights("statistics", path))
        tables = [tensors[key].float() for key in ("mean", "var") if key in tensors]
        tables = [table[0] if table.ndim == 4 and len(table) == 1 else table for table in tables]
        tables = [table[:, None, None] if table.ndim == 1 else table for table in tables]
        fits = [table.ndim == 3 and len(table) == self.latent_channels for table in tables]
        if fits != [True, True]:
            found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            raise Mistake(
                "statistics",
                f"{path} holds {found}; it needs mean and var, each ({self.latent_channels},) or "
                f"({self.latent_channels}, h, w).",
            )
        check_weights({"mean": tables[0], "sqrt(var)": tables[1].sqrt()}, "give another file")
        return tables
