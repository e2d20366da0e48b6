"""Starting a module from another run's or file's weights, and saying which were taken."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pid_lightning import weights
from pid_lightning.hub import find_model

if TYPE_CHECKING:
    from pid_lightning.modules.base import PiDModule

log = logging.getLogger(__name__)


def initialise_from(module: PiDModule, path: str) -> None:
    """Start from another model: all of it in the same latent space and scale, else its backbone.

    Args:
        module: what starts.
        path: a run's checkpoint, a model file, a folder, a bundled name or a hub id.

    Raises:
        ValueError: a backbone of other sizes, naming where they differ.
        OSError: nothing of that name is here or on the hub.
    """
    source, info = weights.load_model(find_model(path))
    taken = source.state_dict()
    ours = module.denoiser.state_dict()
    if info.latent_space != module.encoder.latent_space or info.scale != module.scale:
        new = ("adapter.", "gates.")
        taken = {k: v for k, v in taken.items() if not k.startswith(new)}
        ours = {k: v for k, v in ours.items() if not k.startswith(new)}
    odd = sorted(ours.keys() ^ taken.keys())
    odd += [k for k in ours if k in taken and ours[k].shape != taken[k].shape]
    if odd:
        told = "; ".join(module.info.differences(info)) or odd[0]
        raise ValueError(f"init_from: {path} is of another network ({told}).")
    # Same shapes, another meaning: a RoPE reference or a prediction can not be seen in tensors.
    unseen = [
        told
        for told in module.info.differences(info)
        if told.startswith(("rope_reference", "prediction"))
    ]
    if unseen:
        log.warning("init_from %s was trained with another %s", path, "; ".join(unseen))
    module.denoiser.load_state_dict(module.denoiser.state_dict() | taken)
    if module.trainer.state.fn != "fit":
        module.student_times = info.student_times
    if module.image_size is None:
        module.image_size = info.image_size
    new = len(module.denoiser.state_dict()) - len(taken)
    log.info(
        "init_from %s: took %d tensors (%s), %d are new (%s)",
        path,
        len(taken),
        "backbone and adapter" if not new else "backbone",
        new,
        "adapter and gates" if new else "none",
    )
