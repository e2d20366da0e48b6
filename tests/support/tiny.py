"""A network, a module and photographs, small enough to train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import config as config
from networks import randomise as randomise

from pid_lightning import EMA, Evaluation, ImageData, Training, VAEPiD
from pid_lightning.encoders.text import TextEncoder

IMAGE_SIZE = 64
PHOTOS: dict[str, Any] = {}  # splits as they are read


class Text(TextEncoder):
    """Three features per caption, seeded by its text; records the captions it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.text_width, self.description = 6, "tiny"
        self.asked: list[str] = []

    def load(self) -> None: ...

    def encode(self, captions: list[str]) -> torch.Tensor:
        self.asked += captions
        drawn = [torch.Generator().manual_seed(sum(c.encode())) for c in captions]
        return torch.stack([torch.randn(3, 6, generator=generator) for generator in drawn])


def module(
    training: Training | None = None, text: TextEncoder | None = None, **changes: Any
) -> VAEPiD:
    """A `VAEPiD` on TAEF2's latents, with the same weights every time."""
    if text is not None and text.text_width:
        changes = {"text_width": text.text_width, "text_length": 3} | changes
    training = training or Training(learning_rate=1e-3, warmup_steps=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAEPiD(
            denoiser=config(**changes),
            text=text,
            training=training,
            evaluation=Evaluation(latent_sigmas=[0.0, 0.8], steps=2),
        )


def data(batch_size: int = 4, **changes: Any) -> ImageData:
    """Crops of the bundled photographs, which are decoded once."""
    made = ImageData(
        path="bundled", image_size=IMAGE_SIZE, batch_size=batch_size, seed=0, **changes
    )
    made.source._splits = PHOTOS
    return made


def quiet_trainer(folder: Path, **options: Any) -> pl.Trainer:
    """A trainer on the CPU that prints, logs and saves nothing."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**(settings | options))


def trainer(folder: Path, steps: int, *callbacks: pl.Callback, **changes: Any) -> pl.Trainer:
    """A quiet trainer that leaves `last.ckpt`, of its last step, in `folder`."""
    saved = ModelCheckpoint(
        folder,
        save_last=True,
        every_n_train_steps=max(steps, 1),
        save_top_k=0,
        enable_version_counter=False,
    )
    settings = {
        "max_steps": steps,
        "enable_checkpointing": True,
        "limit_val_batches": 0,
        "callbacks": [*callbacks, saved],
    }
    return quiet_trainer(folder, **(settings | changes))


def fit(
    folder: Path,
    steps: int,
    *callbacks: pl.Callback,
    fitted: VAEPiD | None = None,
    resume: Path | None = None,
    batch_size: int = 4,
    **changes: Any,
) -> VAEPiD:
    """Train for some steps, from a checkpoint or from the start."""
    fitted = fitted or module()
    callbacks = callbacks or (EMA(),)
    with torch.random.fork_rng():
        torch.manual_seed(1)  # like the command line's seed_everything, for new networks
        trainer(folder, steps, *callbacks, **changes).fit(
            fitted, data(batch_size), ckpt_path=resume
        )
    return fitted


def assert_equal_states(ours: Any, theirs: Any, where: str = "") -> None:
    """Assert bit-identical values, recursing into dicts and lists."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal_states(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal_states(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs, where
