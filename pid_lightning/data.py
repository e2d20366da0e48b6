"""Photographs and captions as batches; every crop is a pure function of a seed and a count."""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    import datasets

BUNDLED_PHOTOS = Path(__file__).parent / "assets" / "photos"
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
SHUFFLE_BUFFER = 1000  # rows of a stream held back to shuffle among
MAX_TRIES = 1000  # unusable pictures in a row before a source counts as having none
# What PIL raises on damaged files, by format.
_DAMAGE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


class UnusablePicture(ValueError):
    """A picture that cannot be read or is smaller than the crop; the text is the reason."""


@dataclass
class Split:
    """Rows {"image": {"path", "bytes"}, "caption"?, "name"?} and, if they fit, their pixels."""

    rows: datasets.Dataset | datasets.IterableDataset
    pixels: list[Tensor] | None = None

    def select(self, indices: list[int]) -> Split:
        pixels = None if self.pixels is None else [self.pixels[i] for i in indices]
        return Split(self.rows.select(indices), pixels)


def keyed_generator(*key: int) -> torch.Generator:
    """A generator that depends on `key` alone, unlike neighbouring keys' generators."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _open(image: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])


def check_header(image: dict[str, Any], image_size: int) -> tuple[int, int]:
    """Width and height of {"path", "bytes"} from the header alone.

    Raises:
        UnusablePicture: no picture, more than 8 bits a channel, or smaller than `image_size`.
    """
    try:
        with _open(image) as picture:
            width, height, mode = *picture.size, picture.mode
    except _DAMAGE:
        raise UnusablePicture("not a readable picture") from None
    if mode[0] in "IF":
        raise UnusablePicture(f"mode {mode} instead of 8 bits a channel")
    if min(width, height) < image_size:
        raise UnusablePicture(f"{width} x {height}, below image_size {image_size}")
    return width, height


def decode(image: dict[str, Any], image_size: int) -> Tensor:
    """The whole picture {"path", "bytes"}, upright, uint8 RGB (3, H, W).

    Raises:
        UnusablePicture: as `check_header`, or the pixels are damaged.
    """
    from torchvision.transforms.v2 import functional

    check_header(image, image_size)
    try:
        with _open(image) as picture:
            return functional.pil_to_tensor(ImageOps.exif_transpose(picture).convert("RGB"))
    except _DAMAGE:
        raise UnusablePicture("damaged pixels") from None


def centre_crop(picture: Tensor, image_size: int) -> Tensor:
    """The middle (3, S, S) of a picture (3, H, W), S = `image_size`."""
    top, left = ((side - image_size) // 2 for side in picture.shape[-2:])
    return picture[:, top : top + image_size, left : left + image_size]


def random_crop(
    picture: Tensor, image_size: int, resize: str, flip: bool, generator: torch.Generator
) -> Tensor:
    """A random square (3, S, S) of a uint8 picture (3, H, W), S = `image_size`.

    With `resize` "random" the picture is reduced first, as if its shorter side were drawn evenly
    between S and its own length; only the window that is kept gets resampled.
    """
    from torchvision.transforms.v2 import InterpolationMode, functional

    height, width = picture.shape[-2:]
    shorter = min(height, width)
    zoom, down, right, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    window = image_size
    if resize == "random":
        window = round(image_size * shorter / (image_size + zoom * (shorter - image_size)))
    top, left = int(down * (height - window + 1)), int(right * (width - window + 1))
    picture = functional.crop(picture, top, left, window, window)
    if window != image_size:
        size, bicubic = [image_size, image_size], InterpolationMode.BICUBIC
        picture = functional.resize(picture, size, interpolation=bicubic, antialias=True)
    return functional.horizontal_flip(picture) if flip and mirror < 0.5 else picture


class Pictures(Dataset):
    """Crops of one split: random ones for training, else the centre.

    An item is (key, draw): the index of a picture or a row of a stream, and the number of the draw,
    which with the seed decides the crop. An unusable picture gives way to the next one, so that
    batches stay full; a row of a stream has no next one and gives None.
    """

    def __init__(
        self, split: Split, image_size: int, train: bool, resize: str, flip: bool, seed: int
    ) -> None:
        self.split, self.image_size, self.train = split, image_size, train
        self.resize, self.flip, self.seed = resize, flip, seed
        self.num_skipped = 0

    def __len__(self) -> int:
        return len(self.split.rows)

    def __getitem__(self, item: int | tuple[int | dict[str, Any], int]) -> dict[str, Any] | None:
        key, draw = item if isinstance(item, tuple) else (item, item)
        if isinstance(key, dict):
            return self._sample(key, None, draw)
        for index in range(key, key + min(len(self), MAX_TRIES)):
            index %= len(self)
            pixels = None if self.split.pixels is None else self.split.pixels[index]
            sample = self._sample({"name": f"{index:06d}", **self.split.rows[index]}, pixels, draw)
            if sample is not None:
                return sample
        raise ValueError(_none_left(self.num_skipped, self.image_size))

    def _sample(self, row: dict[str, Any], pixels: Tensor | None, draw: int) -> dict | None:
        try:
            picture = decode(row["image"], self.image_size) if pixels is None else pixels
        except UnusablePicture as reason:
            self.report(row["name"], reason)
            return None
        if self.train:
            generator = keyed_generator(self.seed, 1, draw)
            picture = random_crop(picture, self.image_size, self.resize, self.flip, generator)
        else:
            picture = centre_crop(picture, self.image_size)
        caption = row.get("caption") or ""
        caption = caption if isinstance(caption, str) else caption[0]
        image = picture.float() / 127.5 - 1
        return {"image": image, "caption": caption, "name": row["name"], "number": draw}

    def report(self, name: str, reason: UnusablePicture) -> None:
        """Count a picture skipped while running; warn at the 1st, 10th, 100th, ..."""
        self.num_skipped += 1
        if math.log10(self.num_skipped).is_integer():
            rank_zero_warn(f"{self.num_skipped} picture(s) skipped so far, now {name}: {reason}.")


def collate(samples: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Samples to a batch, see `ImageData`."""
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        raise ValueError("data.path: a whole batch of the stream was damaged, look at its source.")
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    numbers = torch.tensor(batch["number"])
    return {**batch, "image": torch.stack(batch["image"]), "number": numbers}


@dataclass
class ShuffledDraws:
    """Batches of (index, draw) from an endless sequence of shuffled passes over the pictures.

    Draw j takes place j % n of pass j // n. Batch b of all ranks together is the draws from
    b * batch_size * world_size on, dealt to the ranks in turn. `position` says, when an iteration
    starts, how many batches were trained on before.
    """

    pictures: Pictures
    num_batches: int | None
    batch_size: int
    rank: int
    world_size: int
    position: Callable[[], int]

    def __len__(self) -> int:
        return self.num_batches  # None, a stream's single pass, makes len() a TypeError

    def __iter__(self) -> Iterator[list[tuple[Any, int]]]:
        items, num_done = [], 0
        for draw, key in self._keys(self.position() * self.batch_size * self.world_size):
            if draw % self.world_size == self.rank:
                items.append((key, draw))
            if len(items) == self.batch_size:
                yield items
                items, num_done = [], num_done + 1
            if num_done == self.num_batches:
                return
        if items:
            yield items

    def _keys(self, first: int) -> Iterator[tuple[int, Any]]:
        order, order_of, num_pictures = torch.empty(0), -1, len(self.pictures)
        for draw in itertools.count(first):
            number, place = divmod(draw, num_pictures)
            if number != order_of:
                generator = keyed_generator(self.pictures.seed, 0, number)
                order, order_of = torch.randperm(num_pictures, generator=generator), number
            yield draw, int(order[place])


class StreamedDraws(ShuffledDraws):
    """The same with rows of a stream: shuffled in a buffer and endless for training, else one pass.

    Rows whose header shows them unusable are not counted. Rows before `first` are read again and
    dropped undecoded: a stream cannot be entered in its middle.
    """

    def _keys(self, first: int) -> Iterator[tuple[int, Any]]:
        rows = self.pictures.split.rows
        if not self.pictures.train:
            yield from enumerate(self._usable(rows))
            return
        rows = rows.shuffle(self.pictures.seed, buffer_size=SHUFFLE_BUFFER)
        draws = itertools.count()
        for number in itertools.count():
            rows.set_epoch(number)
            yield from ((j, row) for row in self._usable(rows) if (j := next(draws)) >= first)

    def _usable(self, rows: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
        num_rows = num_usable = 0
        for row in rows:
            row = {"name": f"{num_rows:06d}", **row}
            num_rows += 1
            try:
                check_header(row["image"], self.pictures.image_size)
            except UnusablePicture as reason:
                self.pictures.report(row["name"], reason)
                if num_usable == 0 and num_rows == MAX_TRIES:
                    break
                continue
            num_usable += 1
            yield row
        if num_usable == 0:
            raise ValueError(_none_left(num_rows, self.pictures.image_size))


class ResumableLoader:
    """Batches that start where training stands, read from the trainer when iteration starts.

    The trainer's own count of trained batches is the only state. Not a `DataLoader`, because
    Lightning would replace the sampler of one when there are several processes; `state_dict` and
    `load_state_dict` are Lightning's sign that a run may resume within an epoch, and hold what must
    not change for the batches to be the ones an uninterrupted run would get.
    """

    def __init__(self, draws: ShuffledDraws, num_workers: int) -> None:
        self.draws, self.loader = draws, make_loader(draws.pictures, num_workers, draws)

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.loader)

    def state_dict(self) -> dict[str, int]:
        draws = self.draws
        group = draws.batch_size * draws.world_size
        return {"seed": draws.pictures.seed, "global batch size": group}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, now in self.state_dict().items():
            if state[name] != now:
                rank_zero_warn(
                    f"data: the {name} was {state[name]} in the checkpoint and is {now} now, so "
                    "the batches to come differ from those of an uninterrupted run."
                )


def make_loader(
    pictures: Pictures, num_workers: int, batches: ShuffledDraws | None, batch_size: int = 1
) -> DataLoader:
    """A `DataLoader` over `batches` of items, or over the pictures in their order."""
    which = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
    return DataLoader(
        pictures,
        **which,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or starting an iteration would draw from the global one
    )


def _none_left(num_skipped: int, image_size: int) -> str:
    return (
        f"data.path: none of {num_skipped} pictures is usable at image_size {image_size}: "
        "give readable pictures with both sides at least that long, or lower image_size."
    )


# Sources: a folder, parquet files or a data set of the hub, as one `Split` for each of its splits.


def read_captions(folder: Path) -> dict[Path, str]:
    """Captions of every metadata.jsonl under `folder`, by the picture's path.

    Raises:
        ValueError: a line is not an object with "file_name".
    """
    captions = {}
    for file in sorted(folder.rglob("metadata.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line) if line.strip() else {"file_name": "", "text": ""}
                captions[file.parent / entry["file_name"]] = entry.get("text") or ""
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{file}, line {number}: each line must be a JSON object with "
                    '"file_name" and, for the caption, "text".'
                ) from None
    return captions


def read_folder(root: Path, folder: Path, image_size: int, cache_bytes: int) -> Split:
    """All usable pictures under `folder`, sorted by path; captions of metadata.jsonl under `root`.

    Headers of all files are read; all pixels too, where they fit into `cache_bytes`.

    Raises:
        ValueError: there are no pictures, none is usable, or a metadata.jsonl is malformed.
    """
    import datasets

    files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in PICTURE_SUFFIXES]
    files = [f for f in files if not f.name.startswith(".")]
    if not files:
        suffixes = ", ".join(PICTURE_SUFFIXES)
        raise ValueError(f"data.path: there are no pictures ({suffixes}) in {folder} or below it.")
    images = [{"path": str(f), "bytes": None} for f in files]
    found = _each(check_header, images, image_size)
    num_bytes = [0 if isinstance(f, UnusablePicture) else 3 * f[0] * f[1] for f in found]
    cached = sum(num_bytes) <= cache_bytes
    if cached:  # one buffer, which worker processes share
        places = torch.empty(sum(num_bytes), dtype=torch.uint8).split(num_bytes)
        found = _each(_decode_into, list(zip(images, places, strict=True)), image_size)
    kept = [i for i, f in enumerate(found) if not isinstance(f, UnusablePicture)]
    skipped = [
        f"{f.relative_to(folder)} ({found[i]})" for i, f in enumerate(files) if i not in set(kept)
    ]
    if not kept:
        raise ValueError(_none_left(len(files), image_size))
    if skipped:
        more = f", and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        listed = ", ".join(skipped[:10]) + more
        rank_zero_warn(f"{len(skipped)} of {len(files)} pictures in {folder} skipped: {listed}.")
    captions, rows = read_captions(root), []
    stems = Counter(f.stem for f in files)
    for i in kept:
        file, text = files[i], files[i].with_suffix(".txt")
        caption = text.read_text("utf-8").strip() if text.is_file() else captions.get(file, "")
        inner = file.relative_to(folder).with_suffix("")
        name = file.stem if stems[file.stem] == 1 else "__".join(inner.parts)
        rows.append({"image": images[i], "caption": caption, "name": name})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    return Split(table, [found[i] for i in kept] if cached else None)


def _decode_into(image_and_place: tuple[dict[str, Any], Tensor], image_size: int) -> Tensor:
    image, place = image_and_place
    picture = decode(image, image_size)
    return place.copy_(picture.flatten()).view(picture.shape)


def _each(read: Callable[..., Any], arguments: list[Any], image_size: int) -> list[Any]:
    """`read` of every argument, by threads; the error itself where the picture is unusable."""

    def attempt(argument: Any) -> Any:
        try:
            return read(argument, image_size)
        except UnusablePicture as reason:
            return reason

    with ThreadPoolExecutor() as pool:
        return list(pool.map(attempt, arguments))


def load_tables(path: str, streaming: bool) -> dict[str, Any]:
    """Splits of parquet files or of a hub data set, by their own names.

    Raises:
        FileNotFoundError: there is no such thing, or no network.
    """
    import datasets

    missing = (
        f"data.path: {path!r} is no folder of pictures, no parquet file and no data set of the "
        "Hugging Face hub that can be had: correct the path, or look at the network for "
        "owner/name ids."
    )
    files = sorted(glob.glob(path, recursive=True)) if path.endswith(".parquet") else []
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).parent.exists()
    try:
        if files:
            return datasets.load_dataset("parquet", data_files=files, streaming=streaming)
        if Path(path).is_dir() or is_hub_id:
            return datasets.load_dataset(path, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(f"{missing} ({error})") from error
    raise FileNotFoundError(missing)


def as_rows(table: Any, path: str, image_column: str, caption_column: str | None) -> Split:
    """A table with its columns named "image" and, where wanted, "caption"; pictures undecoded.

    Raises:
        ValueError: there is no such column.
    """
    import datasets

    wanted = {image_column: "image"} | ({caption_column: "caption"} if caption_column else {})
    columns = table.column_names or list(next(iter(table)))
    for column, name in wanted.items():
        if column not in columns:
            raise ValueError(
                f"data.{name}_column: {path} has no column {column!r}, choose among {columns}."
            )
    table = table.select_columns(list(wanted))
    table = table.rename_columns({old: new for old, new in wanted.items() if old != new})
    return Split(table.cast_column("image", datasets.Image(decode=False)))


def hold_out(split: Split, num_held: int) -> tuple[Split, Split]:
    """The split without `num_held` pictures spread evenly over it (a stream: its first), and them.

    Raises:
        ValueError: nothing would be left.
    """
    if not hasattr(split.rows, "select"):
        return Split(split.rows.skip(num_held)), Split(split.rows.take(num_held))
    total = len(split.rows)
    if num_held >= total:
        raise ValueError(
            f"data.num_val: {num_held} held-out pictures leave none of {total} to train on, "
            "lower it or give pictures in train/, val/ and test/ sub-folders."
        )
    held = [(2 * i + 1) * total // (2 * num_held) for i in range(num_held)]
    return split.select([i for i in range(total) if i not in set(held)]), split.select(held)


class ImageData(LightningDataModule):
    """Photographs and captions for training, validation and test.

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

    Raises:
        ValueError: an argument is out of range (from here); no picture is usable (from `setup`).
        FileNotFoundError: `path` leads nowhere (from `setup`).
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
        self._parts: dict[str, Callable[[], Split]] | None = None
        self._loaded: dict[str, Split] = {}
        self._pictures: dict[str, Pictures | None] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open the source and check its pictures, for the splits that `stage` needs."""
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
        root = BUNDLED_PHOTOS if path == "bundled" else Path(path)
        if root.is_dir() and not any(root.glob("*.parquet")):
            if self.streaming:
                raise ValueError(
                    f"data.streaming: {path} is a folder of pictures, which is never read at once: "
                    "streaming is for parquet files and hub data."
                )
            folders = {SPLIT_NAMES[d.name]: d for d in root.iterdir() if d.name in SPLIT_NAMES}
            return {
                name: partial(read_folder, root, folder, self.image_size, self.cache_bytes)
                for name, folder in (folders or {"train": root}).items()
            }
        tables = load_tables(path, self.streaming)
        known = {SPLIT_NAMES[name]: t for name, t in tables.items() if name in SPLIT_NAMES}
        if not known and len(tables) > 1:
            raise ValueError(f"data.path: {path} has splits {list(tables)}, none is named train.")
        known = known or {"train": next(iter(tables.values()))}
        return {
            name: partial(as_rows, table, path, self.image_column, self.caption_column)
            for name, table in known.items()
        }
