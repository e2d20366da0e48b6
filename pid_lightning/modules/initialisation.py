"""Initialising a module from the weights of another run or file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from pid_lightning.files import models as weights
from pid_lightning.files.hub import find_model

if TYPE_CHECKING:
    from pid_lightning.training.modules.base import PiDModule


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
    if info.latent_space != module.encoder.latent_space or info.scale != module.scale:
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
