"""Checks a checkpoint against the module that restores it, and adapts both to the stage."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from pid_lightning.files import models as weights
from pid_lightning.files.atomic import replaced_file
from pid_lightning.files.hub import find_model
from pid_lightning.files.models import AVERAGE, METADATA_KEY, ModelInfo
from pid_lightning.files.tensors import read_torch_file

if TYPE_CHECKING:
    from pid_lightning.training.modules.base import PiDModule

# Submodules with pretrained weights, left out of checkpoints.
FROZEN = ("encoder.", "text_encoder.", "teacher.")
CRITICS = ("fake_score.", "discriminator.")  # attached to a module by DMD2
TRAINING_KEY = "pid_training"  # in checkpoints: settings that the optimiser's state holds
OPTIMIZER_SETTINGS = ("optimizer", "train", "learning_rate", "weight_decay")


def check_checkpoint(module: PiDModule, checkpoint: dict[str, Any]) -> ModelInfo:
    """Compare a checkpoint's model description with the module's and return it.

    Raises:
        ValueError: the checkpoint has no description, or that of another model.
    """
    if not isinstance(checkpoint, dict) or METADATA_KEY not in checkpoint:
        raise ValueError(
            "ckpt_path: not a checkpoint of a PiD run (it has no model description); give one "
            "that pid fit wrote."
        )
    theirs = ModelInfo.from_plain(checkpoint[METADATA_KEY])
    differences = module.info.differences(theirs)
    if differences:
        raise ValueError(
            f"ckpt_path: this checkpoint is from another model ({'; '.join(differences)}); "
            "use the config of its run."
        )
    return theirs


def prepare_restoring(module: PiDModule, checkpoint: dict[str, Any]) -> None:
    """Adopt a checkpoint's student times and average, before its tensors are loaded strictly.

    To resume a fit, the callbacks must be those of its run. For evaluation, the average is
    adopted without the EMA callback, and the networks of a distillation are left out.

    Raises:
        ValueError: another model's checkpoint, or a fit with other callbacks.
    """
    theirs = check_checkpoint(module, checkpoint)
    state = checkpoint["state_dict"]
    averaged = any(name.startswith(AVERAGE) for name in state)
    if module._trainer is not None and module.trainer.state.fn == "fit":  # None: loaded by hand
        _check_callbacks(module, theirs.student_times, averaged)
        for name, stored in checkpoint.get(TRAINING_KEY, {}).items():
            set_here = getattr(module.training_settings, name)
            if stored != set_here:
                raise ValueError(
                    f"ckpt_path: training.{name} of this run is {stored}, here {set_here}; set it "
                    f"to {stored} to resume, or start a new run with --model.init_from."
                )
    else:
        ours = module.state_dict()
        critics = {k: v for k, v in ours.items() if k.startswith(CRITICS)}
        checkpoint["state_dict"] = critics | {
            name: tensor
            for name, tensor in state.items()
            if name in ours or name.startswith(AVERAGE)
        }
        if not averaged:
            module.denoiser_ema = None
        elif module.denoiser_ema is None:
            module.denoiser_ema = module.info.build().requires_grad_(False).to(module.device)
    module.has_own_weights = True
    module.student_times = theirs.student_times
    if module.image_size is None:
        module.image_size = theirs.image_size


def forgive_frozen(module: PiDModule, incompatible: Any) -> None:
    """Accept missing frozen networks, which are never in checkpoints."""
    kept = [name for name in incompatible.missing_keys if not name.startswith(FROZEN)]
    incompatible.missing_keys[:] = kept


def _check_callbacks(
    module: PiDModule, student_times: tuple[float, ...] | None, averaged: bool
) -> None:
    ours = module.student_times
    if student_times != ours:
        if ours is None:
            told = "this checkpoint is from DMD2; add the DMD2 callback to resume it."
        elif student_times is None:
            told = "this checkpoint is not from DMD2; give it to DMD2 as the teacher."
        else:
            told = f"its run has student_times {student_times}, DMD2 here {ours}; give it the same."
        raise ValueError(f"ckpt_path: {told}")
    if averaged != (module.denoiser_ema is not None):
        raise ValueError(
            "ckpt_path: this run averaged its weights; add the EMA callback to resume it."
            if averaged
            else "ckpt_path: this run did not average its weights; remove the EMA callback."
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O that never leaves a partial file and never unpickles code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; on failure the file that was at `path` before stays intact.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = Path(path)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            stale.unlink(missing_ok=True)  # left by a process that was killed while saving
        with replaced_file(path) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # a full disk
                raise OSError(error) from error
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, or is not a checkpoint.
        """
        return read_torch_file(path, mapped=False)


def initialise_from(module: PiDModule, path: str) -> None:
    """Load another model: all of it for the same latent space and scale, else its backbone.

    Args:
        module: the module to initialise.
        path: see `find_model`.

    Raises:
        ValueError: the networks' sizes differ, or only the backbone fits and there is no fit to
            train the rest; names the differences.
        OSError: `path` is neither a local model nor on the hub.
    """
    found = find_model(path)
    source, info = weights.load_model(found)
    taken = source.state_dict()
    ours = module.denoiser.state_dict()
    scale = info.geometry.scale
    if info.latent_space != module.encoder.latent_space or scale != module.scale:
        own = ("adapter.", "gates.")
        taken = {k: v for k, v in taken.items() if not k.startswith(own)}
        ours = {k: v for k, v in ours.items() if not k.startswith(own)}
    mismatched = sorted(ours.keys() ^ taken.keys())
    mismatched += [k for k in ours if k in taken and ours[k].shape != taken[k].shape]
    if mismatched:
        details = "; ".join(module.info.differences(info)) or mismatched[0]
        raise ValueError(
            f"init_from: {path} is a different network ({details}); use its model.denoiser."
        )
    new = len(module.denoiser.state_dict()) - len(taken)
    if new and module.trainer.state.fn != "fit":
        raise ValueError(
            f"init_from: {path} is for another latent space or scale "
            f"({'; '.join(module.info.differences(info))}), so its adapter is not used and this "
            "one's is untrained; fit first, or use the config of its family and scale."
        )
    # Differences that the shapes of tensors do not show.
    hidden = ["rope_reference", "prediction"]
    if not new:
        hidden += ["adapter.", "noise_frame"]
    told = [d for d in module.info.differences(info) if d.startswith(tuple(hidden))]
    solves = module.trainer.state.fn != "fit" and info.student_times is None
    if solves and info.time_shift != module.info.time_shift:
        told.append(f"time_shift: {info.time_shift}, here {module.info.time_shift}")
    if told:
        rank_zero_warn(f"init_from: {path} was trained with another {'; '.join(told)}")
    module.denoiser.load_state_dict(module.denoiser.state_dict() | taken)
    module.student_times = None if module.trainer.state.fn == "fit" else info.student_times
    if module.image_size is None:
        module.image_size = info.image_size
    parts = "backbone" if new else "backbone, adapter and gates"
    rest = f"{new} tensors are new (adapter and gates)" if new else "nothing is new"
    rank_zero_info(f"init_from {found}: loaded {len(taken)} tensors ({parts}), {rest}")
