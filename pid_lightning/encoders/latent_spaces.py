"""Normalised latent spaces: an affine map per channel, plus 2 x 2 packing for FLUX.2."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pid_lightning.checks import Mistake, check_fields, shown
from pid_lightning.files import ASSETS
from pid_lightning.nn.geometry import pack, unpack

# Normalised latents have a standard deviation near 1. Outside these bounds, a missing or doubled
# normalisation is more likely than an unusual picture; small pictures reach 2.
PLAUSIBLE_STD = (0.4, 2.2)

# diffusers autoencoders whose latent space is known: of videos, with the prefix of spaces without a
# name of their own, and of pictures.
VIDEO_CLASSES = {
    "AutoencoderKLQwenImage": "qwen",
    "AutoencoderKLWan": "wan",
    "AutoencoderKLQwenImage21": "qwen21",
}
SUPPORTED_CLASSES = (
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderTiny",
    "AutoencoderDC",
    *VIDEO_CLASSES,
)


@dataclass(frozen=True)
class LatentSpace:
    """The normalised space a latent diffusion model works in: ``(pack(raw) - shift) * scale``.

    Attributes:
        name: stored in checkpoints, so that latents of different spaces are never mixed up.
        channels: channels C of the normalised latents (after packing).
        stride: pixels per cell of the normalised latents (after packing).
        shift: one number, or one per channel of the normalised latents.
        scale: one number, or one per channel of the normalised latents.
        packing: raw cells per side that are folded into channels: 1, or 2 for FLUX.2.
    """

    name: str
    channels: int
    stride: int
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    packing: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if 0 in self.scale:
            raise Mistake("scale", f"{shown(self.scale)} must not hold 0.")
        for field, numbers in (("shift", self.shift), ("scale", self.scale)):
            if len(numbers) not in (1, self.channels):
                raise Mistake(
                    field,
                    f"{len(numbers)} values do not fit the {self.channels} channels of latent "
                    f"space {self.name!r}; give 1 or {self.channels}.",
                )

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents of the autoencoder to normalised latents, in the same dtype.

        Args:
            raw: (B, C/packing^2, h*packing, w*packing), or with a frame axis of length one,
                (B, C/packing^2, 1, h*packing, w*packing), as returned by video autoencoders.

        Returns:
            Latents (B, C, h, w).

        Raises:
            Mistake: the shape does not fit this space.
        """
        raw = self._checked(raw, self.packing)
        shift, scale = self._shift_and_scale(raw)
        return ((pack(raw, self.packing) - shift) * scale).to(raw.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Inverse of `normalise`: latents (B, C, h, w) to (B, C/packing^2, h*packing, w*packing).

        Raises:
            Mistake: the shape does not fit this space.
        """
        latents = self._checked(latents, packing=1)
        shift, scale = self._shift_and_scale(latents)
        return unpack((latents / scale + shift).to(latents.dtype), self.packing)

    def _shift_and_scale(self, latents: Tensor) -> Iterator[Tensor]:
        """(1, C or 1, 1, 1) each, in at least float32, in which latents are then computed."""
        dtype = torch.promote_types(latents.dtype, torch.float32)
        for numbers in (self.shift, self.scale):
            yield torch.tensor(numbers, dtype=dtype, device=latents.device).view(1, -1, 1, 1)

    def _checked(self, latents: Tensor, packing: int) -> Tensor:
        """Latents (B, C, h, w), from (B, C, 1, h, w) too, that fit this space before `packing`."""
        channels = self.channels // packing**2
        cells = latents[:, :, 0] if latents.ndim == 5 and latents.shape[2] == 1 else latents
        fits = cells.ndim == 4 and cells.shape[1] == channels
        if not fits or any(side % packing for side in cells.shape[2:]):
            raise Mistake(
                "latents",
                f"shape {tuple(latents.shape)} does not fit the space {self.name!r}; give "
                f"(B, {channels}, h, w), h and w being multiples of {packing}, or one frame of it.",
            )
        return cells


def flux2_space(
    running_mean: Sequence[float] | Tensor,
    running_var: Sequence[float] | Tensor,
    eps: float = 1e-4,
    stride: int = 16,
) -> LatentSpace:
    """FLUX.2's space from the running statistics of its autoencoder's batch norm.

    Args:
        running_mean: (C,) for the packed latents; C is 128 in the published autoencoder.
        running_var: (C,), likewise.
        eps: added to the variance before the square root.
        stride: pixels per packed cell.
    """
    mean, var = (
        numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
        for numbers in (running_mean, running_var)
    )
    name = "flux2" if (len(mean), stride) == (128, 16) else f"flux2-{len(mean)}x{stride}"
    scale = tuple(1 / math.sqrt(v + eps) for v in var)
    return LatentSpace(name, len(mean), stride, shift=tuple(mean), scale=scale, packing=2)


# Per-channel statistics in the published files of the autoencoders. FLUX.2's are those of its
# batch norm, in the packing's order: channel, row, column.
STATISTICS: Mapping[str, Mapping[str, Sequence[float]]] = json.loads(
    (ASSETS / "latent_statistics.json").read_text(encoding="utf-8")
)
FLUX2, QWEN, QWEN21 = (STATISTICS[name] for name in ("flux2", "qwen", "qwen21"))

KNOWN_SPACES: Mapping[str, LatentSpace] = {
    "sd3": LatentSpace("sd3", 16, 8, shift=(0.0609,), scale=(1.5305,)),
    "flux": LatentSpace("flux", 16, 8, shift=(0.1159,), scale=(0.3611,)),  # also Z-Image
    "sdxl": LatentSpace("sdxl", 4, 8, scale=(0.13025,)),
    # FLUX.2, klein, FLUX.3, ERNIE-Image, Ideogram 4, Bria FIBO 2
    "flux2": flux2_space(FLUX2["mean"], FLUX2["variance"]),
    "qwen": LatentSpace(  # also Wan 2.1
        "qwen", 16, 8, shift=tuple(QWEN["mean"]), scale=tuple(1 / s for s in QWEN["std"])
    ),
    "qwen21": LatentSpace(
        "qwen21", 64, 16, shift=tuple(QWEN21["mean"]), scale=tuple(1 / s for s in QWEN21["std"])
    ),
    "dc": LatentSpace("dc", 32, 32, scale=(0.41407,)),  # SANA
}


def autoencoder_kl_space(config: Mapping[str, Any]) -> LatentSpace:
    """The space that a diffusers `AutoencoderKL` configuration describes.

    Both diffusers conventions are supported: ``(z - shift_factor) * scaling_factor``, and
    ``(z - latents_mean) * scaling_factor / latents_std`` if those lists are present. The name is
    that of the known space with the same numbers, otherwise it is composed of the numbers, or of
    a hash of those of each channel.
    """
    channels = config.get("latent_channels", 4)
    stride = 2 ** (len(config.get("block_out_channels", (64,))) - 1)
    scaling = config.get("scaling_factor", 0.18215)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift = tuple(config["latents_mean"])
        scale = tuple(scaling / s for s in config["latents_std"])
    else:
        shift, scale = (config.get("shift_factor") or 0.0,), (scaling,)
    return _named(channels, stride, shift, scale, prefix="kl")


def qwen_space(config: Mapping[str, Any], prefix: str = "qwen") -> LatentSpace:
    """The space that the configuration of one of the `VIDEO_CLASSES` describes; what is missing is
    Qwen-Image's. The prefix is that of a space without a name of its own."""
    channels = config.get("z_dim", 16)
    stride = 2 ** len(config.get("temperal_downsample", (False, True, True)))  # diffusers' spelling
    stride *= config.get("patch_size") or 1
    shift = tuple(config.get("latents_mean", QWEN["mean"]))
    scale = tuple(1 / s for s in config.get("latents_std", QWEN["std"]))
    return _named(channels, stride, shift, scale, prefix)


def space_of(vae: nn.Module) -> LatentSpace:
    """The latent space of a diffusers autoencoder.

    Args:
        vae: one of the `SUPPORTED_CLASSES`. FLUX.2's statistics are read from its weights; on the
            meta device they are 0 and 1, with correct geometry. An `AutoencoderTiny` does not state
            which autoencoder's latents it shares.

    Raises:
        Mistake: the autoencoder's class is not supported.
    """
    name = type(vae).__name__
    if name == "AutoencoderKL":
        return autoencoder_kl_space(vae.config)
    if name in VIDEO_CLASSES:
        return qwen_space(vae.config, VIDEO_CLASSES[name])
    if name in ("AutoencoderTiny", "AutoencoderDC"):
        config = vae.config
        stride = 2 ** (len(config.encoder_block_out_channels) - 1)
        shift, scale = (config.get("shift_factor", 0.0),), (config.scaling_factor,)
        prefix = name.removeprefix("Autoencoder").lower()
        return _named(config.latent_channels, stride, shift, scale, prefix)
    if name == "AutoencoderKLFlux2":
        stride = 2 ** len(vae.config.block_out_channels)  # one more halving, by the packing
        mean, var = vae.bn.running_mean, vae.bn.running_var
        if mean.is_meta:
            mean, var = [0.0] * len(mean), [1.0] * len(mean)
        elif _by_cell(mean):
            mean, var = (numbers.unflatten(0, (4, -1)).T.flatten() for numbers in (mean, var))
        return flux2_space(mean, var, vae.config.batch_norm_eps, stride)
    raise Mistake(
        "vae",
        f"class {name} is not supported because its latent space is unknown; use one of "
        f"{', '.join(SUPPORTED_CLASSES)}.",
    )


def _by_cell(mean: Tensor) -> bool:
    """Whether these are FLUX.2's statistics in the order of Ideogram 4: row, column, channel."""
    known = torch.tensor(FLUX2["mean"], device=mean.device).unflatten(0, (-1, 4)).T.flatten()
    return mean.shape == known.shape and torch.allclose(mean.float(), known, atol=1e-3)


def warn_if_not_normalised(latents: Tensor, space: str = "", stacklevel: int = 2) -> None:
    """Warn if the standard deviation of latents is far from 1.

    Args:
        latents: (B, C, h, w).
        space: name of the space they should be in, for the message.
        stacklevel: of the call that the warning names, as in `warnings.warn`; 2 is the caller.
    """
    std = latents.detach().float().std().item()
    low, high = PLAUSIBLE_STD
    if low <= std <= high:
        return
    if std > high:
        cause = (
            "they look like an autoencoder's raw output (raw FLUX.1 latents are 2.8 times too "
            "large, SDXL's 7.7 times); pass them through LatentSpace.normalise first"
        )
    elif std < low:
        cause = "they look normalised twice, or the picture is almost uniform; normalise only once"
    else:
        cause = "they contain NaN; check how they were made"
    name = f"{space} latents" if space else "latents"
    warnings.warn(
        f"These {name} have a standard deviation of {std:.2f} instead of about 1, so colours will "
        f"be wrong: {cause}.",
        stacklevel=stacklevel,
    )


def _named(
    channels: int, stride: int, shift: tuple[float, ...], scale: tuple[float, ...], prefix: str
) -> LatentSpace:
    for known in KNOWN_SPACES.values():
        same_geometry = (known.channels, known.stride) == (channels, stride)
        if same_geometry and _close(known.shift, shift) and _close(known.scale, scale):
            return known
    numbers = f"{scale[0]:g}-{shift[0]:g}"
    if len(scale) > 1:
        told = " ".join(f"{number:.5g}" for number in (*shift, *scale))
        numbers = hashlib.sha256(told.encode()).hexdigest()[:8]
    return LatentSpace(f"{prefix}-{channels}x{stride}-{numbers}", channels, stride, shift, scale)


def _close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-7) for x, y in zip(a, b, strict=True)
    )
