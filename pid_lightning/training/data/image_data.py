"""ImageData: batches of pictures and captions, determined by seed and sample number alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pid_lightning.checks import check_at_least, check_choice
from pid_lightning.training.data.draws import (
    Pictures,
    ResumableLoader,
    ShuffledDraws,
    StreamedDraws,
    make_loader,
)
from pid_lightning.training.data.prediction_inputs import PredictionInputs
from pid_lightning.training.data.sources import Split, hold_out, open_source


class ImageData(LightningDataModule):
    """Pictures and captions for training, validation and test, and `inputs` for prediction.

    A batch is {"image": (B, 3, S, S) float32 in [-1, 1], "caption": list, "name": list, "number":
    (B,)}. S is `image_size`; the number is the sample's position in the training run, or the
    picture's position in its split. All randomness of a sample (crop, noise, times) depends only on
    the seed and this number. Training pictures are shuffled, randomly cropped and mirrored. A run
    that resumes anywhere, also within an epoch, gets exactly the batches of an uninterrupted run,
    for any `num_workers` and any number of processes with the same global batch size. Validation
    and test use centre crops.

    Splits are the source's own (sub-folders or splits named train, val or validation, test). If
    only one of val and test exists, it serves as both; if neither does, `num_val` pictures of the
    training split are held out for both. Unusable pictures (unreadable, smaller than `image_size`,
    float pixels) are skipped with a warning: for a folder, one that lists them
    before training; for other sources, as they are encountered.

    Prediction reads only `inputs`, one file per batch: {"image": (1, 3, H, W)} or {"latents":
    (1, C, h, w)} with "caption", "name", "path" and "number", see `PredictionInputs`.

    Args:
        path: a folder (searched recursively; captions are read from NAME.txt next to NAME.jpg, or
            from metadata.jsonl as "file_name" and "text"), a parquet file or pattern, a folder of
            parquet files, an owner/name data set of the Hugging Face hub, or "bundled" for the
            photographs included in the package.
        image_size: side S of the crops in pixels.
        batch_size: pictures per batch in each process.
        num_workers: worker processes that decode pictures; 0 decodes in the training process.
        test_path: a separate source of test pictures: its test split, else val, else train.
        num_val: pictures to hold out if the source has neither val nor test.
        samples_per_epoch: crops per epoch over all processes; None is one pass. Required for a
            stream.
        resize: "none" crops at the original resolution; "random" first downsizes a training picture
            so that its shorter side is uniformly distributed between S and the original.
        flip: mirror half of the training crops.
        streaming: read parquet files or hub data as a stream. Every process reads all of it, and a
            resumed run rereads what it had seen: meant for data too large for the disk.
        image_column, caption_column: columns of parquet files or hub data; None means no captions.
        cache_bytes: cache a folder's decoded pixels in memory (one copy per process and split) if
            they fit in this many bytes; 0 disables the cache.
        seed: None uses the seed of `seed_everything`, or 0 if that was not called.
        inputs: what `pid predict` decodes: pictures, .safetensors files with one tensor "latents",
            and folders of both; captions are read from NAME.txt next to them.

    Raises:
        ValueError: an argument is out of range; or, in `setup`, no picture is usable or an input
            is invalid.
        FileNotFoundError: `path` or an input does not exist (in `setup`).
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
        for name, value, minimum in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("num_val", num_val, 0),
            ("samples_per_epoch", 1 if samples_per_epoch is None else samples_per_epoch, 1),
            ("cache_bytes", cache_bytes, 0),
        ):
            check_at_least(f"data.{name}", value, minimum)
        check_choice("data.resize", resize, ("none", "random"))
        for name, value in (("path", path), ("test_path", test_path)):
            if value == "":
                raise ValueError(
                    f"data.{name}: an empty name; give a folder, a parquet file or a data set."
                )
        if streaming and samples_per_epoch is None:
            raise ValueError(
                "data.samples_per_epoch: a stream has no length, so None is not possible; set a "
                "number."
            )
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
        """Open the source and check the pictures of the splits that `stage` needs.

        For prediction, only `inputs` are opened.
        """
        if stage == "predict":
            if not self.inputs:
                raise ValueError(
                    "data.inputs: nothing to decode; list pictures, latent files or folders, as in "
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
        if stage in ("validate", "test") and self._pictures[name] is None:
            raise ValueError(
                f"data.num_val: {self.num_val} leaves no pictures for {name}; hold some out, or "
                f"add a split named {name}."
            )

    def train_dataloader(self) -> ResumableLoader:
        """Random crops; a resumed run continues after its last trained batch."""
        pictures = self._pictures["train"]
        world_size = self.trainer.world_size if self.trainer else 1
        num_samples = self.samples_per_epoch or len(pictures)
        return self._loader(pictures, math.ceil(num_samples / (self.batch_size * world_size)))

    def val_dataloader(self) -> DataLoader | ResumableLoader | list[Any]:
        """Centre crops of the validation pictures; empty if there are none and `num_val` is 0."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader | ResumableLoader | list[Any]:
        """Centre crops of the test pictures."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        """The inputs, one per batch, distributed over the processes."""
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
        # Lightning counts over all epochs, saves the count, and restores it before the first
        # iteration starts.
        if self.trainer is None:
            return 0
        num_trained = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        # Overfitting repeats the same batches.
        return (
            num_trained % self.trainer.num_training_batches
            if self.trainer.overfit_batches
            else num_trained
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
            return self._open_test_path()
        self._parts = self._parts or self._open(self.path)
        candidates = {"train": (), "val": ("val", "test"), "test": ("test", "val")}[name]
        for part in candidates:
            if part in self._parts:
                return self._load(part)
        if "train" not in self._parts:
            raise ValueError(
                f"data.path: {self.path} has no training pictures, only {', '.join(self._parts)}; "
                "add a train split or put all pictures in one folder."
            )
        whole = self._load("train")
        if len(self._parts) > 1:
            return whole
        if self.num_val == 0:
            return whole if name == "train" else None
        num_processes = self.trainer.world_size if self.trainer else 1
        if self.streaming and self.num_val < num_processes:  # a process without any would hang
            raise ValueError(
                f"data.num_val: {self.num_val} streamed pictures are too few to validate on "
                f"{num_processes} processes; hold out at least one for each."
            )
        return hold_out(whole, self.num_val)[0 if name == "train" else 1]

    def _load(self, part: str) -> Split:
        if part not in self._loaded:
            self._loaded[part] = self._parts[part]()
        return self._loaded[part]

    def _open_test_path(self) -> Split:
        try:
            parts = self._open(self.test_path)
            return parts[next(n for n in ("test", "val", "train") if n in parts)]()
        except (OSError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(str(error).replace("data.path", "data.test_path")) from error

    def _open(self, path: str) -> dict[str, Callable[[], Split]]:
        return open_source(
            path,
            self.image_size,
            self.cache_bytes,
            self.streaming,
            self.image_column,
            self.caption_column,
        )
