"""Outputs of `pid predict`: a PNG and a JSON for each input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pid_lightning.pictures.files import write_picture
from pid_lightning.pictures.inputs import check_channels
from pid_lightning.pictures.resizing import pad_picture
from pid_lightning.training.data.prediction_inputs import PredictionInputs
from pid_lightning.training.sample import add_evaluation_noise, evaluation_generators

if TYPE_CHECKING:
    from pid_lightning.training.modules.base import PiDModule


class PredictionWriter:
    """Decodes batches and writes PNGs named after their inputs, with a JSON beside each.

    Pictures are padded to whole latent cells and patches, and their outputs cropped back.

    Args:
        module: decodes; its outputs go to `predictions/` in the run's folder.

    Raises:
        ValueError: some inputs are latents of another family.
    """

    def __init__(self, module: PiDModule) -> None:
        self.module = module
        trainer = module.trainer
        loaders, encoder = trainer.predict_dataloaders, module.encoder
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            if isinstance(getattr(loader, "dataset", None), PredictionInputs):
                for path, shape in loader.dataset.latent_shapes.items():
                    check_channels(path, shape, encoder.latent_space, encoder.latent_channels)
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        if trainer.is_global_zero:
            print(f"writing pictures to {self.folder}")

    def write(self, batch: dict[str, Any]) -> list[Path]:
        """Decode one batch of `PredictionInputs`: pictures of one size, or latents.

        Raises:
            FileExistsError: an output would overwrite that of another input, other weights or
                other settings.
        """
        module, settings = self.module, self.module.evaluation
        paths = [self.folder / f"{name}.png" for name in batch["name"]]
        for i, path in enumerate(paths):
            _check_replaceable(path, self._origin(batch, i), self._settings(batch, i))
        numbers, sigma = batch["number"].tolist(), settings.predict_sigma
        if "image" in batch:
            size = batch["image"].shape[-2:]
            # Whole cells for the encoder, whole patches for the output.
            images = pad_picture(batch["image"], module.denoiser.alignment // module.scale)
            latents, text = module.encode(images, batch["caption"])
            training = module.training_settings
            latents, latent_sigma = add_evaluation_noise(latents, sigma, numbers, training)
        else:  # latents may be noisy already; the sigma only states the level
            latents = batch["latents"]
            text = module.text_encoder.encode(batch["caption"])
            latent_sigma = torch.full((len(latents),), sigma, device=latents.device)
            size = tuple(side * module.encoder.latent_stride for side in latents.shape[-2:])
        seed = module.training_settings.seed
        generators = evaluation_generators(seed, "pixels", numbers, module.device)
        height, width = (side * module.scale for side in size)
        pictures = module.decode(latents, latent_sigma, text, generators)[..., :height, :width]
        for i, path in enumerate(paths):
            write_picture(pictures[i], path, self._metadata(batch, i, pictures[i]))
        return paths

    def _origin(self, batch: dict[str, Any], i: int) -> dict[str, str | None]:
        weights = self.module.trainer.ckpt_path or self.module.init_from
        return {"input": batch["path"][i], "weights": weights and str(weights)}

    def _settings(self, batch: dict[str, Any], i: int) -> dict[str, Any]:
        evaluation = self.module.evaluation
        return {
            "caption": batch["caption"][i],
            "seed": self.module.training_settings.seed,
            "latent_sigma": evaluation.predict_sigma,
            "steps": evaluation.steps,
            "guidance_scale": evaluation.guidance_scale,
        }

    def _metadata(self, batch: dict[str, Any], i: int, picture: Tensor) -> dict[str, Any]:
        module = self.module
        return {
            **self._origin(batch, i),
            **self._settings(batch, i),
            "number": int(batch["number"][i]),
            "student_times": module.student_times,
            "size": list(picture.shape[-2:]),
            "family": type(module).__name__,
            "scale": module.scale,
        }


def _check_replaceable(path: Path, origin: dict[str, str | None], settings: dict[str, Any]) -> None:
    """Refuse to overwrite what was not made of the same input and weights with these settings."""
    description = path.with_suffix(".json")
    if not path.exists() and not description.exists():
        return

    def places(told: dict[str, str | None]) -> list[Path]:
        return [Path(str(told[name])).resolve() for name in origin]

    try:
        told = json.loads(description.read_text(encoding="utf-8"))
        is_same = places(told) == places(origin) and settings.items() <= told.items()
    except (OSError, ValueError, KeyError, TypeError):
        is_same = False  # no prediction wrote it
    if not is_same:
        raise FileExistsError(
            f"{path} (or its .json) exists already and was not made of {origin['input']} by "
            f"{origin['weights']} with the same settings: move it away, or rename the input."
        )
