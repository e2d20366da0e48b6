"""Shared code of DINOv2 and SigLIP: patch tokens of a timm vision transformer as latents."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.pretrained import building, find_weights, first_line, reaching
from pid_lightning.files.tensors import fill, read_tensors

STRIDE = 16  # pixels per token, because images are resized by patch/16 before the transformer
NORM_EPS = 1e-6
# Modules after the tokens used here; dropped from full checkpoints.
UNUSED_PARTS = ("head.", "fc_norm.", "attn_pool.", "head_drop.")


class ViTEncoder(Encoder):
    """A timm `VisionTransformer` whose normalised patch tokens are the latents.

    A pretrained network stays on the meta device until `load`, so it uses no memory and cannot be
    used by mistake. Subclasses define the image statistics and conventions of their family.

    Args:
        model: the name given by the user, for messages.
        network: from `build_vit`.
        checkpoint: weights file, or a folder that contains one; None downloads from the hub.
    """

    latent_stride = STRIDE
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    antialias_images: bool
    antialias_positions = False  # where the position table is resampled to another grid
    weights_prefix = ""  # of the tower's tensors in a checkpoint of a larger model

    def __init__(self, model: str, network: nn.Module, checkpoint: str | None) -> None:
        super().__init__()
        self.model = model
        self.network = network
        self.checkpoint: Path | None = (
            None if checkpoint is None else find_weights("checkpoint", checkpoint)
        )
        self.latent_channels: int = network.embed_dim
        self.requires_grad_(False).eval()

    def hub_id(self) -> str | None:
        """Hub repository of the weights, or None."""
        return self.network.pretrained_cfg.get("hf_hub_id")

    def fetch(self) -> Mapping[str, Tensor]:
        """Download the pretrained tensors from the hub; OSError if they are not available."""
        from timm.models import load_state_dict_from_hf

        return load_state_dict_from_hf(self.hub_id() or "", weights_only=True)

    def load(self) -> None:
        """Load the weights from `checkpoint` or the hub.

        Raises:
            OSError: the weights are not available.
            Mistake: they are damaged or belong to another network.
        """
        if self.loaded:
            return
        if self.checkpoint is not None:
            source = str(self.checkpoint)
            tensors = read_tensors(self.checkpoint, self.weights_prefix)
        else:
            source = self.hub_id() or "no hub repository"
            with reaching(
                f"image encoder {self.model!r} ({source})",
                "set checkpoint: a local weights file or the folder that holds it, or set "
                "pretrained: false to run with random weights on purpose",
            ):
                tensors = self.fetch()
        tensors = vit_tensors(self.network, tensors)
        fill(self.network, tensors, source, "give the checkpoint of this model")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, H/16, W/16), in the images' dtype.

        Raises:
            Mistake: H or W is not a multiple of 16.
        """
        self.check_images(images)
        pixels = self.preprocess(images)
        hidden = vit_patch_tokens(self.network, pixels.to(self.dtype), self.antialias_positions)
        hidden = hidden.to(pixels.dtype)  # norm and statistics in at least float32
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)  # (B, h*w, C)
        height = images.shape[-2] // STRIDE
        latents = rearrange(hidden, "b (h w) c -> b c h w", h=height)  # (B, C, h, w)
        return self.finish(latents).to(images.dtype)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize by patch/16 without clamping, then normalise with the family's mean and std."""
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
        """Family-specific normalisation of latents (B, C, h, w); the identity by default."""
        return latents


def build_vit(
    name: str, pretrained: bool, options: Mapping[str, Any] = {}, others: Sequence[str] = ()
) -> nn.Module:
    """A timm `VisionTransformer` without its head, see `building`.

    Args:
        name: timm's.
        pretrained: whether weights follow.
        options: of timm's constructor.
        others: names beside timm's that a user can have meant.

    Raises:
        Mistake: timm has no such vision transformer with a position table.
    """
    import timm

    network, reason = None, ""
    try:
        with building(f"image encoder {name!r}", pretrained):
            network = timm.create_model(name, num_classes=0, **options)
    except RuntimeError as error:  # an unknown name or tag
        reason = f" ({first_line(error)})"
    if not isinstance(network, timm.models.VisionTransformer) or network.pos_embed is None:
        known = [*others, *timm.list_models(pretrained=True)]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise Mistake(
            "model",
            f"{name!r} is no vision transformer with a position table{reason}, as the image towers "
            f"of DINOv2 and SigLIP are; did you mean {', '.join(close)}?",
        )
    return network


def vit_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under timm's names, without unused modules that `network` lacks.

    timm's own filter silently resamples a checkpoint of a different geometry, so it is not applied
    to one; `fill` then rejects the checkpoint.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    own = network.state_dict()
    num_positions = own["pos_embed"].shape[1]
    patch, table = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    fits = patch is not None and table is not None
    fits = fits and patch.shape == own["patch_embed.proj.weight"].shape
    # The original DINOv2 release has a position for the class token; timm folds it into the token.
    fits = fits and table.shape[1] in (num_positions, num_positions + 1)
    tensors = checkpoint_filter_fn(dict(tensors), network) if fits else tensors
    return {n: v for n, v in tensors.items() if n in own or not n.startswith(UNUSED_PARTS)}


def vit_patch_tokens(network: nn.Module, pixels: Tensor, antialias: bool) -> Tensor:
    """Patch tokens (B, h*w, C) after the last block and before the final norm, at any grid.

    timm's own forward antialiases every resampled position table, which transformers does not do
    for SigLIP, so the embedding is computed here.
    """
    from timm.layers import resample_abs_pos_embed

    patches = network.patch_embed.proj(pixels)  # (B, C, h, w)
    num_prefix = network.num_prefix_tokens
    num_placed = 0 if network.no_embed_class else num_prefix  # prefix tokens with a position
    positions = resample_abs_pos_embed(
        network.pos_embed,
        list(patches.shape[-2:]),
        list(network.patch_embed.grid_size),
        num_placed,
        antialias=antialias,
    )
    # (B, h*w, C)
    tokens = rearrange(patches, "b c h w -> b (h w) c") + positions[:, num_placed:]
    prefix = [token for token in (network.cls_token, network.reg_token) if token is not None]
    if prefix:
        first = torch.cat(prefix, dim=1)  # (1, num_prefix, C)
        if num_placed:
            first = first + positions[:, :num_placed]
        tokens = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)
    return network.blocks(network.norm_pre(tokens))[:, num_prefix:]
