"""Location and configuration of diffusers autoencoders: known names, folders and hub ids."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pid_lightning.encoders.latent_spaces import (
    KNOWN_SPACES,
    QWEN_MEAN,
    QWEN_STD,
    SUPPORTED_CLASSES,
)
from pid_lightning.encoders.pretrained import unreachable_weights


class VAESource(NamedTuple):
    """Location and configuration of an autoencoder."""

    location: str  # hub id or local folder
    subfolder: str | None
    config: Mapping[str, Any]


def _kl(name: str, quant_conv: bool) -> dict[str, Any]:
    """Configuration of an `AutoencoderKL` of Stable Diffusion's architecture with a known space.
    SD3 and FLUX.1 have no convolutions between it and the latents."""
    space = KNOWN_SPACES[name]
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 1024,
        "latent_channels": space.channels,
        "scaling_factor": space.scale[0],
        "shift_factor": space.shift[0],
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
    }


# Configurations of the known names, so that building a network downloads nothing.
KNOWN_VAES: Mapping[str, VAESource] = {
    "sd3": VAESource(
        "stabilityai/stable-diffusion-3-medium-diffusers", "vae", _kl("sd3", quant_conv=False)
    ),
    "flux": VAESource("black-forest-labs/FLUX.1-schnell", "vae", _kl("flux", quant_conv=False)),
    "sdxl": VAESource("stabilityai/sdxl-vae", None, _kl("sdxl", quant_conv=True)),
    "flux2": VAESource(
        "black-forest-labs/FLUX.2-klein-4B",
        "vae",
        {
            "_class_name": "AutoencoderKLFlux2",
            "block_out_channels": [128, 256, 512, 512],
            "latent_channels": 32,
            "batch_norm_eps": 1e-4,
            "patch_size": [2, 2],
        },
    ),
    "qwen": VAESource(
        "Qwen/Qwen-Image",
        "vae",
        {
            "_class_name": "AutoencoderKLQwenImage",
            "z_dim": 16,
            "temperal_downsample": [False, True, True],  # diffusers' spelling
            "latents_mean": list(QWEN_MEAN),
            "latents_std": list(QWEN_STD),
        },
    ),
}


def find_vae(vae: str) -> VAESource:
    """Resolve `vae`; only an unknown hub id is looked up online, for its configuration."""
    if vae in KNOWN_VAES:
        return KNOWN_VAES[vae]
    folder = Path(os.path.expanduser(vae))
    if folder.is_dir():
        return _read_folder(folder)
    if folder.exists() or vae.startswith((".", "~")) or folder.is_absolute() or vae.count("/") != 1:
        raise FileNotFoundError(
            f"vae: {vae!r} is no folder; give a local folder, a hub id (owner/name), the "
            ".safetensors file of an autoencoder trained here, or one of bundled, taef2, "
            f"{', '.join(KNOWN_VAES)}."
        )
    return _read_hub(vae)


def _read_folder(folder: Path) -> VAESource:
    for subfolder in (None, "vae"):
        path = folder / (subfolder or "") / "config.json"
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); copy it again.") from error
        return _supported(VAESource(str(folder), subfolder, config))
    raise FileNotFoundError(
        f"vae: {folder} has neither config.json nor vae/config.json; give the folder of a "
        "diffusers autoencoder or pipeline."
    )


def _read_hub(hub_id: str) -> VAESource:
    from diffusers import AutoencoderKL

    failure: OSError | None = None
    for subfolder in ("vae", None):  # a pipeline's repository, or an autoencoder's
        try:
            config = AutoencoderKL.load_config(hub_id, subfolder=subfolder)
        except OSError as error:
            failure = failure or error
            continue
        return _supported(VAESource(hub_id, subfolder, config))
    raise unreachable_weights(
        f"autoencoder {hub_id!r}",
        f"vae: a local diffusers folder or a known name ({', '.join(KNOWN_VAES)}), which needs no "
        "download of its configuration",
        failure,
    ) from failure


def _supported(source: VAESource) -> VAESource:
    name = source.config.get("_class_name")
    if name not in SUPPORTED_CLASSES:
        raise ValueError(
            f"vae: {source.location} holds a {name}, which is not supported; use one of "
            f"{', '.join(SUPPORTED_CLASSES)}."
        )
    return source
