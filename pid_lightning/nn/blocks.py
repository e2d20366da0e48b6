"""The two kinds of transformer block: joint patch and text blocks, and pixel blocks."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.nn.attention import attend
from pid_lightning.nn.layers import QKV, RMSNorm, SwiGLU
from pid_lightning.nn.rope import Table
from pid_lightning.nn.windows import Windows, attend_in_windows


class Stream(nn.Module):
    """One modality's weights in a joint block: modulation, norms, QKV, output projection, MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.modulation: nn.Linear = nn.Linear(width, 6 * width)
        self.attention_norm: RMSNorm = RMSNorm(width)
        self.qkv: QKV = QKV(width, num_heads)
        self.attention_out: nn.Linear = nn.Linear(width, width)
        self.mlp_norm: RMSNorm = RMSNorm(width)
        self.mlp: SwiGLU = SwiGLU(width, int(2 * 4 * width / 3))

    def project(
        self, tokens: Tensor, modulation: tuple[Tensor, ...], table: Table
    ) -> tuple[Tensor, ...]:
        """q, k, v of the modulated tokens, each (B, heads, N, d)."""
        shift, scale = modulation[:2]
        return self.qkv(self.attention_norm.modulated(tokens, shift, scale), table)

    def update(self, tokens: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Add both gated residuals: the attention output, then the MLP's."""
        _, _, attention_gate, shift, scale, mlp_gate = modulation
        tokens = torch.addcmul(tokens, attention_gate, self.attention_out(attended))
        hidden = self.mlp(self.mlp_norm.modulated(tokens, shift, scale))
        return torch.addcmul(tokens, mlp_gate, hidden)

    def modulate(self, time: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate for attention, then for the MLP, each (B, 1, D)."""
        return self.modulation(time).chunk(6, dim=-1)


class PatchBlock(nn.Module):
    """Joint attention over image patches and text tokens (MM-DiT, arXiv 2403.03206), with one
    stream of weights each; without text, plain self-attention over the patches.

    Args:
        width: token width D.
        num_heads: attention heads.
        with_text: whether there is a text stream.
        last: whether this is the last block, whose text output is not used. The published files
            hold its weights, so these exist, frozen but for the queries' rows of `qkv`.
    """

    def __init__(self, width: int, num_heads: int, with_text: bool, last: bool) -> None:
        super().__init__()
        self.image: Stream = Stream(width, num_heads)
        self.text: Stream | None = Stream(width, num_heads) if with_text else None
        self.last = last
        self.freeze_unread()

    def freeze_unread(self) -> None:
        """Freeze the weights that are never used."""
        if self.last and self.text is not None:
            text = self.text
            for unread in (text.qkv.q_norm, text.attention_out, text.mlp_norm, text.mlp):
                unread.requires_grad_(False)

    def forward(
        self,
        tokens: Tensor,
        text: Tensor | None,
        time: Tensor,
        table: Table,
        text_table: Table,
        windows: Windows | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            tokens: patches (B, N, D).
            text: text tokens (B, L, D), None without a text stream.
            time: SiLU of the time embedding (B, 1, D), or what `fixed_times` puts in its place.
            table: RoPE table of the N patches.
            text_table: RoPE table of the L text positions.
            windows: attention windows of the patches; None attends to the whole picture.

        Returns:
            Updated patches and text.
        """
        attention = attend if windows is None else partial(attend_in_windows, windows=windows)
        image_modulation = self.image.modulate(time)
        q, k, v = self.image.project(tokens, image_modulation, table)
        if self.text is None:
            return self.image.update(tokens, attention(q, k, v), image_modulation), None

        text_modulation = self.text.modulate(time)
        text_q, text_k, text_v = self.text.project(text, text_modulation, text_table)
        k, v = torch.cat((text_k, k), dim=2), torch.cat((text_v, v), dim=2)
        if self.last:
            return self.image.update(tokens, attention(q, k, v), image_modulation), text
        attended = attention(torch.cat((text_q, q), dim=2), k, v)
        text_attended, image_attended = attended.split((text.shape[1], tokens.shape[1]), dim=1)
        tokens = self.image.update(tokens, image_attended, image_modulation)
        return tokens, self.text.update(text, text_attended, text_modulation)


def default_chunk_size(num_patches: int, device: torch.device) -> int:
    """Patches per chunk of a pixel block without gradient: few enough for a CPU's caches, or enough
    to keep a GPU busy and a compiled graph, which unrolls all chunks, short."""
    return 256 if device.type == "cpu" else max(1024, -(-num_patches // 4))


class PixelBlock(nn.Module):
    """Refines the pixel tokens of every patch: attention over compressed patches, then an MLP per
    pixel, both modulated per pixel by the patch's token (PixelDiT, arXiv 2511.20645).

    The modulation is the largest tensor of the network, 6*P*P*C numbers per patch, so everything
    but the attention runs in chunks of `chunk_size` patches.
    """

    def __init__(
        self, width: int, pixel_width: int, attention_width: int, num_heads: int, patch_size: int
    ) -> None:
        super().__init__()
        self.pixel_width = pixel_width
        patch_width = patch_size * patch_size * pixel_width
        # Rows ordered (shift, scale, gate, shift, scale, gate) x pixel x channel.
        self.modulation: nn.Linear = nn.Linear(width, 6 * patch_width)
        self.attention_norm: RMSNorm = RMSNorm(pixel_width)
        self.compress: nn.Linear = nn.Linear(patch_width, attention_width)
        self.qkv: QKV = QKV(attention_width, num_heads)
        self.attention_out: nn.Linear = nn.Linear(attention_width, attention_width)
        self.expand: nn.Linear = nn.Linear(attention_width, patch_width)
        self.mlp_norm: RMSNorm = RMSNorm(pixel_width)
        self.mlp: nn.Sequential = nn.Sequential(
            nn.Linear(pixel_width, 4 * pixel_width),
            nn.GELU(),
            nn.Linear(4 * pixel_width, pixel_width),
        )

    def forward(self, pixels: Tensor, patches: Tensor, table: Table, chunk_size: int) -> Tensor:
        """One block.

        Args:
            pixels: pixel tokens (B, N, P*P, C).
            patches: SiLU of patch tokens plus time embedding (B, N, D).
            table: RoPE table of the N patches.
            chunk_size: patches per chunk; the result does not depend on it.
        """
        batch_size = pixels.shape[0]
        # Split, not sliced: the gradient of a slice is a full-size weight padded with zeros.
        rows = self.modulation.weight.shape[0] // 6
        weights, biases = (p.split((2 * rows, 4 * rows)) for p in self.modulation.parameters())
        pixel_chunks = pixels.flatten(0, 1).split(chunk_size)  # (B*N, P*P, C) in chunks
        patch_chunks = patches.flatten(0, 1).split(chunk_size)

        pairs = zip(pixel_chunks, patch_chunks, strict=True)
        compact = torch.cat([self._compact(*pair, weights[0], biases[0]) for pair in pairs])
        compact = rearrange(compact, "(b n) d -> b n d", b=batch_size)
        attended = self.attention_out(attend(*self.qkv(compact, table)))

        attended_chunks = attended.flatten(0, 1).split(chunk_size)
        triples = zip(pixel_chunks, patch_chunks, attended_chunks, strict=True)
        updated = torch.cat([self._update(*triple, weights[1], biases[1]) for triple in triples])
        return updated.view(pixels.shape)

    def _modulation(self, patches: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """The shifts, scales and gates that these rows produce, each (M, P*P, C)."""
        num = 6 * weight.shape[0] // self.modulation.weight.shape[0]
        values = F.linear(patches, weight, bias).unflatten(-1, (num, -1, self.pixel_width))
        return values.unbind(1)

    def _compact(self, pixels: Tensor, patches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Pixel tokens (M, P*P, C) to one token per patch (M, D_attn)."""
        shift, scale = self._modulation(patches, weight, bias)
        return self.compress(self.attention_norm.modulated(pixels, shift, scale).flatten(1))

    def _update(
        self, pixels: Tensor, patches: Tensor, attended: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        attention_gate, shift, scale, mlp_gate = self._modulation(patches, weight, bias)
        pixels = torch.addcmul(pixels, attention_gate, self.expand(attended).view(pixels.shape))
        hidden = self.mlp(self.mlp_norm.modulated(pixels, shift, scale))
        return torch.addcmul(pixels, mlp_gate, hidden)
