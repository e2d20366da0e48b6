"""Published weights and this package's model files: each from the other; nothing is guessed or
executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pid_lightning.checks import Mistake, check_choice
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files.atomic import make_folder, replaced_file
from pid_lightning.files.models import ModelInfo, check_model_path, save_model
from pid_lightning.files.published_layout import first_names, from_published, to_published
from pid_lightning.files.tensors import read_tensors, read_torch_file
from pid_lightning.nn import AdapterConfig, Geometry, PiD, PiDConfig
from pid_lightning.nn.changes import check_allowed

NETWORK, AVERAGED = "net.", "net_ema."
BACKBONE = "core."  # of PixelDiT's text-to-image weights
IGNORED = ("fake_score.", "discriminator.", "_repa_projector.")
ADAPTER = ("lq_proj.", "pit_lq_gate.")

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


# The latent families that weights were published for; the shapes of tensors do not identify them.
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


def import_published(
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

    PixelDiT's text-to-image weights, which have no adapter, get an untrained one: a teacher to
    start a training from.

    Args:
        path: the published ``.pth`` or ``.safetensors``: a flat dict of tensors.
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
    published = read_published(path, AVERAGED if ema else NETWORK)
    _check_kind(published, family, version)
    make_folder("out", Path(out).parent)
    is_backbone = not any(name.startswith(ADAPTER) for name in published)
    # Only some files hold the RGB head, which is used in training alone.
    with_rgb_head = any("lq_aux_rgb_head" in name for name in published)
    info = replace(
        published_info(family, version, with_rgb_head),
        image_size=image_size,
        student_times=None if is_backbone or student_times is None else tuple(student_times),
    )
    with torch.device("meta"):
        denoiser = info.build()
    if is_backbone:
        empty = {k: v for k, v in to_published(denoiser).items() if k.startswith(ADAPTER)}
        from_published(published | empty, denoiser)  # refuses others before memory is taken
        published |= _untrained_adapter(info, next(iter(published.values())).dtype)
    denoiser.load_state_dict(from_published(published, denoiser), assign=True)
    save_model(denoiser, info, out, denoiser.dtype)
    return info


def _untrained_adapter(info: ModelInfo, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors under the published names, equal for every run of this function."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tensors = to_published(info.build())
    return {name: w.to(dtype) for name, w in tensors.items() if name.startswith(ADAPTER)}


def export_published(
    denoiser: PiD, info: ModelInfo, path: str | Path, dtype: torch.dtype
) -> tuple[str, str]:
    """Write a network in the authors' layout, prefixed ``net.``, for programs that read theirs.

    The file states neither family, version nor sampling times; its reader has to be told.

    Args:
        denoiser: the network.
        info: its metadata.
        path: destination, ending in ``.pth`` or ``.safetensors``.
        dtype: type to store the weights in.

    Returns:
        The family and version to read it as.

    Raises:
        Mistake: another suffix, a network changed for inference, or one with anything that this
            layout cannot hold.
    """
    from safetensors.torch import save_file

    check_choice("suffix", Path(path).suffix, (".pth", ".safetensors"))
    check_allowed(denoiser.changes, "save")
    family, version = _published_as(info)
    tensors = {
        f"{NETWORK}{name}": tensor.detach().to("cpu", dtype).clone().contiguous()
        for name, tensor in to_published(denoiser).items()
    }
    with replaced_file(path) as temporary:
        save = torch.save if Path(path).suffix == ".pth" else save_file
        save(tensors, temporary)
    return family, version


def _published_as(info: ModelInfo) -> tuple[str, str]:
    """The published family and version that a network is one of."""
    families = [k for k, known in FAMILIES.items() if known.latent_space == info.latent_space]
    if not families:
        raise Mistake(
            "layout",
            f"{info.latent_space} latents are of no published family ({', '.join(FAMILIES)}); "
            "export without --layout.",
        )
    lacking = {}
    for version in VERSIONS:
        adapter = info.config.adapter
        known = published_info(families[0], version, adapter.rgb_head)
        # Where the training-only head reads is in no file, and changes no picture.
        there = replace(known.config.adapter, rgb_head_block=adapter.rgb_head_block)
        known = replace(known, config=replace(known.config, adapter=there))
        lacking[version] = info.differences(known)
    version = min(lacking, key=lambda version: len(lacking[version]))
    if info.student_times not in (None, STUDENT_TIMES):
        lacking[version].append(f"student_times: {STUDENT_TIMES}, here {info.student_times}")
    if info.student_times is None and info.time_shift is not None:
        lacking[version].append(f"time_shift: by the size, here {info.time_shift}")
    differing = "; ".join(lacking[version])
    if differing:
        raise Mistake(
            "layout",
            f"that of {version} cannot hold this network ({differing}); train one with its sizes "
            "and options, or export without --layout.",
        )
    return families[0], version


def published_info(family: str, version: str, with_rgb_head: bool) -> ModelInfo:
    """The description of published students."""
    config = VERSIONS[version]
    adapter = replace(config.adapter, unpack=_unpack(family, version), rgb_head=with_rgb_head)
    return replace(FAMILIES[family], config=replace(config, adapter=adapter))


def read_published(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """Read the tensors under a prefix, without it, of a published file, memory-mapped.

    Tensors under no known prefix keep their names. Where there are none under ``net.``, those of
    PixelDiT are taken.

    Raises:
        OSError: no such file.
        Mistake: the file holds no tensors under the prefix.
    """
    is_safe = Path(path).suffix.lower() == ".safetensors"
    held = read_tensors(path) if is_safe else read_torch_file(path)
    held = held if isinstance(held, dict) else {}
    held = held["state_dict"] if isinstance(held.get("state_dict"), dict) else held
    held = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    found = {known for known in (NETWORK, BACKBONE) if any(k.startswith(known) for k in held)}
    if prefix == NETWORK and found == {BACKBONE}:
        prefix = BACKBONE
    if not any(name.startswith(prefix) for name in held):
        groups = sorted({name.split(".")[0] + "." for name in held})
        raise Mistake(
            "published",
            f"{path} holds no tensors under {prefix}, only under {first_names(groups)}; take the "
            "published .pth, and add or drop --ema.",
        )
    others = {NETWORK, AVERAGED, *IGNORED} - {prefix}
    kept = {k: v for k, v in held.items() if not k.startswith(tuple(others))}
    return {name.removeprefix(prefix): tensor for name, tensor in kept.items()}


def _check_kind(published: Mapping[str, Tensor], family: str, version: str) -> None:
    """Refuse a version or family that the tensors' shapes contradict, naming the right ones."""
    gate = published.get("lq_proj.gate_modules.0.content_proj.weight")
    stem = published.get("lq_proj.latent_proj.0.weight")
    if gate is None or stem is None:
        return  # a network of another kind, told by its names
    found = "v1.5" if gate.shape[:1] == (1,) else "v1"
    channels = stem.shape[1:2].numel()
    fitting = [name for name in FAMILIES if _stem_channels(name, found) == channels]
    if version != found or family not in fitting:
        raise Mistake(
            "family" if version == found else "version",
            f"these are {found} weights for latents of {channels} channels, which is "
            f"{' or '.join(fitting) or 'no known family'} {found}, not {family} {version}.",
        )


def _stem_channels(family: str, version: str) -> int:
    return FAMILIES[family].geometry.latent_channels // _unpack(family, version) ** 2


def _unpack(family: str, version: str) -> int:
    """Side of the packing of FLUX.2's latents, which v1.5's adapter undoes."""
    return 2 if (family, version) == ("flux2", "v1.5") else 1
