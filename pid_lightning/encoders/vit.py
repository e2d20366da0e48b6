"""What DINOv2 and SigLIP share: a timm vision transformer's patch tokens as latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.pretrained import (
    check_images,
    check_loaded,
    fill,
    find_weights,
    first_line,
    random_weights,
    read_tensors,
    unreachable_weights,
    warn_random_weights,
)

STRIDE = 16  # pixels per token: pictures are resized by patch/16 before the transformer
NORM_EPS = 1e-6
# Parts of a full checkpoint that come after the tokens we use.
UNUSED_PARTS = ("head.", "fc_norm.", "attn_pool.", "head_drop.")


class ViTEncoder(Encoder):
    """A timm `VisionTransformer` whose normalised patch tokens are the latents.

    Until `load`, a pretrained network is on the meta device: it costs nothing and cannot be used
    by mistake. Children name the picture statistics and the conventions of their family.

    Args:
        model: the name the user gave, for sentences.
        network: from `build_vit`.
        pretrained: whether `load` brings weights.
        checkpoint: weights file, or a folder holding one; None asks the hub.
        antialias_positions: how the position table is resampled to another grid.
    """

    latent_stride = STRIDE
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    antialias_images: bool
    weights_prefix = ""  # before the tower's names in a checkpoint that holds more than it

    def __init__(
        self,
        model: str,
        network: nn.Module,
        pretrained: bool,
        checkpoint: str | None,
        antialias_positions: bool,
    ) -> None:
        super().__init__()
        if checkpoint is not None and not pretrained:
            raise ValueError(
                f"checkpoint: {checkpoint} and pretrained: false contradict each other: "
                "leave one out."
            )
        self.model = model
        self.network = network
        self.checkpoint = None if checkpoint is None else find_weights(checkpoint)
        self.antialias_positions = antialias_positions
        self.loaded = not pretrained
        self.latent_channels = network.embed_dim
        if not pretrained:
            warn_random_weights(f"image encoder {model!r}")
        self.requires_grad_(False).eval()

    def hub_id(self) -> str | None:
        """Hub repository the weights come from, None where there is none."""
        return self.network.pretrained_cfg.get("hf_hub_id")

    def fetch(self) -> Mapping[str, Tensor]:
        """Tensors of the pretrained network from the hub; OSError where they cannot be had."""
        from timm.models import load_state_dict_from_hf

        return load_state_dict_from_hf(self.hub_id(), weights_only=True)

    def load(self) -> None:
        """Bring the weights from `checkpoint` or the hub.

        Raises:
            OSError: the weights cannot be had.
            ValueError: they are damaged or belong to another network.
        """
        if self.loaded:
            return
        if self.checkpoint is not None:
            source = str(self.checkpoint)
            tensors = read_tensors(self.checkpoint, self.weights_prefix)
        else:
            source = self.hub_id() or "no hub repository"
            try:
                if self.hub_id() is None:
                    raise OSError("the library names no hub repository for it")
                tensors = self.fetch()
            except OSError as error:
                raise unreachable_weights(
                    f"image encoder {self.model!r} ({source})",
                    "checkpoint: a local weights file or the folder that holds it",
                    error,
                ) from error
        tensors = vit_tensors(self.network, tensors)
        fill(self.network, tensors, source, "give the checkpoint that belongs to model")
        self.requires_grad_(False).eval()
        self.loaded = True

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, H/16, W/16), in the images' dtype.

        Raises:
            ValueError: H or W is not a multiple of 16.
        """
        check_images(images, STRIDE)
        check_loaded(self.network, images, self.model)
        pixels = self.preprocess(images)
        dtype = next(self.network.parameters()).dtype
        hidden = vit_patch_tokens(self.network, pixels.to(dtype), self.antialias_positions)
        hidden = hidden.to(pixels.dtype)  # norm and statistics in float32 at least
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)  # (B, h*w, C)
        height = images.shape[-2] // STRIDE
        latents = rearrange(hidden, "b (h w) c -> b c h w", h=height)  # (B, C, h, w)
        return self.finish(latents).to(images.dtype)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize by patch/16 and shift from [-1, 1] to the transformer's statistics, unclamped."""
        pixels = images.to(torch.promote_types(images.dtype, torch.float32))
        patch = self.network.patch_embed.patch_size[0]
        if patch != STRIDE:
            height, width = (side // STRIDE * patch for side in images.shape[-2:])
            pixels = F.interpolate(
                pixels,
                size=(height, width),
                mode="bicubic",
                align_corners=False,
                antialias=self.antialias_images,
            )
        mean, std = (
            pixels.new_tensor(v).view(1, 3, 1, 1) for v in (self.image_mean, self.image_std)
        )
        return ((pixels + 1) / 2 - mean) / std

    def finish(self, latents: Tensor) -> Tensor:
        """A family's last touch on latents (B, C, h, w); none by default."""
        return latents


def build_vit(timm_name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """A timm `VisionTransformer` without its head; on the meta device when weights will follow."""
    import timm

    try:
        with torch.device("meta") if pretrained else random_weights():
            network = timm.create_model(timm_name, num_classes=0, **options)
    except RuntimeError as error:  # timm's answer to an unknown name or tag
        family = timm_name.split("_patch")[0]
        raise ValueError(
            f"timm cannot build {timm_name!r} ({first_line(error)}): "
            f"list names with timm.list_models('{family}*', pretrained=True)."
        ) from error
    is_vit = isinstance(network, timm.models.VisionTransformer)
    if not is_vit or network.pos_embed is None:
        raise ValueError(
            f"timm's {timm_name!r} is a {type(network).__name__}, not a vision transformer with a "
            "table of positions: use a DINOv2 or SigLIP image tower."
        )
    return network


def vit_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under timm's names, without the parts that `network` has not got.

    timm's own filter also resamples a checkpoint of another geometry to fit, quietly: such a one
    is left as it is, so that `fill` refuses it.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    own = network.state_dict()
    num_positions = own["pos_embed"].shape[1]
    patch, table = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    fits = patch is not None and table is not None
    fits = fits and patch.shape == own["patch_embed.proj.weight"].shape
    # The original DINOv2 release keeps a position for the class token that timm folds away.
    fits = fits and table.shape[1] in (num_positions, num_positions + 1)
    tensors = checkpoint_filter_fn(dict(tensors), network) if fits else tensors
    return {n: v for n, v in tensors.items() if n in own or not n.startswith(UNUSED_PARTS)}


def vit_patch_tokens(network: nn.Module, pixels: Tensor, antialias: bool) -> Tensor:
    """Patch tokens (B, h*w, C) after the last block and before the final norm, at any grid.

    timm's own forward would antialias every resampled position table; transformers does not for
    SigLIP, so the embedding is done here.
    """
    patches = network.patch_embed.proj(pixels)  # (B, C, h, w)
    grid = (patches.shape[-2], patches.shape[-1])
    num_prefix = network.num_prefix_tokens
    num_placed = 0 if network.no_embed_class else num_prefix  # prefix tokens that have a position
    positions = network.pos_embed
    table = resample_positions(
        positions[:, num_placed:], network.patch_embed.grid_size, grid, antialias
    )
    tokens = rearrange(patches, "b c h w -> b (h w) c") + table  # (B, h*w, C)
    prefix = [token for token in (network.cls_token, network.reg_token) if token is not None]
    if prefix:
        first = torch.cat(prefix, dim=1)  # (1, num_prefix, C)
        if num_placed:
            first = first + positions[:, :num_placed]
        tokens = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)
    return network.blocks(network.norm_pre(tokens))[:, num_prefix:]


def resample_positions(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool
) -> Tensor:
    """Positions (1, h*w, C) bicubically to another grid, in float32, as transformers does."""
    if tuple(old_grid) == tuple(new_grid):
        return table
    plane = rearrange(table.float(), "b (h w) c -> b c h w", h=old_grid[0])  # (1, C, h, w)
    plane = F.interpolate(
        plane, size=new_grid, mode="bicubic", align_corners=False, antialias=antialias
    )
    return rearrange(plane, "b c h w -> b (h w) c").to(table.dtype)  # (1, h'*w', C)
