"""What `pid predict` writes: a PNG and a JSON for each input."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pid_lightning.modules.evaluation import add_test_noise, test_generators
from pid_lightning.pictures import write_picture
from pid_lightning.version import __version__

if TYPE_CHECKING:
    from pid_lightning.modules.base import PiDModule


class PredictionWriter:
    """Outputs of `pid predict`: PNGs named after their inputs, a JSON beside each.

    A picture is cropped (centre) to whole latent cells and patches; latents are used as they are.

    Args:
        module: what decodes; outputs go to `predictions/` in the run's folder.
    """

    def __init__(self, module: PiDModule) -> None:
        self.module = module
        trainer = module.trainer
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        if trainer.is_global_zero:
            print(f"writing pictures to {self.folder}")

    def write(self, batch: dict[str, Any]) -> list[Path]:
        """Decode one batch of `PredictionInputs`, pictures of one size or latents.

        Raises:
            ValueError: a picture below one patch, or latents of another family.
            FileExistsError: an output would replace that of another input or other weights.
        """
        module, settings = self.module, self.module.evaluation
        paths = [self.folder / f"{name}.png" for name in batch["name"]]
        for i, path in enumerate(paths):
            _check_replaceable(path, self._origin(batch, i))
        numbers, sigma, cropped = batch["number"].tolist(), settings.predict_sigma, None
        if "image" in batch:
            images, cropped = self._crop(batch["image"], batch["path"][0])
            latents, text = module.encode(images, batch["caption"])
            latents, latent_sigma = add_test_noise(module, latents, sigma, numbers)
        else:  # latents bring their own noise, the sigma only tells its level
            latents = batch["latents"]
            if latents.shape[1] != module.encoder.latent_channels:
                raise ValueError(
                    f"{batch['path'][0]}: its latents have {latents.shape[1]} channels, but those "
                    f"of {module.encoder.latent_space} have {module.encoder.latent_channels}: give "
                    "latents of the model's own family."
                )
            text = module.text_encoder.encode(batch["caption"])
            latent_sigma = torch.full((len(latents),), sigma, device=latents.device)
        generators = test_generators(module, "pixels", numbers)
        pictures = module.decode(latents, latent_sigma, text, generators)

        for i, path in enumerate(paths):
            write_picture(pictures[i], path, self._metadata(batch, i, pictures[i], cropped))
        return paths

    def _crop(self, images: Tensor, path: str) -> tuple[Tensor, dict[str, Any] | None]:
        """The middle of pictures (B, 3, H, W) in whole cells and patches, and what was cut."""
        module = self.module
        step = module.denoiser.alignment // module.scale
        size = images.shape[-2:]
        height, width = (side // step * step for side in size)
        if not height or not width:
            raise ValueError(
                f"{path} is {size[0]} x {size[1]} pixels (height x width), too small to decode: "
                f"give at least {step} x {step}."
            )
        if (height, width) == size:
            return images, None
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        cropped = {"from": list(size), "to": [height, width], "top": top, "left": left}
        return images[..., top : top + height, left : left + width], cropped

    def _origin(self, batch: dict[str, Any], i: int) -> dict[str, str | None]:
        weights = self.module.trainer.ckpt_path or self.module.init_from
        return {"input": batch["path"][i], "weights": weights and str(weights)}

    def _metadata(
        self, batch: dict[str, Any], i: int, picture: Tensor, cropped: dict[str, Any] | None
    ) -> dict[str, Any]:
        module = self.module
        return {
            **self._origin(batch, i),
            "cropped": cropped,
            "caption": batch["caption"][i],
            "number": int(batch["number"][i]),
            "seed": module.training_settings.seed,
            "latent_sigma": module.evaluation.predict_sigma,
            "steps": module.evaluation.steps,
            "student_times": module.student_times,
            "guidance_scale": module.evaluation.guidance_scale,
            "size": list(picture.shape[-2:]),
            "family": type(module).__name__,
            "scale": module.scale,
            "versions": {
                "pid_lightning": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def _check_replaceable(path: Path, origin: dict[str, str | None]) -> None:
    """Refuse to write over a file that is not the output of the same input and weights."""
    description = path.with_suffix(".json")
    if not path.exists() and not description.exists():
        return

    def places(told: dict[str, str | None]) -> list[Path]:
        return [Path(str(told[name])).resolve() for name in origin]

    try:
        is_same = places(json.loads(description.read_text(encoding="utf-8"))) == places(origin)
    except (OSError, ValueError, KeyError, TypeError):
        is_same = False  # not written by a prediction
    if not is_same:
        raise FileExistsError(
            f"{path} (or its .json) is there already and was not made of {origin['input']} by "
            f"{origin['weights']}: move it away, or rename the input."
        )
