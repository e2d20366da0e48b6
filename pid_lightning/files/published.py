"""Convert published weights to a self-describing model file; nothing is guessed or executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pid_lightning.checks import Mistake, check_choice
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files.atomic import make_folder
from pid_lightning.files.models import ModelInfo, check_model_path, save_model
from pid_lightning.files.published_layout import first_names, from_released
from pid_lightning.files.tensors import read_torch_file
from pid_lightning.nn import AdapterConfig, Geometry, PiDConfig

NETWORK, AVERAGED = "net.", "net_ema."
IGNORED = ("fake_score.", "discriminator.")

VERSIONS = {
    "v1": PiDConfig(learned_null=False),
    "v1.5": PiDConfig(
        learned_null=False,
        rope_reference=(2048, 2048),
        adapter=AdapterConfig(width=1024, gate="token", padding="replicate", inject_pixels=True),
    ),
}
FLUX = ModelInfo(
    family="VAEPiD",
    encoder={"vae": "flux", "pretrained": True},
    latent_space="flux",
    geometry=Geometry(latent_channels=16, latent_stride=8, scale=4),
    image_size=2048,
    latent_sigma_max=0.8,
    noise_frame="flow",
    student_times=STUDENT_TIMES,
    config=VERSIONS["v1"],
)


def _vae(name: str, geometry: Geometry, **changes: Any) -> ModelInfo:
    encoder = {"vae": name, "pretrained": True}
    return replace(FLUX, encoder=encoder, latent_space=name, geometry=geometry, **changes)


# The latent families that weights were released for; the shapes of tensors do not identify them.
FAMILIES: dict[str, ModelInfo] = {
    "flux": FLUX,
    "sd3": _vae("sd3", FLUX.geometry),
    "flux2": _vae("flux2", Geometry(128, 16, 4)),
    "sdxl": _vae("sdxl", Geometry(4, 8, 4), noise_frame="variance_preserving"),
    "qwen": _vae("qwen", FLUX.geometry),
    "dinov2": replace(
        FLUX,
        family="DINOv2PiD",
        encoder={},
        latent_space="dinov2",
        geometry=Geometry(768, 16, 4),
    ),
    "siglip": replace(
        FLUX,
        family="SigLIPPiD",
        encoder={},
        latent_space="siglip2",
        geometry=Geometry(1152, 16, 8),
    ),
}


def import_released(
    path: str | Path,
    out: str | Path,
    family: str,
    version: str,
    *,
    ema: bool = False,
    image_size: int = 2048,
    student_times: Sequence[float] | None = STUDENT_TIMES,
) -> ModelInfo:
    """Write a model file from published weights, in their stored dtype (that of the patch
    embedding, should a file mix several).

    Args:
        path: the published ``.pth``: a flat dict of tensors.
        out: the ``.safetensors`` to write.
        family: latent family, one of `FAMILIES`.
        version: ``"v1"`` or ``"v1.5"``.
        ema: take ``net_ema.`` instead of ``net.``.
        image_size: side in pixels of the training outputs.
        student_times: sampling times of a distilled student; None for a teacher.

    Raises:
        OSError: no such file, or `out` cannot be written.
        Mistake: the file is no dict of tensors or asks for code to be run (none is), or its
            tensors are not exactly those of this family and version.
    """
    check_choice("family", family, FAMILIES)
    check_choice("version", version, VERSIONS)
    check_model_path(out)
    released = read_released(path, AVERAGED if ema else NETWORK)
    _check_kind(released, family, version)
    make_folder("out", Path(out).parent)
    # Only some files hold the RGB head, which is used in training alone.
    with_rgb_head = any("lq_aux_rgb_head" in name for name in released)
    info = replace(
        released_info(family, version, with_rgb_head),
        image_size=image_size,
        student_times=None if student_times is None else tuple(student_times),
    )
    with torch.device("meta"):
        denoiser = info.build()
    denoiser.load_state_dict(from_released(released, denoiser), assign=True)
    save_model(denoiser, info, out, denoiser.dtype)
    return info


def released_info(family: str, version: str, with_rgb_head: bool) -> ModelInfo:
    """The description of released students."""
    config = VERSIONS[version]
    adapter = replace(config.adapter, unpack=_unpack(family, version), rgb_head=with_rgb_head)
    return replace(FAMILIES[family], config=replace(config, adapter=adapter))


def read_released(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """Read the tensors under a prefix, without it, of a published file, memory-mapped.

    Tensors under no known prefix keep their names.

    Raises:
        OSError: no such file.
        Mistake: the file holds no tensors under the prefix.
    """
    held = read_torch_file(path)
    held = held if isinstance(held, dict) else {}
    held = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    if not any(name.startswith(prefix) for name in held):
        groups = sorted({name.split(".")[0] + "." for name in held})
        raise Mistake(
            "released",
            f"{path} holds no tensors under {prefix}, only under {first_names(groups)}; take the "
            "published .pth, and add or drop --ema.",
        )
    others = {NETWORK, AVERAGED, *IGNORED} - {prefix}
    kept = {k: v for k, v in held.items() if not k.startswith(tuple(others))}
    return {name.removeprefix(prefix): tensor for name, tensor in kept.items()}


def _check_kind(released: Mapping[str, Tensor], family: str, version: str) -> None:
    """Refuse a version or family that the tensors' shapes contradict, naming the right ones."""
    gate = released.get("lq_proj.gate_modules.0.content_proj.weight")
    stem = released.get("lq_proj.latent_proj.0.weight")
    if gate is None or stem is None:
        return  # a network of another kind, told by its names
    found = "v1.5" if gate.shape[0] == 1 else "v1"
    fitting = [name for name in FAMILIES if _stem_channels(name, found) == stem.shape[1]]
    if version != found or family not in fitting:
        raise Mistake(
            "family" if version == found else "version",
            f"these are {found} weights for latents of {stem.shape[1]} channels, which is "
            f"{' or '.join(fitting) or 'no known family'} {found}, not {family} {version}.",
        )


def _stem_channels(family: str, version: str) -> int:
    return FAMILIES[family].geometry.latent_channels // _unpack(family, version) ** 2


def _unpack(family: str, version: str) -> int:
    """Side of the packing of FLUX.2's latents, which v1.5's adapter undoes."""
    return 2 if (family, version) == ("flux2", "v1.5") else 1
