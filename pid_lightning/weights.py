"""Files of weights: one self-describing `.safetensors` a model, and what a training checkpoint says
of itself. Loaded strictly, written to a temporary name and moved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pid_lightning.fixed_times import has_fixed_times
from pid_lightning.nn import AdapterConfig, PiD, PiDConfig
from pid_lightning.pictures import replaced_file
from pid_lightning.quantisation import is_quantised

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
METADATA_KEY = "pid"  # of a safetensors file's metadata and of a training checkpoint


@dataclass(frozen=True)
class ModelInfo:
    """What a file must say so that nobody has to guess: geometry, latents, how to sample.

    Attributes:
        family: name of the LightningModule that trained it, e.g. ``"VAEPiD"``.
        encoder: arguments that build the encoder again, plain values.
        latent_space: name of the latent space, e.g. ``"flux"``.
        latent_channels, latent_stride, scale: geometry, see `nn.PiD`.
        image_size: side of the outputs it was trained on, None when unknown.
        latent_sigma_max: highest noise level of the latents it was trained on.
        noise_frame: frame of that noise, see `noising.add_latent_noise`.
        student_times: times of a distilled student; None for a teacher.
        time_shift: shift of the training times, the solver's too; None follows the size.
        config: sizes of the network.
    """

    family: str
    encoder: dict[str, Any]
    latent_space: str
    latent_channels: int
    latent_stride: int
    scale: int
    image_size: int | None
    latent_sigma_max: float
    noise_frame: str
    student_times: tuple[float, ...] | None
    config: PiDConfig
    time_shift: float | None = None

    def to_plain(self) -> dict[str, Any]:
        """As plain values, for JSON and for `weights_only` checkpoints."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ModelInfo:
        """The inverse of `to_plain`."""
        config = dict(plain["config"])
        reference = config["rope_reference"]
        config["rope_reference"] = tuple(reference) if reference is not None else None
        config["adapter"] = AdapterConfig(**config["adapter"])
        times = plain["student_times"]
        return cls(
            **{
                **plain,
                "config": PiDConfig(**config),
                "student_times": tuple(times) if times is not None else None,
            }
        )

    def build(self) -> PiD:
        """The untrained network."""
        return PiD(self.config, self.latent_channels, self.latent_stride, self.scale)

    def differences(self, other: ModelInfo) -> list[str]:
        """Where another model's weights would not mean the same, as "name: theirs, here ours"."""
        names = ("family", "latent_space", "latent_channels", "latent_stride", "scale", "config")
        told = []
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            if name == "config":
                told += _config_differences(ours, theirs)
            elif ours != theirs:
                told.append(f"{name}: {theirs}, here {ours}")
        return told


def _config_differences(ours: PiDConfig, theirs: PiDConfig) -> list[str]:
    ours, theirs = dataclasses.asdict(ours), dataclasses.asdict(theirs)
    ours |= {f"adapter.{k}": v for k, v in ours.pop("adapter").items()}
    theirs |= {f"adapter.{k}": v for k, v in theirs.pop("adapter").items()}
    return [f"{k}: {theirs[k]}, here {v}" for k, v in ours.items() if theirs[k] != v]


def save_model(
    denoiser: PiD, info: ModelInfo, path: str | Path, dtype: torch.dtype, description: str = ""
) -> None:
    """Write one self-describing file.

    Args:
        denoiser: the network.
        info: what it is.
        path: where, ending in ``.safetensors``.
        dtype: type of the stored weights.
        description: words for whoever opens the file: how it was trained, on what, its licence.

    Raises:
        ValueError: another suffix, or weights in 8 bits or for fixed times.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the file's name must end in .safetensors.")
    if any(map(is_quantised, denoiser.parameters())):
        raise ValueError(f"{path}: weights in 8 bits are not saved; save the network they came of.")
    if has_fixed_times(denoiser):
        raise ValueError(f"{path}: times are fixed, part of the weights is gone; save before.")
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in denoiser.state_dict().items()}
    told = {METADATA_KEY: json.dumps(info.to_plain())}
    if description:
        told["description"] = description
    with replaced_file(path) as temporary:
        save_file(state, temporary, metadata=told)


def load_model(path: str | Path) -> tuple[PiD, ModelInfo]:
    """A network and what it is, from our `.safetensors` or a training checkpoint (`.ckpt`).

    Of a checkpoint the averaged weights are taken where it has them. The weights keep the type
    they are stored in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is neither, is cut short, or does not match its own description.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, plain = _read_safetensors(path)
    else:
        checkpoint = read_checkpoint(path)
        state, plain = denoiser_state(checkpoint), checkpoint[METADATA_KEY]
    try:
        info = ModelInfo.from_plain(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes itself in a way unknown here: {error}.") from error
    with torch.device("meta"):
        denoiser = info.build()
    try:
        denoiser.load_state_dict(state, assign=True)
    except RuntimeError as error:
        first = str(error).split("\n\t", 1)[-1].split("\n")[0]
        raise ValueError(f"{path} does not match its own description: {first}") from error
    return denoiser, info


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    _check_exists(path)
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or not a safetensors file: {error}.") from error
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} does not describe itself (no {METADATA_KEY!r} metadata): it was not written "
            "by pid_lightning."
        )
    try:
        return state, json.loads(metadata[METADATA_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} describes itself in a way unknown here: {error}.") from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A training checkpoint, on the CPU, its tensors mapped from the file rather than read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is cut short, or that no run of this package wrote.
    """
    path = Path(path)
    _check_exists(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read, it is cut short or not a checkpoint; take an earlier one."
        ) from error
    if not isinstance(checkpoint, dict) or not {METADATA_KEY, "state_dict"} <= checkpoint.keys():
        raise ValueError(
            f"{path} is not a checkpoint of a PiD run (it does not describe itself); released "
            "weights become a model file by `pid import`."
        )
    return checkpoint


def denoiser_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The denoiser's tensors of a checkpoint, averaged ones where there are any."""
    state = checkpoint["state_dict"]
    averaged = any(name.startswith("denoiser_ema.") for name in state)
    prefix = "denoiser_ema." if averaged else "denoiser."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def fingerprint(denoiser: PiD) -> str:
    """A short name of a network's weights, the same in every type they can be stored in exactly."""
    digest = hashlib.sha256()
    for name, tensor in sorted(denoiser.state_dict().items()):
        values = (tensor.dequantize() if is_quantised(tensor) else tensor.detach()).flatten()
        some = values[:: max(1, len(values) // 64)].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name a .safetensors model or a .ckpt.")
