"""`pid predict`: the road of `pid decode`, for the network of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from pid_lightning.checks import Mistake
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.failures import Failures, find_unreadable
from pid_lightning.decoding.files import FileDecoder, describe
from pid_lightning.decoding.settings import DecodeSettings
from pid_lightning.encoders.text import TextEncoder
from pid_lightning.pictures.inputs import output_stem
from pid_lightning.training.data.prediction_inputs import PredictionInputs
from pid_lightning.training.settings import Evaluation


class PredictionWriter:
    """Decodes files and writes PNGs named after them, with a JSON beside each.

    A picture is the one that `pid decode` makes of the file with the same model and settings.

    Args:
        decoder: the model.
        text_encoder: of captions; None for a model without them.
        evaluation: steps, guidance and noise level.
        seed: of all noise.
        init_from: where the weights are from, unless the trainer restores a checkpoint.
        trainer: its run's folder gets the results, in `predictions/`; its inputs are checked now
            instead of hours into the run.

    Raises:
        Mistake: a named input is damaged, or holds latents of another family; or all are.
    """

    def __init__(
        self,
        decoder: PiDDecoder,
        text_encoder: TextEncoder | None,
        evaluation: Evaluation,
        seed: int,
        init_from: str | None,
        trainer: Trainer,
    ) -> None:
        decoder.text_encoder = text_encoder
        self.decoder = decoder
        self.settings: DecodeSettings = DecodeSettings(
            sigma=evaluation.predict_sigma,
            steps=evaluation.steps,
            seed=seed,
            guidance_scale=evaluation.guidance_scale,
        )
        weights = trainer.ckpt_path or init_from
        self.description: dict[str, Any] = describe(decoder, weights and str(weights))
        loaders = trainer.predict_dataloaders
        (loader,) = loaders if isinstance(loaders, list) else [loaders]
        inputs: PredictionInputs = loader.dataset
        self.failures: Failures = find_unreadable(decoder, inputs.files, inputs.named)
        self.folder: Path = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        if trainer.is_global_zero:
            print(f"writing pictures to {self.folder}")

    def write(self, batch: dict[str, Any]) -> list[Path]:
        """Decode a batch of `PredictionInputs`, file by file, and return the pictures' paths; of
        those that cannot be decoded see `failures`."""
        paths = []
        for file, caption in zip(map(Path, batch["path"]), batch["caption"], strict=True):
            if file in self.failures.reasons:
                continue
            prompt = None if self.decoder.text_encoder is None else caption
            settings = replace(self.settings, prompt=prompt)
            path = self.folder / f"{output_stem(file)}.png"
            with self.failures.of(file):
                self._check_replaceable(path, file, settings)
                of_files = FileDecoder(self.decoder, settings, self.description, progress=False)
                of_files.decode(file, path)
                paths.append(path)
        return paths

    def _check_replaceable(self, path: Path, file: Path, settings: DecodeSettings) -> None:
        """Refuse to overwrite what was not made of this file by these weights and settings."""
        description = path.with_suffix(".json")
        if not path.exists() and not description.exists():
            return
        try:
            found = json.loads(description.read_text(encoding="utf-8"))
            is_same = Path(found["input"]).resolve() == file.resolve()
            is_same &= found["fingerprint"] == self.description["fingerprint"]
            is_same &= found["settings"] == asdict(settings)
        except (OSError, ValueError, KeyError, TypeError):
            is_same = False  # no prediction wrote it
        if not is_same:
            raise Mistake(
                "inputs",
                f"{path} (or its .json) exists already and was not made of {file} by these weights "
                "with the same settings; move it away, or rename the input.",
            )
