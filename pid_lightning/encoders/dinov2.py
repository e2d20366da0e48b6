"""DINOv2 family: patch tokens of a frozen timm transformer as latents, the way RAE makes them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.vae import (
    check_images,
    check_loaded,
    first_line,
    unreachable_weights,
    warn_random_weights,
)

STRIDE = 16  # pixels per token: pictures are resized by patch/16 before the transformer
NORM_EPS = 1e-6
STATISTICS_EPS = 1e-5
WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
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
            source, tensors = str(self.checkpoint), read_tensors(self.checkpoint, "visual.trunk.")
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
        fill(self.network, tensors, source)
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


class DINOv2Encoder(ViTEncoder):
    """DINOv2 by timm: last hidden state, final LayerNorm without affine, patch tokens only.

    RAE's preprocessing: plain bicubic resize by 14/16 (512 to 448; not antialiased, as in RAE's
    public code), ImageNet mean and std. Positions are resampled as transformers does: antialiased
    for the networks with registers, not for those without.

    Args:
        model: any timm DINOv2, e.g. ``vit_base_patch14_reg4_dinov2.lvd142m``.
        pretrained: whether `load` brings weights; False means random ones, and warns.
        checkpoint: timm's or the original release's weights file (``.safetensors``, ``.bin``,
            ``.pth``), or a folder holding one.
        statistics: file (``.safetensors`` or ``.pt``) with ``mean`` and ``var`` of the latents,
            (C,), (C, 1, 1) or per element (C, h, w): latents become (x - mean) / sqrt(var + 1e-5).

    Raises:
        FileNotFoundError: no such checkpoint or statistics file.
        ValueError: not a timm vision transformer, or statistics that do not fit it.
    """

    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)
    antialias_images = False

    def __init__(
        self,
        model: str = "vit_base_patch14_reg4_dinov2.lvd142m",
        pretrained: bool = True,
        checkpoint: str | None = None,
        statistics: str | None = None,
    ) -> None:
        network = build_vit(model, pretrained, {})
        super().__init__(model, network, pretrained, checkpoint, network.reg_token is not None)
        # Not buffers: a bfloat16 encoder must keep float32 statistics.
        self.statistics = None if statistics is None else self._read_statistics(statistics)
        self.latent_space = "dinov2" if statistics is None else "dinov2-normalised"

    def finish(self, latents: Tensor) -> Tensor:
        if self.statistics is None:
            return latents
        mean, var = (s.to(latents.device, latents.dtype) for s in self.statistics)
        grid = tuple(latents.shape[-2:])
        if tuple(mean.shape[-2:]) not in ((1, 1), grid):
            raise ValueError(
                f"The latent statistics are for a grid of {tuple(mean.shape[-2:])} cells but these "
                f"pictures give {grid}: use pictures of sides "
                f"{tuple(STRIDE * s for s in mean.shape[-2:])}, or per-channel statistics."
            )
        return (latents - mean) / torch.sqrt(var + STATISTICS_EPS)

    def _read_statistics(self, path: str) -> tuple[Tensor, Tensor]:
        tensors = read_tensors(find_weights(path), "")
        if not {"mean", "var"} <= set(tensors):
            raise ValueError(
                f"{path} holds {sorted(tensors)}: latent statistics need the keys mean and var."
            )
        statistics = []
        for key in ("mean", "var"):
            table = tensors[key].float()
            if table.ndim == 4 and table.shape[0] == 1:
                table = table[0]
            if table.ndim == 1:
                table = table[:, None, None]
            if table.ndim != 3 or table.shape[0] != self.latent_channels:
                raise ValueError(
                    f"{key} in {path} has the shape {tuple(tensors[key].shape)}: {self.model} "
                    f"needs ({self.latent_channels},) or ({self.latent_channels}, h, w)."
                )
            statistics.append(table)  # (C, h, w) or (C, 1, 1)
        return statistics[0], statistics[1]


def build_vit(timm_name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """A timm `VisionTransformer` without its head; on the meta device when weights will follow."""
    import timm

    try:
        with torch.device("meta") if pretrained else nullcontext():
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


def find_weights(path: str) -> Path:
    """The weights file that `path` is, or that the folder `path` holds.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    for name in WEIGHT_FILES:
        if (place / name).is_file():
            return place / name
    what = f"holds none of {', '.join(WEIGHT_FILES)}" if place.is_dir() else "does not exist"
    raise FileNotFoundError(f"{path} {what}: give a weights file or the folder that holds it.")


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or (weights only) torch file, on the CPU.

    Args:
        path: the file.
        prefix: where some names start with it, only those are read, without it: a text tower
            beside the wanted part never takes memory.

    Raises:
        ValueError: the file is damaged or holds no dictionary of tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt", device="cpu") as file:
                names = _names_under(prefix, file.keys())
                return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read as weights ({first_line(error)}): fetch the file again."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors.")
    return {name.removeprefix(prefix): tensors[name] for name in _names_under(prefix, tensors)}


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor of a (meta) transformer, in the network's dtype, or none.

    Raises:
        ValueError: tensors are missing, left over, or of another geometry.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    own = network.state_dict()
    num_positions = own["pos_embed"].shape[1]
    # timm's filter would quietly resample a checkpoint of another geometry to fit: refuse it first.
    # The original DINOv2 release keeps a position for the class token that timm folds away.
    patch, table = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    fits = patch is not None and table is not None
    fits = fits and patch.shape == own["patch_embed.proj.weight"].shape
    fits = fits and table.shape[1] in (num_positions, num_positions + 1)
    tensors = checkpoint_filter_fn(dict(tensors), network) if fits else tensors
    tensors = {n: v for n, v in tensors.items() if n in own or not n.startswith(UNUSED_PARTS)}
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise ValueError(
            f"The weights of {source} are not those of this network: {len(wrong)} tensors are "
            f"missing, left over or of another shape, the first {wrong[0]!r}: "
            "give the checkpoint that belongs to model."
        )
    tensors = {name: value.to(own[name].dtype) for name, value in tensors.items()}
    network.load_state_dict(tensors, strict=True, assign=True)


def _names_under(prefix: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    chosen = [name for name in names if name.startswith(prefix)]
    return chosen or names
