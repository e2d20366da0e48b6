"""What all sampling steps share: adapter features, text tokens and position tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.nn.config import PiDConfig
from pid_lightning.nn.layers import RMSNorm
from pid_lightning.nn.rope import Table


class Condition(NamedTuple):
    """Everything that the sampling steps of a batch share; created by `PiD.condition`.

    Attributes:
        text: text tokens (B, L, D), None without a text stream.
        features: adapter features (B, N, D), one per injection.
        shared_logits: `SigmaGate.shared_logit` of each feature.
        text_table: RoPE table of the text, for the patch blocks.
        patch_table: RoPE table of the patches, for the patch blocks.
        pixel_table: RoPE table of the patches, for the pixel blocks.
        columns, rows: sine-cosine position tables of the pixels, (W, C/2) and (H, C/2).
        rgb: the adapter's low-resolution image (B, 3, H/scale, W/scale), if requested.
        base: the enlarged native decode (B, 3, H, W), if the network adds to it.
    """

    text: Tensor | None
    features: tuple[Tensor, ...]
    shared_logits: tuple[Tensor, ...]
    text_table: Table
    patch_table: Table
    pixel_table: Table
    columns: Tensor
    rows: Tensor
    rgb: Tensor | None = None
    base: Tensor | None = None

    def output_size(self) -> tuple[int, int]:
        """(height, width) of the picture in pixels."""
        return self.rows.shape[0], self.columns.shape[0]

    def pixel_positions(self, patch_size: int) -> Tensor:
        """Positions of every pixel of every patch, (h, w, P, P, C)."""
        columns = rearrange(self.columns, "(w q) c -> w 1 q c", q=patch_size)
        rows = rearrange(self.rows, "(h p) c -> h 1 p 1 c", p=patch_size)
        return torch.cat(torch.broadcast_tensors(columns, rows), dim=-1)


class Adapted(NamedTuple):
    """What the adapter's convolutions make of latents, of which parts can be cut.

    Attributes:
        tokens: one per patch (B, H/P, W/P, adapter width).
        base: the enlarged native decode (B, 3, H, W), if the network adds to it.
        rgb: the predicted low-resolution image (B, 3, H/scale, W/scale), if requested.
        latents: the estimated clean latents (B, C, h, w), if there is a native decoder.
    """

    tokens: Tensor
    base: Tensor | None = None
    rgb: Tensor | None = None
    latents: Tensor | None = None

    def parts(self, places: Sequence[tuple[slice, slice]], patch_size: int) -> Adapted:
        """Tokens and base of one part of each sample, with the latents of the whole; what surrounds
        the parts has been seen.

        Args:
            places: rows and columns of each sample's part in output pixels, whole patches, of one
                size.
            patch_size: side of a patch in pixels.
        """
        patches = [
            [slice(span.start // patch_size, span.stop // patch_size) for span in place]
            for place in places
        ]
        pairs = zip(self.tokens, patches, strict=True)
        tokens = torch.stack([one[rows, columns] for one, (rows, columns) in pairs])
        base = self.base
        if base is not None:
            pairs = zip(base, places, strict=True)
            base = torch.stack([one[:, rows, columns] for one, (rows, columns) in pairs])
        return Adapted(tokens, base, latents=self.latents)


class TextEmbedding(nn.Module):
    """Maps caption features to text tokens: Linear, RMSNorm, plus learned positions."""

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        self.length: int = config.text_length
        self.linear: nn.Linear = nn.Linear(config.text_width, config.width)
        self.norm: RMSNorm = RMSNorm(config.width)
        self.position: nn.Parameter = nn.Parameter(torch.zeros(1, self.length, config.width))
        null = torch.zeros(1, self.length, config.text_width) if config.learned_null else None
        self.null: nn.Parameter | None = None if null is None else nn.Parameter(null)

    def forward(self, features: Tensor | None, keep: Tensor | None, batch_size: int) -> Tensor:
        """Features (B, L, D_text) to tokens (B, L, D); the null where `keep` (B,) is false.

        Raises:
            Mistake: no features and no null, or a null for captions shorter than it.
        """
        if features is None:
            features = self._null().expand(batch_size, -1, -1)
        elif keep is not None:
            if features.shape[1] < self.length:  # sampling takes the whole null
                raise Mistake(
                    "text",
                    f"captions of {features.shape[1]} tokens, but the learned null has "
                    f"text_length {self.length}; set model.denoiser.text_length to theirs.",
                )
            features = torch.where(keep[:, None, None], features[:, : self.length], self._null())
        features = features[:, : self.length].to(self.linear.weight.dtype)
        tokens = self.norm(self.linear(features))
        return tokens + self.position[:, : tokens.shape[1]].to(tokens.dtype)

    def _null(self) -> Tensor:
        if self.null is None:
            raise Mistake(
                "text",
                "this network has no learned null; give text features, e.g. those of an empty or "
                "negative prompt.",
            )
        return self.null
