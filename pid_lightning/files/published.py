"""Convert published weights to a self-describing model file; nothing is guessed or executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pid_lightning.checks import check_choice
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
        FileNotFoundError: no such file.
        ValueError: the file is no dict of tensors or asks for code to be run (none is), or its
            tensors are not exactly those of this family and version.
    """
    check_choice("family", family, FAMILIES)
    check_choice("version", version, VERSIONS)
    check_model_path(out)
    released = _without_prefix(read_released(path), AVERAGED if ema else NETWORK, path)
    _check_kind(released, family, version, path)
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
    try:
        state = from_released(released, denoiser)
    except ValueError as error:
        raise ValueError(f"{path} as {family} {version}: {error}") from error
    denoiser.load_state_dict(state, assign=True)
    save_model(denoiser, info, out, denoiser.dtype)
    return info


def released_info(family: str, version: str, with_rgb_head: bool) -> ModelInfo:
    """The description of released students."""
    config = VERSIONS[version]
    adapter = replace(config.adapter, unpack=_unpack(family, version), rgb_head=with_rgb_head)
    return replace(FAMILIES[family], config=replace(config, adapter=adapter))


def read_released(path: str | Path) -> dict[str, Tensor]:
    """Read a flat dict of tensors, memory-mapped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds anything else.
    """
    released = read_torch_file(path)
    flat = isinstance(released, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in released.items()
    )
    if not flat:
        raise ValueError(
            f"{path} is not the flat dict of tensors that was published; take the published .pth."
        )
    return released


def _without_prefix(
    released: dict[str, Tensor], prefix: str, path: str | Path
) -> dict[str, Tensor]:
    taken = {k.removeprefix(prefix): v for k, v in released.items() if k.startswith(prefix)}
    if not taken:
        held = first_names(sorted({name.split(".")[0] + "." for name in released}))
        raise ValueError(
            f"{path} holds no tensors under {prefix}, only {held}; add "
            "or drop --ema, or take the published file."
        )
    strange = [k for k in released if not k.startswith((NETWORK, AVERAGED, *IGNORED))]
    if strange:
        raise ValueError(
            f"{path} holds {len(strange)} tensors besides the released ones, the first is "
            f"{strange[0]}; take the published file."
        )
    return taken


def _check_kind(
    released: Mapping[str, Tensor],
    family: str,
    version: str,
    path: str | Path,
) -> None:
    """Refuse a version or family that the tensors' shapes contradict, naming the right ones."""
    gate = released.get("lq_proj.gate_modules.0.content_proj.weight")
    if gate is not None:
        found = "v1.5" if gate.shape[0] == 1 else "v1"
        if found != version:
            raise ValueError(
                f"{path} holds {found} weights (their gates are one value a "
                f"{'token' if found == 'v1.5' else 'channel'}), not {version}: give {found}."
            )
    stem = released.get("lq_proj.latent_proj.0.weight")
    wanted = _stem_channels(family, version)
    if stem is not None and stem.shape[1] != wanted:
        fitting = [name for name in FAMILIES if _stem_channels(name, version) == stem.shape[1]]
        raise ValueError(
            f"{path} reads latents of {stem.shape[1]} channels, but {family} {version} has "
            f"{wanted}: it fits {' or '.join(fitting) or 'no known family'}."
        )


def _stem_channels(family: str, version: str) -> int:
    return FAMILIES[family].geometry.latent_channels // _unpack(family, version) ** 2


def _unpack(family: str, version: str) -> int:
    """Side of the packing of FLUX.2's latents, which v1.5's adapter undoes."""
    return 2 if (family, version) == ("flux2", "v1.5") else 1
