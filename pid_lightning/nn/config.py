"""Sizes of the pixel denoiser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pid_lightning.commands.parsing import check_at_least, check_choice
from pid_lightning.nn.adapter import AdapterConfig

PREDICTIONS = ("velocity", "x0")


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
    prediction: str = "velocity"
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        check_choice("prediction", self.prediction, PREDICTIONS)
        check_at_least("text_length", self.text_length, 0)
        counts = ("num_blocks", "num_pixel_blocks", "num_heads", "pixel_num_heads", "patch_size")
        for name in (*counts, "width", "pixel_width", "pixel_attention_width"):
            check_at_least(name, getattr(self, name), 1)
        for width, heads in (
            ("width", "num_heads"),
            ("pixel_attention_width", "pixel_num_heads"),
        ):
            channels, num = getattr(self, width), getattr(self, heads)
            if channels % (4 * num):
                raise ValueError(
                    f"{width}: {channels} must be a multiple of 4 x {heads} = {4 * num}, because "
                    "RoPE rotates pairs of channels by row and by column in each head."
                )
            if self.rope_reference is not None and channels == 4 * num:
                raise ValueError(
                    "rope_reference: NTK scaling is not defined for heads of 4 channels; set it to "
                    "null or use fewer heads."
                )
        if self.pixel_width % 4:
            raise ValueError(f"pixel_width: {self.pixel_width} must be a multiple of 4.")
