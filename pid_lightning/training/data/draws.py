"""Order of the samples: crops, endless shuffled draws, and a loader that can resume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.training.data.sources import (
    Split,
    UnusablePicture,
    check_header,
    decode,
    none_left,
)

if TYPE_CHECKING:
    import datasets

SHUFFLE_BUFFER = 1000  # rows in the shuffle buffer of a stream
MAX_TRIES = 1000  # consecutive unusable pictures before a source is rejected


def centre_crop(picture: Tensor, image_size: int) -> Tensor:
    """The central crop (3, S, S) of a picture (3, H, W), S = `image_size`."""
    return centre_crop_to(picture, image_size, image_size)


def centre_crop_to(picture: Tensor, height: int, width: int) -> Tensor:
    """The central crop (3, height, width) of a picture (3, H, W)."""
    top, left = ((a - b) // 2 for a, b in zip(picture.shape[-2:], (height, width), strict=True))
    return picture[:, top : top + height, left : left + width]


def random_crop(
    picture: Tensor, image_size: int, resize: str, flip: bool, generator: torch.Generator
) -> Tensor:
    """A random crop (3, S, S) of a uint8 picture (3, H, W), S = `image_size`.

    With `resize` "random" the picture is first downsized so that its shorter side is uniform
    between S and its original length; only the cropped window is actually resampled.
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
    """Crops of one split: random for training, otherwise central.

    Items are requested by (key, draw): a picture's index or a row of a stream, and the number of
    the draw, which determines the crop together with the seed. An unusable picture is replaced by
    the next one, so that batches stay full; an unusable row of a stream returns None.
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
        raise ValueError(none_left(self.num_skipped, self.image_size))

    def _sample(self, row: dict[str, Any], pixels: Tensor | None, draw: int) -> dict | None:
        try:
            picture = decode(row["image"], self.image_size) if pixels is None else pixels
        except UnusablePicture as reason:
            self.report(row["name"], reason)
            return None
        if self.train:
            (generator,) = sample_generators(self.seed, "crop", [draw])
            picture = random_crop(picture, self.image_size, self.resize, self.flip, generator)
        else:
            picture = centre_crop(picture, self.image_size)
        caption = row.get("caption") or ""
        caption = caption if isinstance(caption, str) else caption[0] or ""
        image = picture.float() / 127.5 - 1
        return {"image": image, "caption": caption, "name": row["name"], "number": draw}

    def report(self, name: str, reason: UnusablePicture) -> None:
        """Count a skipped picture and warn at the 1st, 10th, 100th, ..."""
        self.num_skipped += 1
        if math.log10(self.num_skipped).is_integer():
            rank_zero_warn(
                f"{self.num_skipped} picture(s) skipped so far, most recently {name}: {reason}."
            )


def collate(samples: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Samples to a batch (see `ImageData`): tensors stacked, everything else in lists."""
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        raise ValueError("data.path: all pictures in a batch of the stream are damaged; check it.")
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    stacked = {key: torch.stack(v) for key, v in batch.items() if isinstance(v[0], Tensor)}
    return {**batch, **stacked, "number": torch.tensor(batch["number"])}


@dataclass
class ShuffledDraws:
    """Batches of (index, draw) from an endless sequence of shuffled passes over the pictures.

    Draw j is element j % n of pass j // n over n pictures. Global batch b starts at draw
    b * batch_size * world_size, and its draws go to the ranks in turn. `position` is called when
    an iteration starts and returns the number of batches already trained on.
    """

    pictures: Pictures
    num_batches: int | None
    batch_size: int
    rank: int
    world_size: int
    position: Callable[[], int]

    def __len__(self) -> int:
        if self.num_batches is None:  # Lightning takes a TypeError to mean "no length"
            raise TypeError("a single pass over a stream has no length; iterate over it instead.")
        return self.num_batches

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
        order, current_pass, num_pictures = torch.empty(0), -1, len(self.pictures)
        for draw in itertools.count(first):
            number, position = divmod(draw, num_pictures)
            if number != current_pass:
                (generator,) = sample_generators(self.pictures.seed, "order", [number])
                order, current_pass = torch.randperm(num_pictures, generator=generator), number
            yield draw, int(order[position])


class StreamedDraws(ShuffledDraws):
    """The same for the rows of a stream: endless and buffer-shuffled for training, else one pass.

    Rows with an unusable image header are not counted. On resume, rows before `first` are read and
    dropped without decoding, because a stream cannot be entered in the middle.
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
            raise ValueError(none_left(num_rows, self.pictures.image_size))


class ResumableLoader:
    """Batches from the trainer's current position, which is read when an iteration starts.

    The trainer's count of trained batches is the only state. This is not a `DataLoader` because
    with several processes Lightning would replace its sampler. A loader with `state_dict` and
    `load_state_dict` counts as resumable within an epoch in Lightning; here they hold the values
    that must not change for the batches to match those of an uninterrupted run.
    """

    def __init__(self, draws: ShuffledDraws, num_workers: int) -> None:
        self.draws, self.loader = draws, make_loader(draws.pictures, num_workers, draws)

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.loader)

    def state_dict(self) -> dict[str, int]:
        draws = self.draws
        global_batch_size = draws.batch_size * draws.world_size
        return {"seed": draws.pictures.seed, "global batch size": global_batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, current in self.state_dict().items():
            if state[name] != current:
                rank_zero_warn(
                    f"data: the {name} was {state[name]} in the checkpoint and is {current} now, "
                    "so batches will differ from those of an uninterrupted run; restore the old "
                    "value to avoid this."
                )


def make_loader(
    samples: Dataset, num_workers: int, batches: ShuffledDraws | None, batch_size: int = 1
) -> DataLoader:
    """A `DataLoader` over `batches` of items, or over all samples in order."""
    which = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
    return DataLoader(
        samples,
        **which,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # keeps iteration from drawing from the global generator
    )
