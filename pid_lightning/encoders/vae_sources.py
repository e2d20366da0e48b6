"""Location and configuration of diffusers autoencoders: known names, folders and hub ids."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pid_lightning.checks import Mistake, check_type
from pid_lightning.encoders.latent_spaces import KNOWN_SPACES, SUPPORTED_CLASSES, LatentSpace
from pid_lightning.encoders.pretrained import first_line
from pid_lightning.files.card import BASE_MODELS
from pid_lightning.files.models import REMOVED


class VAESource(NamedTuple):
    """Location and configuration of an autoencoder."""

    location: str  # hub id or local folder
    subfolder: str | None
    config: Mapping[str, Any]
    space: str | None = None  # whose latents a distilled one shares, which it does not state


def _kl(space: LatentSpace, quant_conv: bool) -> dict[str, Any]:
    """Configuration of an `AutoencoderKL` of Stable Diffusion's architecture with a known space.
    SD3 and FLUX.1 have no convolutions between it and the latents."""
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


SD3 = _kl(KNOWN_SPACES["sd3"], quant_conv=False)
FLUX = _kl(KNOWN_SPACES["flux"], quant_conv=False)
SDXL = _kl(KNOWN_SPACES["sdxl"], quant_conv=True)

# Configurations of the known names, so that building a network downloads nothing. Those of FLUX.2
# and Qwen-Image are diffusers' defaults.
KNOWN_VAES: Mapping[str, VAESource] = {
    "sd3": VAESource(BASE_MODELS["sd3"], "vae", SD3),
    "flux": VAESource(BASE_MODELS["flux"], "vae", FLUX),
    "sdxl": VAESource(BASE_MODELS["sdxl"], None, SDXL),
    "flux2": VAESource(BASE_MODELS["flux2"], "vae", {"_class_name": "AutoencoderKLFlux2"}),
    "qwen": VAESource(BASE_MODELS["qwen"], "vae", {"_class_name": "AutoencoderKLQwenImage"}),
}
# Distilled autoencoders of a few million parameters.
TINY_VAES: Mapping[str, VAESource] = {
    name: VAESource(
        f"madebyollin/{name}",
        None,
        {"_class_name": "AutoencoderTiny", "latent_channels": KNOWN_SPACES[space].channels},
        space,
    )
    for name, space in (("taesdxl", "sdxl"), ("taesd3", "sd3"), ("taef1", "flux"))
}


def find_vae(vae: str) -> VAESource:
    """Resolve `vae`; only an unknown hub id is looked up online, for its configuration.

    Raises:
        Mistake: it names no autoencoder whose latent space is known.
    """
    known = KNOWN_VAES.get(vae) or TINY_VAES.get(vae.removeprefix("madebyollin/"))
    if known is not None:
        return known
    if vae == "bundled" or vae.endswith(".safetensors"):
        raise Mistake("vae", f"{vae!r} names {REMOVED}")
    location, reason = os.path.expanduser(vae), ""
    if os.path.isdir(location) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", vae):
        from diffusers import AutoencoderKL

        for subfolder in ("vae", None):  # of a pipeline, or an autoencoder by itself
            try:
                config = AutoencoderKL.load_config(location, subfolder=subfolder)
                check_type("config.json", config, dict[str, Any])
            except Exception as error:  # a damaged configuration leads diffusers to any
                reason = reason or first_line(error)
                continue
            if config.get("_class_name") in SUPPORTED_CLASSES:
                return VAESource(location, subfolder, config)
            reason = f"it holds a {config.get('_class_name')}"
    raise Mistake(
        "vae",
        f"{vae!r} leads to no {', '.join(SUPPORTED_CLASSES)} ({reason or 'no such folder'}); give "
        "the local folder or hub id (owner/name) of one or of its pipeline, or one of taef2, "
        f"{', '.join((*KNOWN_VAES, *TINY_VAES))}.",
    )
