"""The latent adapter and its sigma-aware gates: how latents reach the patch tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

GATES = ("channel", "token", "none")
PADDINGS = ("zeros", "replicate")
UPSAMPLINGS = ("nearest", "shuffle")


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of the latent adapter. The defaults are the published v1; v1.5 is
    ``width=1024, gate="token", padding="replicate", inject_pixels=True, rgb_head=True``.

    Attributes:
        width: channels of the convolutions.
        num_res_blocks: residual blocks after the first two convolutions.
        interval: patch blocks between two injections.
        gate: one gate value a ``"channel"`` (v1) or a ``"token"`` (v1.5); ``"none"`` lets all
            in, to measure what the gate is worth.
        padding: of the convolutions, ``"zeros"`` (v1) or ``"replicate"`` (v1.5).
        inject_pixels: one more injection, into the condition of the pixel blocks (v1.5).
        rgb_head: training-only prediction of the low-resolution image (v1.5).
        rgb_head_block: the 1-based residual block that the RGB head reads; None is the end.
        unpack: side of the packing to undo first; FLUX.2's latents are packed 2 x 2 (v1.5).
        upsampling: where a latent cell covers several patches, ``"nearest"`` repeats it (v1,
            v1.5), so that what tells these patches apart has to be found in the neighbours;
            ``"shuffle"`` learns a feature for each (sub-pixel convolution, arXiv 1609.05158).
        sigma_plane: the noise level as one more channel of the latents. Published adapters have
            to guess it and leave it to the gate; a small one cannot afford to.
        head_norm: normalise what the heads read, as pre-activation networks end. Published
            adapters do not: trained from scratch their features outgrow the patch tokens.
    """

    width: int = 512
    num_res_blocks: int = 4
    interval: int = 2
    gate: str = "channel"
    padding: str = "zeros"
    inject_pixels: bool = False
    rgb_head: bool = False
    rgb_head_block: int | None = None
    unpack: int = 1
    upsampling: str = "nearest"
    sigma_plane: bool = False
    head_norm: bool = False

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"gate: {self.gate!r} is not one of {', '.join(GATES)}.")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding: {self.padding!r} is not one of {', '.join(PADDINGS)}.")
        if self.upsampling not in UPSAMPLINGS:
            accepted = ", ".join(UPSAMPLINGS)
            raise ValueError(f"adapter upsampling: {self.upsampling!r} is not one of {accepted}.")
        for name in ("interval", "unpack"):
            if getattr(self, name) < 1:
                raise ValueError(f"adapter {name}: {getattr(self, name)} must be at least 1.")
        if self.width % 4:
            raise ValueError(
                f"adapter width: {self.width} must be a multiple of 4, its GroupNorm's groups."
            )
        if self.rgb_head_block is not None and not 1 <= self.rgb_head_block <= self.num_res_blocks:
            raise ValueError(
                f"rgb_head_block: {self.rgb_head_block} must lie between 1 and num_res_blocks "
                f"({self.num_res_blocks}), or be null for the end of the adapter."
            )


class SigmaGate(nn.Module):
    """`tokens + sigmoid(W [tokens; feature] + b - exp(log_alpha) * latent_sigma) * feature`.

    (PiD, arXiv 2605.23902, sigma-aware gate.) W is held as two halves, W_x for tokens and W_f
    for the feature: the feature's half, b and sigma do not change from one sampling step to the
    next, so `openness` computes them once.

    At the start W is small, b = 2 and exp(log_alpha) = 5: the gate is 0.88 at sigma 0, 0.5 at
    0.4 and 0.05 at 1.
    """

    def __init__(self, width: int, gate: str) -> None:
        super().__init__()
        gate_width = width if gate == "channel" else 1
        self.tokens = nn.Linear(width, gate_width, bias=False)
        self.feature = nn.Linear(width, gate_width)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(5.0)))

    def reset_parameters(self) -> None:
        """The starting values of the docstring above."""
        nn.init.normal_(self.tokens.weight, std=0.01)
        nn.init.normal_(self.feature.weight, std=0.01)
        nn.init.constant_(self.feature.bias, 2.0)
        nn.init.constant_(self.log_alpha, math.log(5.0))

    def openness(self, feature: Tensor, latent_sigma: Tensor) -> Tensor:
        """`W_f feature + b - exp(log_alpha) * latent_sigma`, (B, N, D or 1).

        log_alpha is a bare parameter that autocast does not touch: its product is fp32 at least.
        """
        dtype = torch.promote_types(self.log_alpha.dtype, torch.float32)
        closing = self.log_alpha.to(dtype).exp() * latent_sigma.to(dtype)
        projected = self.feature(feature)
        return projected - closing.view(-1, 1, 1).to(projected.dtype)

    def opening(self, tokens: Tensor, openness: Tensor) -> Tensor:
        """The gate's value in [0, 1], (B, N, D or 1)."""
        return torch.sigmoid(self.tokens(tokens) + openness)

    def forward(self, tokens: Tensor, feature: Tensor, openness: Tensor) -> Tensor:
        """Tokens (B, N, D) with the feature (B, N, D) let in."""
        return torch.addcmul(tokens, self.opening(tokens, openness), feature)


class OpenGate(nn.Module):
    """`tokens + feature`, at every noise level: a `SigmaGate` that learns nothing."""

    def reset_parameters(self) -> None:
        """There are none."""

    def openness(self, feature: Tensor, latent_sigma: Tensor) -> Tensor:
        """Nothing to say of the feature: an empty (B, N, 0)."""
        return feature[..., :0]

    def opening(self, tokens: Tensor, openness: Tensor) -> Tensor:
        """1, (B, N, 1)."""
        return torch.ones_like(tokens[..., :1])

    def forward(self, tokens: Tensor, feature: Tensor, openness: Tensor) -> Tensor:
        """Tokens (B, N, D) with the whole feature (B, N, D) let in."""
        return tokens + feature


class ResBlock(nn.Module):
    """Pre-activation residual block: GroupNorm, SiLU, Conv3x3, twice."""

    def __init__(self, width: int, padding: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(4, width),
            nn.SiLU(),
            _conv(width, width, padding),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            _conv(width, width, padding),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class LatentAdapter(nn.Module):
    """Latents to one feature a patch for every injection point.

    Nothing here depends on `x_t` or `t`: one pass serves all sampling steps.

    Args:
        config: sizes.
        token_width: width D of the patch tokens.
        num_injections: injection points, the pixel blocks' included.
        patch_size: pixels P of a patch's side.
        latent_channels, latent_stride, scale: geometry of the latents (see `nn.PiD`).

    Raises:
        ValueError: latents that do not fit the patch grid.
    """

    def __init__(
        self,
        config: AdapterConfig,
        token_width: int,
        num_injections: int,
        patch_size: int,
        latent_channels: int,
        latent_stride: int,
        scale: int,
    ) -> None:
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale: {scale} must be at least 1.")
        if latent_channels % config.unpack**2:
            raise ValueError(
                f"latent_channels: {latent_channels} does not fit adapter unpack: {config.unpack}, "
                f"which takes a multiple of {config.unpack**2}."
            )
        if config.rgb_head and patch_size % scale:
            raise ValueError(
                f"scale: {scale} does not divide patch_size ({patch_size}), as rgb_head needs; set "
                "adapter.rgb_head to false."
            )
        self.unpack = config.unpack
        self.rgb_head_block = config.rgb_head_block
        channels = latent_channels // config.unpack**2
        self.upsample, self.fold = _grid_ratio(scale, latent_stride // config.unpack, patch_size)
        channels *= self.fold**2
        self.sigma_plane = config.sigma_plane
        self.stem = _stem(config, channels + config.sigma_plane, self.upsample)
        if config.upsampling == "shuffle":
            self.upsample = 1  # the stem does it
        self.res_blocks = nn.ModuleList(
            ResBlock(config.width, config.padding) for _ in range(config.num_res_blocks)
        )
        self.num_injections = num_injections
        self.head_norm = nn.LayerNorm(config.width) if config.head_norm else nn.Identity()
        self.heads = nn.Linear(config.width, num_injections * token_width)
        self.rgb_side = patch_size // scale if config.rgb_head else 0
        self.rgb_head = (
            nn.Sequential(
                nn.LayerNorm(config.width),
                nn.Linear(config.width, config.width),
                nn.SiLU(),
                nn.Linear(config.width, 3 * self.rgb_side**2),
            )
            if config.rgb_head
            else None
        )

    def reset_parameters(self) -> None:
        """Small convolutions and zero heads: at the start nothing is injected."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(
        self, latents: Tensor, latent_sigma: Tensor, with_rgb: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One pass of everything but the heads.

        Args:
            latents: (B, C, h, w), normalised.
            latent_sigma: noise level (B,) of the latents; only a sigma plane reads it.
            with_rgb: run the RGB head too, where there is one.

        Returns:
            A token a patch (B, H/P, W/P, width), for `features`, and the predicted
            low-resolution image (B, 3, H/scale, W/scale) in [-1, 1], or None.
        """
        x = self._to_patch_grid(latents)
        if self.sigma_plane:
            plane = latent_sigma.to(x.dtype).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
            x = torch.cat((x, plane), dim=1)
        # Convolutions in bf16 are a tenth faster so, and their output is tokens already.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        tapped = None
        for number, block in enumerate(self.res_blocks, start=1):
            x = block(x)
            if number == self.rgb_head_block:
                tapped = x
        tokens = rearrange(x, "b c h w -> b h w c")
        if self.rgb_head is None or not with_rgb:
            return tokens, None
        return tokens, self._predict_rgb(x if tapped is None else tapped)

    def features(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The heads, in one product: tokens (B, h, w, width) to one (B, h*w, D) an injection."""
        heads = self.heads(self.head_norm(tokens.flatten(1, 2)))
        return heads.chunk(self.num_injections, dim=-1)

    def _to_patch_grid(self, latents: Tensor) -> Tensor:
        unpacked = rearrange(
            latents, "b (c p q) h w -> b c (h p) (w q)", p=self.unpack, q=self.unpack
        )
        if self.upsample > 1:
            return F.interpolate(unpacked, scale_factor=self.upsample, mode="nearest")
        return rearrange(unpacked, "b c (h p) (w q) -> b (c p q) h w", p=self.fold, q=self.fold)

    def _predict_rgb(self, x: Tensor) -> Tensor:
        pixels = self.rgb_head(rearrange(x, "b c h w -> b h w c"))
        return rearrange(
            pixels, "b h w (c p q) -> b c (h p) (w q)", p=self.rgb_side, q=self.rgb_side
        )


def _stem(config: AdapterConfig, channels: int, ratio: int) -> nn.Sequential:
    """The first convolutions, with learned upsampling by `ratio` between them where asked for."""
    width = config.width
    first = (_conv(channels, width, config.padding), nn.SiLU())
    if config.upsampling == "nearest" or ratio == 1:
        return nn.Sequential(*first, _conv(width, width, config.padding))
    narrow = -(-width // ratio)
    return nn.Sequential(
        *first,
        _conv(width, narrow * ratio**2, config.padding),
        nn.PixelShuffle(ratio),
        _conv(narrow, width, config.padding),
    )


def _conv(in_channels: int, out_channels: int, padding: str) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode=padding)


def _grid_ratio(scale: int, latent_stride: int, patch_size: int) -> tuple[int, int]:
    """(upsampling, folding) that bring a latent grid to the patch grid; one of them is 1."""
    pixels = scale * latent_stride
    if pixels % patch_size == 0:
        return pixels // patch_size, 1
    if patch_size % pixels == 0:
        return 1, patch_size // pixels
    raise ValueError(
        f"scale: {scale} does not fit: a latent cell covers {scale} x {latent_stride} = {pixels} "
        f"output pixels, which must be a multiple or a divisor of patch_size ({patch_size})."
    )
