"""ImageData: photographs and captions as batches that depend on a seed and a count alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pid_lightning.draws import (
    Pictures,
    ResumableLoader,
    ShuffledDraws,
    StreamedDraws,
    make_loader,
)
from pid_lightning.prediction_inputs import PredictionInputs
from pid_lightning.sources import Split, hold_out, open_source


class ImageData(LightningDataModule):
    """Photographs and captions for training, validation and test; `inputs` to decode.

    A batch is {"image": (B, 3, S, S) float32 in [-1, 1], "caption": list, "name": list, "number":
    (B,)}, S being `image_size` and the number a sample's place in the run, or a picture's in its
    split: what is drawn for a sample (crop, noise, times) depends on seed and number alone.
    Training pictures are shuffled, cropped and mirrored at random: a run that was stopped anywhere,
    also within an epoch, continues with exactly the batches it would have had, for any
    `num_workers` and for any number of processes with the same global batch. Validation and test
    take the centre.

    Splits are the source's own (sub-folders or splits named train, val or validation, test). Where
    one of val and test is missing, the other serves for both; where both are, `num_val` pictures of
    the training split are held out for them. Unusable pictures (not readable, below `image_size`,
    more than 8 bits a channel) are skipped with a warning: for a folder, one that names them before
    training; for other sources as they come.

    Prediction reads `inputs` alone, one file a batch: {"image": (1, 3, H, W)} or {"latents":
    (1, C, h, w)} with "caption", "name", "path" and "number", see `PredictionInputs`.

    Args:
        path: a folder (pictures are found recursively; captions stand in NAME.txt beside NAME.jpg,
            or in metadata.jsonl as "file_name" and "text"), a parquet file or pattern, a folder of
            parquet files, an owner/name data set of the Hugging Face hub, or "bundled" for the
            photographs that come with the package.
        image_size: side S of the crops in pixels.
        batch_size: pictures a batch in each process.
        num_workers: processes that decode; 0 decodes in the training process.
        test_path: another source, all of whose pictures (or its test split) are the test pictures.
        num_val: pictures to hold out where the source has neither val nor test.
        samples_per_epoch: crops an epoch over all processes; None is one pass. A stream needs it.
        resize: "none" crops at the original resolution; "random" first reduces a training picture
            so that its shorter side lies anywhere between S and the original.
        flip: mirror half of the training crops.
        streaming: read parquet files or hub data as a stream. Each process reads all of it, and a
            continued run reads again what it had seen: meant for runs too large for the disk.
        image_column, caption_column: columns of parquet files or hub data; None means no captions.
        cache_bytes: keep a folder's decoded pixels in memory (one copy a process and split) where
            they take no more; 0 decodes every time.
        seed: None follows `seed_everything`, or is 0 where that was not called.
        inputs: what `pid predict` decodes: pictures, .safetensors files with one tensor "latents",
            and folders of both; captions stand in NAME.txt beside them.

    Raises:
        ValueError: an argument is out of range (from here); no picture is usable, or an input is
            not (from `setup`).
        FileNotFoundError: `path` or an input leads nowhere (from `setup`).
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        batch_size: int,
        num_workers: int = 0,
        test_path: str | None = None,
        num_val: int = 8,
        samples_per_epoch: int | None = None,
        resize: Literal["none", "random"] = "none",
        flip: bool = True,
        streaming: bool = False,
        image_column: str = "image",
        caption_column: str | None = None,
        cache_bytes: int = 2**30,
        seed: int | None = None,
        inputs: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("num_val", num_val, 0),
            ("samples_per_epoch", 1 if samples_per_epoch is None else samples_per_epoch, 1),
            ("cache_bytes", cache_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name}: {value} is too small, give at least {least}.")
        if resize not in ("none", "random"):
            raise ValueError(f'data.resize: {resize!r} is unknown, give "none" or "random".')
        if streaming and samples_per_epoch is None:
            raise ValueError("data.samples_per_epoch: a stream has no length, give a number.")
        self.path, self.test_path, self.streaming = path, test_path, streaming
        self.image_size, self.batch_size, self.num_workers = image_size, batch_size, num_workers
        self.num_val, self.samples_per_epoch = num_val, samples_per_epoch
        self.resize, self.flip, self.cache_bytes, self.seed = resize, flip, cache_bytes, seed
        self.image_column, self.caption_column = image_column, caption_column
        self.inputs = [inputs] if isinstance(inputs, str) else inputs
        self._parts: dict[str, Callable[[], Split]] | None = None
        self._loaded: dict[str, Split] = {}
        self._pictures: dict[str, Pictures | None] = {}
        self._to_decode: PredictionInputs | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the source and check its pictures, for the splits that `stage` needs.

        To predict, only the inputs are opened.
        """
        if stage == "predict":
            if not self.inputs:
                raise ValueError(
                    "data.inputs: nothing to decode, name pictures, latent files or folders, as in "
                    "--data.inputs photos/ or --data.inputs '[a.png, z.safetensors]'."
                )
            self._to_decode = PredictionInputs(self.inputs)
            return
        names = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        for name in names.get(stage, ("train", "val", "test")):
            if name not in self._pictures:
                split = self._split(name)
                self._pictures[name] = split and Pictures(
                    split, self.image_size, name == "train", self.resize, self.flip, seed
                )

    def train_dataloader(self) -> ResumableLoader:
        """Random crops, from where training stands."""
        pictures = self._pictures["train"]
        world_size = self.trainer.world_size if self.trainer else 1
        num_samples = self.samples_per_epoch or len(pictures)
        return self._loader(pictures, math.ceil(num_samples / (self.batch_size * world_size)))

    def val_dataloader(self) -> DataLoader | ResumableLoader | list[Any]:
        """Centre crops of the validation pictures; no loader if `num_val` is 0."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader | ResumableLoader | list[Any]:
        """Centre crops of the test pictures."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        """The inputs, one a batch; several processes share them out."""
        return make_loader(self._to_decode, self.num_workers, None)

    def _loader(self, pictures: Pictures, num_batches: int | None) -> ResumableLoader:
        trainer = self.trainer
        draws = (StreamedDraws if self.streaming else ShuffledDraws)(
            pictures=pictures,
            num_batches=num_batches,
            batch_size=self.batch_size,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            position=self._num_trained_batches if pictures.train else int,
        )
        return ResumableLoader(draws, self.num_workers)

    def _num_trained_batches(self) -> int:
        # Counts over all epochs, is saved and restored by Lightning, and is restored before the
        # first iteration starts.
        return (
            self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0
        )

    def _evaluation(self, name: str) -> DataLoader | ResumableLoader | list[Any]:
        pictures = self._pictures[name]
        if pictures is None:
            return []
        if isinstance(pictures.split.rows, torch.utils.data.IterableDataset):
            return self._loader(pictures, None)
        return make_loader(pictures, self.num_workers, None, self.batch_size)

    def _split(self, name: str) -> Split | None:
        if name == "test" and self.test_path is not None:
            parts = self._open(self.test_path)
            return parts[next(n for n in ("test", "val", "train") if n in parts)]()
        self._parts = self._parts or self._open(self.path)
        own = {"train": (), "val": ("val", "test"), "test": ("test", "val")}[name]
        for part in own:
            if part in self._parts:
                return self._load(part)
        if "train" not in self._parts:
            raise ValueError(
                f"data.path: {self.path} has no training pictures, only {', '.join(self._parts)}: "
                "add a train split, or put all pictures into one folder."
            )
        whole = self._load("train")
        if len(self._parts) > 1:
            return whole
        if self.num_val == 0:
            return whole if name == "train" else None
        return hold_out(whole, self.num_val)[0 if name == "train" else 1]

    def _load(self, part: str) -> Split:
        if part not in self._loaded:
            self._loaded[part] = self._parts[part]()
        return self._loaded[part]

    def _open(self, path: str) -> dict[str, Callable[[], Split]]:
        return open_source(
            path,
            self.image_size,
            self.cache_bytes,
            self.streaming,
            self.image_column,
            self.caption_column,
        )
