"""The latent adapter and its sigma-aware gates, which inject latents into the patch tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.checks import check_choice, check_multiple
from pid_lightning.nn.config import AdapterConfig, Gate, Padding
from pid_lightning.nn.geometry import Geometry, pack, unpack
from pid_lightning.nn.native import Native, NativeDecoder, check_geometry


class SigmaGate(nn.Module):
    """Adds a feature to the tokens, less of it the noisier the latents (arXiv 2605.23902):
    `tokens + sigmoid(W [tokens; feature] + b - exp(log_alpha) * latent_sigma) * feature`.

    W is stored as two halves, W_x for tokens and W_f for the feature: the feature's half, b and
    sigma are the same at every sampling step, so `shared_logit` computes them once.

    Initially W is small, b = 2 and exp(log_alpha) = 5: the gate is 0.88 at sigma 0, 0.5 at 0.4
    and 0.05 at 1.
    """

    def __init__(self, width: int, gate: Gate) -> None:
        super().__init__()
        gate_width = width if gate == "channel" else 1
        self.tokens: nn.Linear = nn.Linear(width, gate_width, bias=False)
        self.feature: nn.Linear = nn.Linear(width, gate_width)
        self.log_alpha: nn.Parameter = nn.Parameter(torch.tensor(math.log(5.0)))

    def reset_parameters(self) -> None:
        """Set the initial values given in the class docstring."""
        nn.init.normal_(self.tokens.weight, std=0.01)
        nn.init.normal_(self.feature.weight, std=0.01)
        nn.init.constant_(self.feature.bias, 2.0)
        nn.init.constant_(self.log_alpha, math.log(5.0))

    def shared_logit(self, feature: Tensor, latent_sigma: Tensor) -> Tensor:
        """What all steps share of the gate's logit: `W_f feature + b - exp(log_alpha) *
        latent_sigma`, (B, N, D or 1).

        Autocast does not cast log_alpha, a bare parameter; its product is fp32 at least.
        """
        dtype = torch.promote_types(self.log_alpha.dtype, torch.float32)
        penalty = self.log_alpha.to(dtype).exp() * latent_sigma.to(dtype)
        projected = self.feature(feature)
        return projected - penalty.view(-1, 1, 1).to(projected.dtype)

    def value(self, tokens: Tensor, shared_logit: Tensor) -> Tensor:
        """The gate's value in [0, 1], (B, N, D or 1)."""
        return torch.sigmoid(self.tokens(tokens) + shared_logit)

    def forward(self, tokens: Tensor, feature: Tensor, shared_logit: Tensor) -> Tensor:
        """Tokens (B, N, D) plus the gated feature (B, N, D)."""
        return torch.addcmul(tokens, self.value(tokens, shared_logit), feature)


class OpenGate(nn.Module):
    """`tokens + feature` at every noise level: a `SigmaGate` without parameters."""

    def reset_parameters(self) -> None:
        """Nothing to reset."""

    def shared_logit(self, feature: Tensor, latent_sigma: Tensor) -> Tensor:
        """An empty (B, N, 0): there is no logit."""
        return feature[..., :0]

    def value(self, tokens: Tensor, shared_logit: Tensor) -> Tensor:
        """Always 1, (B, N, 1)."""
        return torch.ones_like(tokens[..., :1])

    def forward(self, tokens: Tensor, feature: Tensor, shared_logit: Tensor) -> Tensor:
        """Tokens (B, N, D) plus the whole feature (B, N, D)."""
        return tokens + feature


class GroupNorm(nn.GroupNorm):
    """Group norm with statistics in fp32 at least, in any memory format.

    torch's kernel for a GPU leaves each group to one multiprocessor, which took seven times as long
    at 2048 x 2048, 2% of a decode. Its kernel for channels_last on a CPU cancels digits where a
    group's mean outweighs its spread. The price is fp32 copies of the input, two for the backward
    pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (self.num_groups, -1))  # (B, G, C/G, H, W)
        groups = groups.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
        weight, bias = (p.view(self.num_groups, -1, 1, 1) for p in (self.weight, self.bias))
        scale = weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(bias, groups - mean, scale).to(x.dtype).flatten(1, 2)


class ResBlock(nn.Module):
    """Pre-activation residual block: GroupNorm, SiLU, Conv3x3, twice."""

    def __init__(self, width: int, padding: Padding) -> None:
        super().__init__()
        self.layers: nn.Sequential = nn.Sequential(
            GroupNorm(4, width),
            nn.SiLU(),
            _conv(width, width, padding),
            GroupNorm(4, width),
            nn.SiLU(),
            _conv(width, width, padding),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class LatentAdapter(nn.Module):
    """Maps latents to one feature per patch for every injection point.

    Independent of `x_t` and `t`: one pass serves all sampling steps.

    Args:
        config: sizes.
        token_width: width D of the patch tokens.
        num_injections: injection points, including that of the pixel blocks.
        patch_size: side P of a patch in pixels.
        geometry: the latents and the scale.

    Raises:
        Mistake: the latents do not fit the patch grid.
    """

    def __init__(
        self,
        config: AdapterConfig,
        token_width: int,
        num_injections: int,
        patch_size: int,
        geometry: Geometry,
    ) -> None:
        super().__init__()
        channels, stride = geometry.latent_channels, geometry.latent_stride
        sides = [n for n in range(1, stride + 1) if stride % n == channels % n**2 == 0]
        check_choice("adapter.unpack", config.unpack, sides)
        if config.rgb_head or config.native != "none":
            because = "scale, for whole pixels of the low-resolution image in a patch"
            check_multiple("patch_size", patch_size, geometry.scale, because)
        self.unpack: int = config.unpack
        self.rgb_head_block: int | None = config.rgb_head_block
        unpacked = geometry.unpacked(config.unpack)
        self.fold: int
        self.upsample, self.fold = unpacked.to_patch_grid(patch_size)
        channels = unpacked.latent_channels * self.fold**2
        self.sigma_plane: bool = config.sigma_plane
        self.native: NativeDecoder | None = None
        self.native_side = 0  # pixels of the native decode on a patch's side
        if config.native != "none":
            check_geometry(unpacked)
            self.native = NativeDecoder(config.denoise_width, config.denoise_blocks)
            self.native_side: int = patch_size // geometry.scale
            channels *= 2  # the latents and their estimate
        self.stem: nn.Sequential = _stem(
            config, channels + config.sigma_plane, self.upsample, 3 * self.native_side**2
        )
        if config.upsampling == "shuffle":
            self.upsample: int = 1  # the stem does it
        self.res_blocks: nn.ModuleList = nn.ModuleList(
            ResBlock(config.width, config.padding) for _ in range(config.num_res_blocks)
        )
        self.num_injections = num_injections
        self.head_norm: nn.LayerNorm | nn.Identity = (
            nn.LayerNorm(config.width) if config.head_norm else nn.Identity()
        )
        self.heads: nn.Linear = nn.Linear(config.width, num_injections * token_width)
        self.rgb_side: int = patch_size // geometry.scale if config.rgb_head else 0
        self.rgb_head: nn.Sequential | None = (
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
        """Initialise small convolutions and zero heads, so that nothing is injected at first."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.native is not None and self.native.denoise is not None:
            self.native.denoise.reset_parameters()
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(
        self, latents: Tensor, latent_sigma: Tensor, with_rgb: bool = False
    ) -> tuple[Tensor, Tensor | None, Native | None]:
        """Run everything but the heads.

        Args:
            latents: (B, C, h, w), normalised.
            latent_sigma: noise level (B,) of the latents; only used with `sigma_plane`.
            with_rgb: also run the RGB head, if there is one.

        Returns:
            One token per patch (B, H/P, W/P, width), for `features`; the predicted low-resolution
            image (B, 3, H/scale, W/scale) in [-1, 1], or None; and the native decode, or None.
        """
        x, native = unpack(latents, self.unpack), None
        if self.native is not None:
            native = self.native(x, latent_sigma)
            x = torch.cat((x, native.latents.detach()), dim=1)
            native = native._replace(latents=pack(native.latents, self.unpack))
        x = self._to_patch_grid(x)
        if self.sigma_plane:
            plane = latent_sigma.to(x.dtype).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
            x = torch.cat((x, plane), dim=1)
        # channels_last makes bf16 convolutions a tenth faster and needs no copy to tokens.
        x = self.stem[:-1](x.contiguous(memory_format=torch.channels_last))
        if native is not None:
            folded = F.pixel_unshuffle(native.picture, self.native_side)
            x = torch.cat((x, folded), dim=1)
        x = self.stem[-1](x)
        tapped = None
        for number, block in enumerate(self.res_blocks, start=1):
            x = block(x)
            if number == self.rgb_head_block:
                tapped = x
        tokens = rearrange(x, "b c h w -> b h w c")
        if self.rgb_head is None or not with_rgb:
            return tokens, None, native
        return tokens, self._predict_rgb(x if tapped is None else tapped), native

    def estimate(self, latents: Tensor, latent_sigma: Tensor) -> Tensor:
        """The native decoder's estimate (B, C, h, w) of the clean latents, alone."""
        estimate = self.native.estimate(unpack(latents, self.unpack), latent_sigma)
        return pack(estimate, self.unpack)

    def features(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """All heads in one matmul: tokens (B, h, w, width) to one (B, h*w, D) per injection."""
        heads = self.heads(self.head_norm(tokens.flatten(1, 2)))
        # Copied apart: CUDA graphs would copy each view of the rows with the whole rows' extent.
        return tuple(head.contiguous() for head in heads.chunk(self.num_injections, dim=-1))

    def _to_patch_grid(self, unpacked: Tensor) -> Tensor:
        if self.upsample > 1:
            return F.interpolate(unpacked, scale_factor=self.upsample, mode="nearest")
        return pack(unpacked, self.fold)

    def _predict_rgb(self, x: Tensor) -> Tensor:
        pixels = self.rgb_head(rearrange(x, "b c h w -> b h w c"))
        return rearrange(
            pixels, "b h w (c p q) -> b c (h p) (w q)", p=self.rgb_side, q=self.rgb_side
        )


def _stem(config: AdapterConfig, channels: int, ratio: int, more: int) -> nn.Sequential:
    """The first convolutions, with learned upsampling by `ratio` between them if configured; the
    last one, on the patch grid, takes `more` channels."""
    width = config.width
    first = (_conv(channels, width, config.padding), nn.SiLU())
    if config.upsampling == "nearest" or ratio == 1:
        return nn.Sequential(*first, _conv(width + more, width, config.padding))
    narrow = -(-width // ratio)
    return nn.Sequential(
        *first,
        _conv(width, narrow * ratio**2, config.padding),
        nn.PixelShuffle(ratio),
        _conv(narrow + more, width, config.padding),
    )


def _conv(in_channels: int, out_channels: int, padding: Padding) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode=padding)
