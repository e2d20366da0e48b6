"""ImageData: batches of pictures and captions, determined by seed and sample number alone."""

from __future__ import annotations

import math
import os
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from pid_lightning.checks import Mistake, check_at_least, check_choice, one_line
from pid_lightning.training.data.draws import (
    ResumableLoader,
    ShuffledDraws,
    StreamedDraws,
    make_loader,
)
from pid_lightning.training.data.prediction_inputs import PredictionInputs
from pid_lightning.training.data.samples import Pictures, Resize
from pid_lightning.training.data.sources import Source
from pid_lightning.training.data.splits import Split


class ImageData(LightningDataModule):
    """Pictures and captions for training, validation and test, and `inputs` for prediction.

    A batch is {"image": (B, 3, S, S) float32 in [-1, 1], "caption": list, "name": list, "number":
    (B,)}. S is `image_size`; the number is the sample's position in the training run, or the
    picture's position in its split. All randomness of a sample (crop, noise, times) depends only on
    the seed and this number. Training pictures are shuffled, randomly cropped and mirrored. A run
    that resumes anywhere, also within an epoch, gets exactly the batches of an uninterrupted run,
    for any `num_workers` and any number of processes with the same global batch size. Validation
    and test use centre crops.

    Splits are the source's own: sub-folders, files or splits named train, val, test or the like
    (see `name_splits`). If only one of val and test exists, it serves as both; if neither does,
    `num_val` pictures of the training split are held out for both. Unusable pictures (unreadable,
    smaller than `image_size`, float pixels) are skipped with a warning: for a folder, one that
    lists them before training; for other sources, as they are encountered. `setup` says in a line a
    split what it took: pictures, captions, and what was left out for which reason.

    Prediction lists only `inputs`, one file per batch, see `PredictionInputs`.

    Args:
        path: a folder (searched with its sub-folders and links, without hidden ones; captions are
            read from NAME.txt next to NAME.jpg, or from metadata.jsonl or metadata.csv in it or
            above it as "file_name" and "text" or "caption", see `find_captions`), a parquet file or
            pattern, a folder of parquet files as a clone from the hub, a folder written by
            `save_to_disk` of `datasets`, an owner/name data set of the Hugging Face hub, or
            "bundled" for the photographs included in the package.
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
        image_column: of tables: encoded pictures or paths of files, also in lists or structs.
        caption_column: of tables, and of metadata in folders; None takes the usual names, as text
            or caption.
        cache_bytes: cache a folder's decoded pixels in memory (one copy per process and split) if
            they fit in this many bytes; 0 disables the cache.
        seed: None uses the seed of `seed_everything`, or 0 if that was not called.
        inputs: what `pid predict` decodes: pictures, .safetensors files with one tensor "latents",
            and folders of both; captions are read as those of a folder in `path`.

    Raises:
        Mistake: an argument is out of range; or, in `setup`, there is no usable picture to train,
            validate or test on, or an input is invalid.
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
        resize: Resize = "none",
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
        if streaming and samples_per_epoch is None:
            raise Mistake("data.samples_per_epoch", "a stream has no length; set a number.")
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_val = num_val
        self.samples_per_epoch = samples_per_epoch
        self.resize = resize
        self.flip = flip
        self.streaming = streaming
        self.seed = seed
        self.inputs: list[str] | None = [inputs] if isinstance(inputs, str) else inputs
        kind = (image_size, cache_bytes, streaming, image_column, caption_column)
        self.source: Source = Source("data.path", path, *kind)
        self.test_source: Source | None = (
            None if test_path is None else Source("data.test_path", test_path, *kind)
        )
        self._pictures: dict[str, Pictures | None] = {}
        self._to_decode: PredictionInputs | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the source and check the pictures of the splits that `stage` needs.

        For prediction, only `inputs` are opened.
        """
        if stage == "predict":
            if not self.inputs:
                raise Mistake(
                    "data.inputs",
                    "nothing to decode; list pictures, latent files or folders, as in "
                    "--data.inputs photos/ or --data.inputs '[a.png, z.safetensors]'.",
                )
            self._to_decode = PredictionInputs(self.inputs)
            return
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for name in needed.get(stage, ("train", "val", "test")):
            if self._pictures.get(name) is None:
                split = self._find_split(name, is_optional=stage not in ("validate", "test"))
                self._pictures[name] = split and Pictures(
                    split, self.image_size, name == "train", self.resize, self.flip, seed
                )
                if split is not None:
                    rank_zero_info(one_line(f"{name}: {split}"))

    def train_dataloader(self) -> ResumableLoader:
        """Random crops; a resumed run continues after its last trained batch."""
        pictures = self._pictures["train"]
        num_samples = self.samples_per_epoch or len(pictures)
        global_batch_size = self.batch_size * self._num_processes
        return self._loader(pictures, math.ceil(num_samples / global_batch_size))

    def val_dataloader(self) -> DataLoader[Any] | ResumableLoader | list[Any]:
        """Centre crops of the validation pictures; empty if there are none and `num_val` is 0."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Any] | ResumableLoader | list[Any]:
        """Centre crops of the test pictures."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The inputs, one per batch, distributed over the processes."""
        return make_loader(self._to_decode, self.num_workers, None)

    def _loader(self, pictures: Pictures, num_batches: int | None) -> ResumableLoader:
        draws = (StreamedDraws if self.streaming else ShuffledDraws)(
            pictures=pictures,
            num_batches=num_batches,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self._num_processes,
            position=self._num_trained_batches if pictures.train else int,
        )
        return ResumableLoader(draws, self.num_workers)

    @property
    def _num_processes(self) -> int:
        return self.trainer.world_size if self.trainer else 1

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

    def _evaluation(self, name: str) -> DataLoader[Any] | ResumableLoader | list[Any]:
        pictures = self._pictures[name]
        if pictures is None:
            return []
        if pictures.split.is_stream:
            return self._loader(pictures, None)
        return make_loader(pictures, self.num_workers, None, self.batch_size)

    def _find_split(self, name: str, is_optional: bool) -> Split | None:
        """The split that serves as "train", "val" or "test"; None for an optional one."""
        if name == "test" and self.test_source is not None:
            return self.test_source.read("test", "val", "train")
        if not self.source.readers.keys().isdisjoint(("val", "test")):
            others = {"train": (), "val": ("test",), "test": ("val",)}[name]
            return self.source.read(name, *others)
        whole = self.source.read("train")
        if self.num_val == 0 and is_optional:
            return whole if name == "train" else None
        # Of a stream every process takes its own part, and would hang without any.
        least = self._num_processes if whole.is_stream else 1
        rest, held = whole.hold_out(self.num_val, least)
        return rest if name == "train" else held
