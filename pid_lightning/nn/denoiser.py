"""PiD, the pixel diffusion decoder: predicts a velocity from noisy pixels, text and latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pid_lightning.checks import Mistake, check_multiple, check_whole
from pid_lightning.diffusion import flow
from pid_lightning.nn.adapter import LatentAdapter, OpenGate, SigmaGate
from pid_lightning.nn.blocks import PatchBlock, PixelBlock, Stream, default_chunk_size
from pid_lightning.nn.changes import Change
from pid_lightning.nn.condition import Adapted, Condition, TextEmbedding
from pid_lightning.nn.config import PiDConfig
from pid_lightning.nn.geometry import Geometry
from pid_lightning.nn.layers import RMSNorm, TimeEmbedding
from pid_lightning.nn.positions import PositionTables, Tables
from pid_lightning.nn.refiner import Refiner, enlarged
from pid_lightning.nn.windows import Windows


class PiD(nn.Module):
    """Predicts the velocity of noisy pixels from text and noisy latents (arXiv 2605.23902).

    A PixelDiT backbone (patch tokens, then pixel tokens inside each patch) with gated injections
    of the latents. What all sampling steps share is computed once, by `condition`::

        condition = pid.condition(latents, latent_sigma, text)
        velocity = pid(x_t, t, condition)

    Args:
        config: sizes.
        geometry: the latents and the scale.

    Attributes:
        config, geometry: as given.
        chunk_size: patches per chunk of a pixel block without gradient; None is
            `default_chunk_size`.
        window_size: side of the attention windows in patches, see `attend_in_windows`.
        activation_checkpointing: whether blocks are recomputed in the backward pass.
        changes: what was done to the network for inference, in order.

    Raises:
        Mistake: config and geometry do not fit each other.
    """

    def __init__(self, config: PiDConfig, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        self.geometry = geometry
        self.chunk_size: int | None = None
        self.window_size: int | None = None
        self.activation_checkpointing = False
        self.changes: tuple[Change, ...] = ()
        self.velocity_function: Callable[..., Tensor] = PiD.velocity  # replaced by `compilation`
        self._positions = PositionTables(config)

        self.patch_embedding: nn.Linear = nn.Linear(3 * config.patch_size**2, config.width)
        self.time_embedding: TimeEmbedding = TimeEmbedding(config.width)
        self.time_activation: nn.Module = nn.SiLU()  # replaced by `fixed_times`
        with_text = config.text_length > 0
        self.text_embedding: TextEmbedding | None = TextEmbedding(config) if with_text else None
        self.patch_blocks: nn.ModuleList = nn.ModuleList(
            PatchBlock(config.width, config.num_heads, with_text, i == config.num_blocks - 1)
            for i in range(config.num_blocks)
        )
        self.pixel_embedding: nn.Linear = nn.Linear(6 if config.residual else 3, config.pixel_width)
        self.pixel_blocks: nn.ModuleList = nn.ModuleList(
            PixelBlock(
                config.width,
                config.pixel_width,
                config.pixel_attention_width,
                config.pixel_num_heads,
                config.patch_size,
            )
            for _ in range(config.num_pixel_blocks)
        )
        self.out_norm: RMSNorm = RMSNorm(config.pixel_width)
        self.out: nn.Linear = nn.Linear(config.pixel_width, 3)

        num_gates = -(-config.num_blocks // config.adapter.interval)
        num_gates += config.adapter.inject_pixels
        self.adapter: LatentAdapter = LatentAdapter(
            config.adapter, config.width, num_gates, config.patch_size, geometry
        )
        self.gates: nn.ModuleList = nn.ModuleList(
            OpenGate()
            if config.adapter.gate == "none"
            else SigmaGate(config.width, config.adapter.gate)
            for _ in range(num_gates)
        )
        self.refiner: Refiner | None = (
            Refiner(config.refiner_width, config.refiner_layers) if config.refiner_width else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise: modulations, adapter heads and the output are zero, so that at first every
        block is the identity and the network predicts 0 (adaLN-Zero, arXiv 2212.09748)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.text_embedding is not None:
            nn.init.normal_(self.text_embedding.position, std=0.02)
        for module in self.modules():
            if isinstance(module, (Stream, PixelBlock)):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.out.weight)
        for part in filter(None, (self.adapter, self.refiner, *self.gates)):
            part.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PiD:
        """Also drop the cached position tables when the network moves."""
        self._positions = PositionTables(self.config)
        return super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; inputs are cast to it, velocities are in fp32 at least."""
        return self.patch_embedding.weight.dtype

    def attend_in_windows(self, size: int | None) -> None:
        """Restrict the patch blocks' attention to windows, shifted by half in every other block.

        This changes the picture slightly, since the network was trained with full attention, and
        makes attention linear in the pixels. The pixel blocks, which are few, still see everything.

        Args:
            size: maximum side of a window in pixels; None restores full attention.

        Raises:
            Mistake: `size` is not a multiple of the patch size, or below two patches.
        """
        side = self.config.patch_size
        if size is not None:
            check_whole("window", size)
            check_multiple("window", size, side, "patch_size", least=2)
        self.window_size = None if size is None else size // side

    @property
    def alignment(self) -> int:
        """Output sizes are multiples of this many pixels: whole patches and whole latent cells."""
        return self.geometry.alignment(self.config.patch_size)

    def check_size(self, height: int, width: int) -> None:
        """Check an output size in pixels, see `Geometry.check_size`."""
        self.geometry.check_size(height, width, self.config.patch_size)

    def condition(
        self,
        latents: Tensor,
        latent_sigma: Tensor,
        text: Tensor | None = None,
        keep_latents: Tensor | None = None,
        keep_text: Tensor | None = None,
        with_rgb: bool = False,
    ) -> Condition:
        """Compute what all sampling steps share: adapter features, text tokens, position tables.

        Args:
            latents, latent_sigma, with_rgb: see `adapt`.
            text, keep_latents, keep_text: see `condition_on`.
        """
        adapted = self.adapt(latents, latent_sigma, with_rgb)
        return self.condition_on(adapted, latent_sigma, text, keep_latents, keep_text)

    def adapt(self, latents: Tensor, latent_sigma: Tensor, with_rgb: bool = False) -> Adapted:
        """Run the adapter's convolutions, the slow part of a condition, whose result is small.

        Args:
            latents: (B, C, h, w), normalised; the output height is h*latent_stride*scale.
            latent_sigma: noise level (B,) of the latents in [0, 1].
            with_rgb: also predict the low-resolution image (training).

        Raises:
            Mistake: a size that is not whole patches.
        """
        self.check_size(*self.geometry.output_size(latents))
        tokens, rgb, native = self.adapter(latents.to(self.dtype), latent_sigma, with_rgb)
        if native is None:
            return Adapted(tokens, rgb=rgb)
        base = enlarged(native.picture, self.geometry.scale) if self.config.residual else None
        return Adapted(tokens, base, rgb, native.latents)

    def condition_on(
        self,
        adapted: Adapted,
        latent_sigma: Tensor,
        text: Tensor | None = None,
        keep_latents: Tensor | None = None,
        keep_text: Tensor | None = None,
    ) -> Condition:
        """The condition for an output of `adapt`, or for a part of it as a picture of its own: the
        part's features depend on its surroundings, but its positions start at zero.

        Args:
            adapted: from `adapt`.
            latent_sigma: noise level (B,) of the latents in [0, 1].
            text: caption features (B, L, D_text); None is the learned null.
            keep_latents: (B,) bool; False drops a sample's latents, so nothing is injected.
            keep_text: (B,) bool; False replaces a sample's text with the learned null.

        Raises:
            Mistake: text for a network without a text stream, or no text and no learned null.
        """
        features = self.adapter.features(adapted.tokens)
        if keep_latents is not None:
            keep = keep_latents.view(-1, 1, 1)
            features = tuple(feature * keep for feature in features)
        shared_logits = tuple(
            gate.shared_logit(feature, latent_sigma)
            for gate, feature in zip(self.gates, features, strict=True)
        )
        tokens = self._embed_text(text, keep_text, len(adapted.tokens))
        size = (side * self.config.patch_size for side in adapted.tokens.shape[1:3])
        tables = self._tables(*size, tokens)
        return Condition(tokens, features, shared_logits, *tables, adapted.rgb, adapted.base)

    def without_text(self, condition: Condition, null_text: Tensor | None = None) -> Condition:
        """The same condition with the null text (B, L, D_text), the learned one by default, for the
        second branch of guidance."""
        _, features, shared_logits, *_ = condition
        text = self._embed_text(null_text, None, len(features[0]))
        tables = self._tables(*condition.output_size(), text)
        return Condition(text, features, shared_logits, *tables, base=condition.base)

    def _embed_text(self, text: Tensor | None, keep: Tensor | None, num: int) -> Tensor | None:
        if self.text_embedding is not None:
            return self.text_embedding(text, keep, num)
        if text is not None:
            raise Mistake("text", "this network was built without a text stream; pass None.")
        return None

    def _tables(self, height: int, width: int, text: Tensor | None) -> Tables:
        device, dtype = self.out.weight.device, self.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        length = 0 if text is None else text.shape[1]
        return self._positions.of(height, width, length, device, dtype)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity at `x_t`.

        Args:
            x_t: noisy images (B, 3, H, W).
            t: pixel times (B,) in [0, 1], 1 is noise.
            condition: result of `condition` for the same size.

        Returns:
            Velocity (B, 3, H, W) in fp32 at least.

        Raises:
            Mistake: `x_t` and the condition differ in size.
        """
        height, width = condition.output_size()
        if x_t.shape[-2:] != (height, width):
            raise Mistake(
                "x_t",
                f"{x_t.shape[-2]} x {x_t.shape[-1]} does not match the output size of its "
                f"latents; draw noise of {height} x {width}.",
            )
        return self.velocity_function(self, x_t, t, condition)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What `forward` computes unless the network is compiled."""
        t_emb = self.time_embedding(t).to(self.dtype)  # (B, 1, D)
        last = len(self.patch_blocks) - 1
        patches = F.silu(t_emb + self._run_patch_blocks(x_t, t_emb, condition, (last,))[last])
        if self.config.adapter.inject_pixels:
            patches = self._inject(-1, patches, condition)
        prediction = self._run_pixel_blocks(x_t, patches, condition)
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        if condition.base is not None:
            prediction = prediction + condition.base
            if self.refiner is not None:
                prediction = prediction + self.refiner(prediction, condition.base, x_t, t)
        if self.config.prediction == "x0":
            return flow.velocity_from_x0(x_t.to(prediction.dtype), prediction, t)
        return prediction

    def features(
        self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Patch tokens after the given patch blocks (0-based), each (B, D, H/P, W/P).

        Stops after the last of them. The discriminator reads these features.
        """
        t_emb = self.time_embedding(t).to(self.dtype)
        after = self._run_patch_blocks(x_t, t_emb, condition, blocks)
        rows = x_t.shape[-2] // self.config.patch_size
        return [rearrange(after[i], "b (h w) d -> b d h w", h=rows) for i in blocks]

    def _run_patch_blocks(
        self, x_t: Tensor, t_emb: Tensor, condition: Condition, wanted: Sequence[int]
    ) -> dict[int, Tensor]:
        """Patch tokens (B, N, D) after each of the `wanted` blocks."""
        side = self.config.patch_size
        patches = rearrange(x_t, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
        tokens = self.patch_embedding(patches.to(self.dtype))  # (B, N, D)
        text, after = condition.text, {}
        time = self.time_activation(t_emb)
        grid, windows = [n // side for n in x_t.shape[-2:]], (None, None)
        if self.window_size is not None:
            windows = tuple(Windows(*grid, self.window_size, shifted) for shifted in (False, True))
        for i, block in enumerate(self.patch_blocks[: max(wanted) + 1]):
            injection, rest = divmod(i, self.config.adapter.interval)
            if rest == 0:
                tokens = self._inject(injection, tokens, condition)
            shared = (time, condition.patch_table, condition.text_table, windows[i % 2])
            tokens, text = self._run(block, tokens, text, *shared)
            if i in wanted:
                after[i] = tokens
        return after

    def _inject(self, number: int, tokens: Tensor, condition: Condition) -> Tensor:
        feature, shared_logit = condition.features[number], condition.shared_logits[number]
        return self.gates[number](tokens, feature, shared_logit)

    def _run_pixel_blocks(self, x_t: Tensor, patches: Tensor, condition: Condition) -> Tensor:
        """Embed the pixels of x_t and of a residual network's base, refine them under their patches
        (B, N, D) and project them to an image."""
        side = self.config.patch_size
        seen = x_t if condition.base is None else torch.cat((x_t, condition.base), dim=1)
        image = rearrange(seen, "b c (h p) (w q) -> b h w p q c", p=side, q=side)
        pixels = self.pixel_embedding(image.to(self.dtype)) + condition.pixel_positions(side)
        num_rows = pixels.shape[1]
        pixels = rearrange(pixels, "b h w p q c -> b (h w) (p q) c")

        chunk_size = num_patches = pixels.shape[0] * pixels.shape[1]
        if not torch.is_grad_enabled():
            chunk_size = self.chunk_size or default_chunk_size(num_patches, x_t.device)
        for block in self.pixel_blocks:
            pixels = self._run(block, pixels, patches, condition.pixel_table, chunk_size)
        chunks = pixels.flatten(0, 1).split(chunk_size)
        rgb = torch.cat([self.out(self.out_norm(chunk)) for chunk in chunks])
        rgb = rgb.view(*pixels.shape[:-1], 3)
        return rearrange(rgb, "b (h w) (p q) c -> b c (h p) (w q)", h=num_rows, p=side)

    def _run(self, block: nn.Module, *inputs: object) -> Any:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
