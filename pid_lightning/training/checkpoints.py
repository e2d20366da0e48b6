"""What checkpoints and model files bring to a module: found and checked here, adopted there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.files import models as weights
from pid_lightning.files.atomic import replaced_file
from pid_lightning.files.hub import find_model
from pid_lightning.files.models import AVERAGE, METADATA_KEY, TRAINING_KEY, ModelInfo
from pid_lightning.files.tensors import read_torch_file
from pid_lightning.nn.compilation import plain_name
from pid_lightning.training.settings import Training

# Submodules with pretrained weights, left out of checkpoints.
FROZEN = ("encoder.", "text_encoder.", "distillation.teacher.")


class Found(NamedTuple):
    """What a checkpoint or a model file brings.

    Attributes:
        state: tensors by the names that they have in a module (of a model file: in its denoiser).
        info: its description.
        is_averaged: whether an average is among the tensors.
        optimizer: settings that the state of its optimiser holds; empty if there is none.
        resumes: whether it has the state of an optimiser.
    """

    state: dict[str, Tensor]
    info: ModelInfo
    is_averaged: bool
    optimizer: dict[str, Any]
    resumes: bool = False


def optimizer_settings(training: Training) -> dict[str, Any]:
    """Those settings of a fit that the state of its optimiser holds."""
    names = ("optimizer", "train", "learning_rate", "weight_decay")
    return {name: getattr(training, name) for name in names}


def read_run(ours: ModelInfo, checkpoint: dict[str, Any]) -> Found:
    """What a run's checkpoint brings to a module with this description.

    Raises:
        Mistake: the checkpoint has no description, or that of another model.
    """
    keys = checkpoint.keys() if isinstance(checkpoint, dict) else ()
    if not {METADATA_KEY, "state_dict"} <= set(keys):
        raise Mistake(
            "ckpt_path",
            "not a checkpoint of a PiD run (it has no model description); give one that pid fit "
            "wrote.",
        )
    weights.check_checkpoint("ckpt_path", checkpoint)
    theirs = ModelInfo.from_plain(checkpoint[METADATA_KEY])
    weights.check_space("ckpt_path", "this checkpoint", theirs)
    differences = ours.differences(theirs)
    if differences:
        raise Mistake(
            "ckpt_path",
            f"this checkpoint is from another model ({'; '.join(differences)}); use the config of "
            "its run.",
        )
    # Until version 0.1 the networks of a distillation stood beside the denoiser.
    moved = {
        f"distillation.{name}" if name.startswith(("fake_score.", "discriminator.")) else name: v
        for name, v in ((plain_name(k), v) for k, v in checkpoint["state_dict"].items())
    }
    is_averaged = any(name.startswith(AVERAGE) for name in moved)
    optimizer, resumes = checkpoint.get(TRAINING_KEY, {}), "optimizer_states" in checkpoint
    return Found(moved, theirs, is_averaged, optimizer, resumes)


def check_resumes(
    found: Found, training: Training, student_times: tuple[float, ...] | None, averages: bool
) -> None:
    """Check that a fit can go on from a checkpoint.

    Args:
        found: of `read_run`.
        training: settings of the fit.
        student_times: of the fit's distillation, None without one.
        averages: whether the fit averages its weights.

    Raises:
        Mistake: its run had other callbacks, or other settings that its optimiser keeps; or it
            holds weights only.
    """
    if not found.resumes:
        raise Mistake(
            "ckpt_path",
            "this checkpoint was saved with save_weights_only, so no run can go on from it; start "
            "a new one with --model.init_from.",
        )
    theirs = found.info.student_times
    if theirs != student_times:
        if student_times is None:
            told = "this checkpoint is from DMD2; add the DMD2 callback to resume it."
        elif theirs is None:
            told = "this checkpoint is not from DMD2; give it to DMD2 as the teacher."
        else:
            told = f"its run has student_times {theirs}, DMD2 here {student_times}; give it those."
        raise Mistake("ckpt_path", told)
    if found.is_averaged != averages:
        told = "did not average its weights; remove the EMA callback."
        if found.is_averaged:
            told = "averaged its weights; add the EMA callback to resume it."
        raise Mistake("ckpt_path", f"this run {told}")
    ours = optimizer_settings(training)
    for name, stored in found.optimizer.items():
        if stored != ours.get(name):
            raise Mistake(
                "ckpt_path",
                f"model.training.{name} of this run is {stored}, here {ours.get(name)}; set it to "
                f"{stored} to resume, or start a new run with --model.init_from.",
            )


def read_start(path: str, ours: ModelInfo, denoiser: nn.Module, fits: bool) -> Found:
    """What another model brings to a denoiser: all of it for the same latent space and scale, else
    its backbone.

    Args:
        path: see `find_model`.
        ours: the description of the denoiser.
        denoiser: the network to start; it is not changed.
        fits: whether a fit follows, which trains what is new.

    Raises:
        Mistake: the networks' sizes differ, or only the backbone fits and no fit follows.
        OSError: `path` is neither a local model nor on the hub.
    """
    found = find_model(path)
    source, theirs = weights.load_model(found)
    taken, kept = source.state_dict(), denoiser.state_dict()
    num_tensors = len(kept)
    is_same = theirs.latent_space == ours.latent_space
    is_same = is_same and theirs.geometry.scale == ours.geometry.scale
    if not is_same:
        taken, kept = _backbone(taken), _backbone(kept)
    differences = ours.differences(theirs)
    mismatched = sorted(kept.keys() ^ taken.keys())
    mismatched += [k for k in kept if k in taken and kept[k].shape != taken[k].shape]
    if mismatched:
        details = "; ".join(differences) or mismatched[0]
        raise Mistake(
            "model.init_from", f"{path} is a different network ({details}); use its model.denoiser."
        )
    if not is_same and not fits:
        raise Mistake(
            "model.init_from",
            f"{path} is for another latent space or scale ({'; '.join(differences)}), so its "
            "adapter is not used and this one's is untrained; fit first, or use the config of its "
            "family and scale.",
        )
    # Differences that the shapes of tensors do not show.
    hidden = ("rope_reference", "prediction", *(("adapter.", "noise_frame") if is_same else ()))
    told = [difference for difference in differences if difference.startswith(hidden)]
    if not fits and theirs.student_times is None and theirs.time_shift != ours.time_shift:
        told.append(f"time_shift: {theirs.time_shift}, here {ours.time_shift}")
    if told:
        rank_zero_warn(f"model.init_from: {path} was trained with another {'; '.join(told)}")
    parts, rest = "backbone, adapter and gates", "nothing is new"
    if not is_same:
        parts = "backbone"
        rest = f"{num_tensors - len(taken)} tensors are new (adapter and gates)"
    rank_zero_info(f"model.init_from {found}: loaded {len(taken)} tensors ({parts}), {rest}")
    return Found(taken, theirs, is_averaged=False, optimizer={})


def _backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(("adapter.", "gates."))}


def name_plainly(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Leave out frozen networks, and what `torch.compile` adds to names."""
    for name in [*state]:
        value = state.pop(name)
        if not name.startswith(FROZEN):
            state[plain_name(name)] = value


def name_as_here(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Invert `name_plainly` for the networks that are compiled here."""
    for name, _value in [*module.named_parameters(), *module.named_buffers()]:
        if plain_name(name) != name and plain_name(name) in state:
            state[name] = state.pop(plain_name(name))


def forgive_frozen(module: nn.Module, incompatible: Any) -> None:
    """Accept missing frozen networks, which are never in checkpoints."""
    kept = [name for name in incompatible.missing_keys if not name.startswith(FROZEN)]
    incompatible.missing_keys[:] = kept


def guard_checkpoints(trainer: Trainer) -> None:
    """Give a trainer, its callbacks set up, an `AtomicCheckpointIO` in place of Lightning's own."""
    if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, AtomicCheckpointIO):
        folders = [Path(saver.dirpath) for saver in trainer.checkpoint_callbacks if saver.dirpath]
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(folders)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O that never leaves a partial file, never unpickles code and removes nothing but
    checkpoint files of its own run.

    Args:
        folders: where this run keeps its checkpoints. Lightning removes what the state of
            `ModelCheckpoint` names, which comes from the file that a run resumes.
    """

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        super().__init__()
        self.folders = folders

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; on failure the file that was at `path` before stays intact.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = Path(path)
        with replaced_file(path) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # a full disk
                raise OSError(error) from error
            file.flush()
            os.fsync(file.fileno())

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint file that lies in `folders`; leave anything else, with a warning."""
        path, resolved = Path(path), Path(path).resolve()
        is_ours = any(resolved.is_relative_to(folder.resolve()) for folder in self.folders)
        if path.suffix == ".ckpt" and resolved.is_file() and is_ours:
            path.unlink()
        elif path.exists():
            rank_zero_warn(f"{path} is no checkpoint file of this run, so it is not removed.")

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, or is not a checkpoint.
        """
        return read_torch_file(path, mapped=False)
