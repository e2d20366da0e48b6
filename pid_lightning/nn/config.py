"""Sizes of the pixel denoiser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pid_lightning.checks import (
    Mistake,
    check_at_least,
    check_between,
    check_fields,
    check_multiple,
)

Gate = Literal["channel", "token", "none"]
Padding = Literal["zeros", "replicate"]
Upsampling = Literal["nearest", "shuffle"]
Native = Literal["none", "taef2"]
Prediction = Literal["velocity", "x0"]


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of the latent adapter. The defaults are the published v1; v1.5 is
    ``width=1024, gate="token", padding="replicate", inject_pixels=True, rgb_head=True``.

    Attributes:
        width: channels of the convolutions.
        num_res_blocks: residual blocks after the first two convolutions.
        interval: inject before every `interval`-th patch block, starting with the first.
        gate: one gate value per ``"channel"`` (v1) or per ``"token"`` (v1.5); ``"none"`` is the
            ablation without a gate.
        padding: of the convolutions, ``"zeros"`` (v1) or ``"replicate"`` (v1.5).
        inject_pixels: also inject into the condition of the pixel blocks (v1.5).
        rgb_head: training-only head that predicts the low-resolution image (v1.5).
        rgb_head_block: 1-based residual block that the RGB head reads; None is the last.
        unpack: side of the packing to undo first; FLUX.2's latents are packed 2 x 2 (v1.5).
        upsampling: if a latent cell covers several patches, ``"nearest"`` repeats it (v1, v1.5),
            so only neighbouring cells can tell its patches apart; ``"shuffle"`` learns one
            feature per patch (sub-pixel convolution, arXiv 1609.05158).
        sigma_plane: append the noise level to the latents as a channel. Published adapters have
            to infer it, since only the gate is told; small adapters do better when told too.
        head_norm: LayerNorm before the heads, as at the end of pre-activation networks. Without
            it (as published), features trained from scratch outgrow the patch tokens.
        native: ``"taef2"`` estimates the clean latents and shows the adapter what TAEF2's frozen
            decoder, for FLUX.2's latents, makes of them: a patch's pixels of that picture are more
            channels of it.
        denoise_width: channels of the network that estimates the clean latents; 0 decodes them as
            they are.
        denoise_blocks: residual blocks of that network.
    """

    width: int = 512
    num_res_blocks: int = 4
    interval: int = 2
    gate: Gate = "channel"
    padding: Padding = "zeros"
    inject_pixels: bool = False
    rgb_head: bool = False
    rgb_head_block: int | None = None
    unpack: int = 1
    upsampling: Upsampling = "nearest"
    sigma_plane: bool = False
    head_norm: bool = False
    native: Native = "none"
    denoise_width: int = 0
    denoise_blocks: int = 4

    def __post_init__(self) -> None:
        check_fields(self, "adapter.")
        for name in ("interval", "unpack"):
            check_at_least(f"adapter.{name}", getattr(self, name), 1)
        for name in ("num_res_blocks", "denoise_width", "denoise_blocks"):
            check_at_least(f"adapter.{name}", getattr(self, name), 0)
        check_multiple("adapter.width", self.width, 4, "groups of its GroupNorm")
        if self.rgb_head_block is not None:
            check_between("adapter.rgb_head_block", self.rgb_head_block, 1, self.num_res_blocks)


@dataclass(frozen=True)
class PiDConfig:
    """Sizes of the pixel denoiser. The defaults are the published v1 network, 1.36 billion
    parameters with its adapter.

    Attributes:
        width: width D of patch tokens.
        num_heads: attention heads of the patch blocks.
        num_blocks: patch blocks.
        patch_size: side P of a patch in pixels.
        pixel_width: width of a pixel token.
        pixel_attention_width: width of a compressed patch in the pixel blocks' attention.
        pixel_num_heads: attention heads of the pixel blocks.
        num_pixel_blocks: pixel blocks.
        text_width: width of the caption features; unused without text.
        text_length: maximum caption length in tokens, beyond which captions are cut; 0 builds no
            text stream.
        learned_null: whether missing text is a learned feature; published weights have none.
        rope_reference: (height, width) in pixels at which NTK scaling has no effect; null is
            plain RoPE.
        prediction: what the last layer predicts, ``"velocity"`` or ``"x0"``; `PiD` returns a
            velocity either way.
        residual: whether the network predicts what the bicubic enlargement of the adapter's native
            decode lacks, instead of the picture; its pixel tokens see that decode. Needs prediction
            ``"x0"``.
        refiner_width: channels of convolutions over the whole picture after the pixel blocks, which
            mix across the borders of patches; 0 builds none. Needs `residual`.
        refiner_layers: number of these convolutions, even.
        adapter: sizes of the latent adapter.
    """

    width: int = 1536
    num_heads: int = 24
    num_blocks: int = 14
    patch_size: int = 16
    pixel_width: int = 16
    pixel_attention_width: int = 1152
    pixel_num_heads: int = 16
    num_pixel_blocks: int = 2
    text_width: int = 2304
    text_length: int = 300
    learned_null: bool = True
    rope_reference: tuple[int, int] | None = (1024, 1024)
    prediction: Prediction = "velocity"
    residual: bool = False
    refiner_width: int = 0
    refiner_layers: int = 4
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("text_length", "refiner_width", "refiner_layers"):
            check_at_least(name, getattr(self, name), 0)
        counts = ("num_blocks", "num_pixel_blocks", "num_heads", "pixel_num_heads", "patch_size")
        for name in (*counts, "text_width"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("rope_reference", min(self.rope_reference or (1,)), 1)
        for width, heads in (("width", "num_heads"), ("pixel_attention_width", "pixel_num_heads")):
            because = f"4 x {heads}, since RoPE rotates pairs of channels by row and by column"
            check_multiple(width, getattr(self, width), 4 * getattr(self, heads), because)
        check_multiple("pixel_width", self.pixel_width, 4, "a sine and a cosine of row and column")
        if self.residual and (self.prediction != "x0" or self.adapter.native == "none"):
            raise Mistake(
                "residual",
                "true adds to the native decode, so it needs prediction x0 and adapter.native "
                "taef2; set both.",
            )
        if self.refiner_width:
            check_multiple("patch_size", self.patch_size, 2, "the refiner's folded pixels")
            check_multiple("refiner_layers", self.refiner_layers, 2, "residual pairs", least=1)
        if self.refiner_width and not self.residual:
            raise Mistake(
                "refiner_width",
                f"{self.refiner_width} channels refine a residual network; set residual to true.",
            )
