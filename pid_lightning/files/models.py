"""Model files: one self-describing `.safetensors` per model, and the metadata of checkpoints.

Loading is strict; files are written to a temporary name and moved into place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pid_lightning.checks import (
    Mistake,
    check_at_least,
    check_between,
    check_fields,
    check_type,
)
from pid_lightning.diffusion.noising import Frame
from pid_lightning.diffusion.sampling import check_student_times
from pid_lightning.files.atomic import replaced_file
from pid_lightning.files.tensors import (
    building_at_most,
    check_weights,
    opened_safetensors,
    read_tensors,
    read_torch_file,
)
from pid_lightning.nn import AdapterConfig, Geometry, PiD, PiDConfig
from pid_lightning.nn.changes import check_allowed
from pid_lightning.nn.compilation import plain_name
from pid_lightning.nn.quantisation import is_quantised

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
METADATA_KEY = "pid"  # in safetensors metadata and in training checkpoints
REMOVED = (  # end of a sentence
    "the small autoencoder of version 0.1, which is gone; use FLUX.2's latents (vae: taef2), and "
    "the bundled model or one trained on them."
)
LONGEST_DESCRIPTION = 2**16  # characters; ours have a thousand
Plain = str | int | float | bool | None
TRAINING_KEY = "pid_training"  # in checkpoints: settings that the optimiser's state holds
PARTS = {  # of a training checkpoint
    "state_dict": dict[str, Tensor],
    TRAINING_KEY: dict[str, Plain],
    "optimizer_states": list[dict[str, Any]],
    "lr_schedulers": list[dict[str, Any]],
    "loops": dict[str, Any],
    "callbacks": dict[str, Any],
    "epoch": int,
    "global_step": int,
}
AVERAGE = "denoiser_ema."  # prefix of the averaged tensors in training checkpoints


@dataclass(frozen=True)
class ModelInfo:
    """What a model file states about itself: geometry, latent space and how to sample it.

    Attributes:
        family: name of the LightningModule that trained it, e.g. ``"VAEPiD"``.
        encoder: plain arguments that rebuild the encoder.
        latent_space: name of the latent space, e.g. ``"flux"``.
        geometry: the latents and the scale; plain values hold its three numbers flat.
        image_size: side in pixels of the training outputs, None if unknown.
        latent_sigma_max: highest latent noise level seen in training.
        noise_frame: frame of that noise, see `noising.add_latent_noise`.
        student_times: sampling times of a distilled student; None for a teacher.
        time_shift: shift of training and solver times; None derives it from the output size.
        config: network sizes.

    Raises:
        Mistake: a value of another type, or out of range.
    """

    family: str
    encoder: dict[str, Plain | list[Plain]]
    latent_space: str
    geometry: Geometry
    image_size: int | None
    latent_sigma_max: float
    noise_frame: Frame
    student_times: tuple[float, ...] | None
    config: PiDConfig
    time_shift: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_between("latent_sigma_max", self.latent_sigma_max, 0, 1)
        if self.image_size is not None:
            check_at_least("image_size", self.image_size, 1)
        if self.student_times is not None:
            check_student_times("student_times", self.student_times)
        if self.time_shift is not None and self.time_shift <= 0:
            raise Mistake("time_shift", f"{self.time_shift} must be above 0.")

    def to_plain(self) -> dict[str, Any]:
        """Convert to plain values, for JSON and `weights_only` checkpoints."""
        plain = dataclasses.asdict(self)
        return json.loads(json.dumps(plain | plain.pop("geometry")))

    @classmethod
    def from_plain(cls, plain: str | Mapping[str, Any]) -> ModelInfo:
        """Invert `to_plain`, or read its JSON.

        Raises:
            Mistake: a newer version's description, or a damaged one.
        """
        try:
            if isinstance(plain, str):
                check_between("its characters", len(plain), 2, LONGEST_DESCRIPTION)
                plain = json.loads(plain)
            check_type("it", plain, dict[str, Any])
            check_type("config", plain["config"], dict[str, Any])
            config = plain["config"] | {
                "rope_reference": _as_tuple(plain["config"]["rope_reference"]),
                "adapter": AdapterConfig(**plain["config"]["adapter"]),
            }
            names = [field.name for field in dataclasses.fields(Geometry)]
            known = {
                "geometry": Geometry(*(plain[name] for name in names)),
                "config": PiDConfig(**config),
                "student_times": _as_tuple(plain["student_times"]),
            }
            rest = {name: value for name, value in plain.items() if name not in names}
            return cls(**rest | known)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise Mistake(
                "metadata", f"not of this version of pid_lightning ({error}); update it."
            ) from error

    def build(self) -> PiD:
        """Build the network, untrained."""
        return PiD(self.config, self.geometry)

    def differences(self, other: ModelInfo) -> list[str]:
        """List what makes another model's weights incompatible, as "name: theirs, here ours"."""
        ours, theirs = self._defining(), other._defining()
        return [f"{k}: {theirs[k]}, here {v}" for k, v in ours.items() if theirs[k] != v]

    def _defining(self) -> dict[str, Any]:
        """All values that weights depend on, under flat names."""
        values = {"family": self.family, "latent_space": self.latent_space}
        values |= dataclasses.asdict(self.geometry) | {"noise_frame": self.noise_frame}
        values |= dataclasses.asdict(self.config)
        return values | {f"adapter.{k}": v for k, v in values.pop("adapter").items()}


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def save_model(
    denoiser: PiD, info: ModelInfo, path: str | Path, dtype: torch.dtype, description: str = ""
) -> None:
    """Write a self-describing model file.

    Args:
        denoiser: the network.
        info: its metadata.
        path: destination, ending in ``.safetensors``.
        dtype: type to store the weights in.
        description: free text for the file's metadata: training, data, licence.

    Raises:
        Mistake: another suffix, a network changed for inference (see `nn.changes`), or weights
            that are not finite in `dtype`.
    """
    from safetensors.torch import save_file

    check_model_path(path)
    check_allowed(denoiser.changes, "save")
    state = denoiser.state_dict()
    state = {plain_name(k): v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    check_weights(state, "take an earlier checkpoint of the run, or another dtype")
    metadata = {METADATA_KEY: json.dumps(info.to_plain())}
    if description:
        metadata["description"] = description
    with replaced_file(path) as temporary:
        save_file(state, temporary, metadata=metadata)


def check_model_path(path: str | Path) -> None:
    """Raise `Mistake` unless a model file can have this name."""
    if Path(path).suffix != ".safetensors":
        raise Mistake("path", f"{path} must end in .safetensors.")


def load_model(path: str | Path) -> tuple[PiD, ModelInfo]:
    """Load a network and its metadata from a model file or a training checkpoint (`.ckpt`).

    Averaged weights are preferred where a checkpoint has them. Weights keep their stored type.

    Raises:
        OSError: no such file.
        Mistake: the file is neither, is truncated, does not match its own description, or is for
            latents that are gone.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        with opened_safetensors(path) as file:
            plain = (file.metadata() or {}).get(METADATA_KEY)
        _check_described(path, plain is not None)
        state = read_tensors(path)
    else:
        checkpoint = read_checkpoint(path)
        state, plain = denoiser_state(checkpoint), checkpoint[METADATA_KEY]
    try:
        info = ModelInfo.from_plain(plain)
        check_weights(state, "take another copy", one_dtype=True)
        with torch.device("meta"), building_at_most(len(state)):
            denoiser = info.build()
        denoiser.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError) as error:
        first = getattr(error, "sentence", str(error)).split("\n\t", 1)[-1].split("\n")[0]
        raise Mistake(
            "path", f"{path} does not match its own metadata ({first}): take another copy."
        ) from error
    check_space("path", str(path), info)
    return denoiser, info


def check_space(option: str, source: str, info: ModelInfo) -> None:
    """Raise `Mistake` if the autoencoder of a model's latents is gone."""
    if info.latent_space.startswith("pid-small"):
        raise Mistake(option, f"{source} is for latents of {REMOVED}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint to the CPU, its tensors memory-mapped.

    Raises:
        OSError: no such file.
        Mistake: the file is truncated, or no run of this package wrote it.
    """
    checkpoint = read_torch_file(path)
    is_dictionary = isinstance(checkpoint, dict)
    _check_described(path, is_dictionary and {METADATA_KEY, "state_dict"} <= checkpoint.keys())
    check_checkpoint("path", checkpoint)
    return checkpoint


def check_checkpoint(option: str, checkpoint: Mapping[str, Any]) -> None:
    """Raise `Mistake` if a part of a training checkpoint is of another type than Lightning's."""
    for name, kind in PARTS.items():
        try:
            check_type(name, checkpoint.get(name, kind()), kind)
        except Mistake as error:
            told = f"this checkpoint is damaged, its {error.option}: {error.sentence}"
            raise Mistake(option, told) from error


def _check_described(path: str | Path, is_described: bool) -> None:
    if not is_described:
        raise Mistake(
            "path",
            f"{path} has no {METADATA_KEY!r} metadata, so no run of this package wrote it; convert "
            "published weights with `pid import`.",
        )


def denoiser_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Select the denoiser's tensors of a checkpoint, the averaged ones where present."""
    state = checkpoint["state_dict"]
    prefix = AVERAGE if any(name.startswith(AVERAGE) for name in state) else "denoiser."
    taken = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {plain_name(name): value for name, value in taken.items()}


def fingerprint(denoiser: PiD) -> str:
    """Short hash of a sample of every weight tensor, which tells trained networks apart; the same
    in every dtype that holds the weights exactly."""
    digest = hashlib.sha256()
    for name, tensor in sorted(denoiser.state_dict().items()):
        values = (tensor.dequantize() if is_quantised(tensor) else tensor.detach()).flatten()
        some = values[:: max(1, len(values) // 64)].float().cpu()
        digest.update(plain_name(name).encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
