"""Checks a checkpoint against the module that restores it, and adapts both to the stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pid_lightning.files.models import AVERAGE, METADATA_KEY, ModelInfo

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
