"""The model card of a published model, filled from the model and from the run that trained it."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import PiD

# Where the latents of a space come from, in the hub's sense: the model that this one belongs to.
BASE_MODELS: Mapping[str, str] = {
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "flux": "black-forest-labs/FLUX.1-schnell",
    "sdxl": "stabilityai/sdxl-vae",
    "flux2": "black-forest-labs/FLUX.2-klein-4B",
    "qwen": "Qwen/Qwen-Image",
    "qwen21": "Qwen/Qwen-Image-2.1",
}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def model_card(
    denoiser: PiD, info: ModelInfo, license: str = "other", source: Path | None = None
) -> str:
    """Model card in the hub's format.

    Args:
        denoiser: the network.
        info: its metadata.
        license: identifier of the hub for the weights' licence.
        source: the file that the model was read from; of a run's checkpoint, the run's config and
            its newest table of `pid test` fill the card.
    """
    millions = sum(weight.numel() for weight in denoiser.parameters()) / 1e6
    geometry, kind = info.geometry, "a teacher, sampled by a solver"
    if info.student_times is not None:
        kind = f"a student of {len(info.student_times)} steps"
    size = "not recorded" if info.image_size is None else f"{info.image_size} x {info.image_size}"
    vae = str(info.encoder.get("vae"))
    base = vae if HUB_ID.fullmatch(vae) else BASE_MODELS.get(info.latent_space)
    base = f"base_model: {base}\n" if base else ""
    return f"""---
library_name: pid_lightning
license: {license}
{base}pipeline_tag: image-to-image
tags:
- pixel-diffusion-decoder
- {info.latent_space}
---
# A pixel diffusion decoder for {info.latent_space} latents

Decodes normalised `{info.latent_space}` latents to pictures {geometry.scale} times as large as the
native decoder's, by pixel diffusion (PiD, arXiv 2605.23902).

| | |
|---|---|
| parameters | {millions:.1f} million |
| sampling | {kind} |
| latents | {geometry.latent_channels} channels, {geometry.latent_stride} pixels a cell |
| scale | {geometry.scale} |
| trained output size | {size} |
| noise levels of the latents | 0 to {info.latent_sigma_max:g} ({info.noise_frame}) |

```python
from pid_lightning import PiDDecoder

decoder = PiDDecoder.from_pretrained("this/repository")
pictures = decoder.decode(latents)  # (B, 3, H, W) in [-1, 1]
```
{"" if source is None else _of_run(source)}"""


def _of_run(source: Path) -> str:
    """Tables of a run's training and of its newest test; nothing for other files."""
    folder = source.parent.parent if source.parent.name == "checkpoints" else source.parent
    if source.suffix != ".ckpt":
        return ""
    text, config = "", folder / "config.yaml"
    if config.is_file():
        import yaml

        rows = _training(yaml.safe_load(config.read_text(encoding="utf-8")))
        told = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
        text += f"\n## Training\n\n| | |\n|---|---|\n{told}"
    tables = sorted(folder.glob("test_metrics*.csv"), key=lambda file: file.stat().st_mtime)
    if tables:
        with tables[-1].open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
        lines = [head, ["---"] * len(head), *(map(_short, row) for row in rows)]
        text += "\n## Test\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def _training(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was trained on and how, from its config; no folder of a machine is named whole."""
    model, data = (config.get(part, {}).get("init_args", {}) for part in ("model", "data"))
    trainer, training = config.get("trainer", {}), model.get("training", {})
    rows = {
        "data": data.get("path"),
        "output size": data.get("image_size"),
        "batch size": data.get("batch_size"),
        "steps": trainer.get("max_steps"),
        "precision": trainer.get("precision"),
        "optimizer": training.get("optimizer"),
        "learning rate": training.get("learning_rate"),
        "started from": model.get("init_from"),
    }
    for callback in trainer.get("callbacks") or []:
        rows["distilled from"] = callback.get("init_args", {}).get("teacher")
        if rows["distilled from"]:
            break
    names = {k: os.path.basename(v) if os.path.isabs(str(v)) else v for k, v in rows.items()}
    return {name: value for name, value in names.items() if value is not None}


def _short(value: str) -> str:
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value
