"""What a sample is: a crop of a picture, its caption, name and number; and batches of samples."""

from __future__ import annotations

import math
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.pictures.pixels import UnusablePicture
from pid_lightning.training.data.rows import decode, first_text
from pid_lightning.training.data.splits import Split, fail_without_pictures

MAX_TRIES = 1000  # consecutive unusable pictures before a source is rejected
Resize = Literal["none", "random"]


def centre_crop(picture: Tensor, image_size: int) -> Tensor:
    """The central crop (3, S, S) of a picture (3, H, W), S = `image_size`."""
    return centre_crop_to(picture, image_size, image_size)


def centre_crop_to(picture: Tensor, height: int, width: int) -> Tensor:
    """The central crop (3, height, width) of a picture (3, H, W)."""
    top, left = ((a - b) // 2 for a, b in zip(picture.shape[-2:], (height, width), strict=True))
    return picture[:, top : top + height, left : left + width]


def random_crop(
    picture: Tensor, image_size: int, resize: Resize, flip: bool, generator: torch.Generator
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


class Pictures(Dataset[dict[str, Any] | None]):
    """Crops of one split: random for training, otherwise central.

    Items are requested by (key, draw): a picture's index or a row of a stream, and the number of
    the draw, which determines the crop together with the seed. An unusable picture is replaced by
    the next one, so that batches stay full; an unusable row of a stream returns None.
    """

    def __init__(
        self, split: Split, image_size: int, train: bool, resize: Resize, flip: bool, seed: int
    ) -> None:
        self.split = split
        self.image_size = image_size
        self.train = train
        self.resize = resize
        self.flip = flip
        self.seed = seed
        self.num_skipped: int = 0
        self.last_reason: str = ""

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
        self.fail()

    def _sample(
        self, row: dict[str, Any], pixels: Tensor | None, draw: int
    ) -> dict[str, Any] | None:
        try:
            picture = decode(row, self.image_size) if pixels is None else pixels
        except UnusablePicture as reason:
            self.skip(row["name"], reason)
            return None
        if self.train:
            (generator,) = sample_generators(self.seed, "crop", [draw])
            picture = random_crop(picture, self.image_size, self.resize, self.flip, generator)
        else:
            picture = centre_crop(picture, self.image_size)
        image, caption = picture.float() / 127.5 - 1, first_text(row.get("caption"))
        return {"image": image, "caption": caption, "name": row["name"], "number": draw}

    def skip(self, name: str, reason: UnusablePicture) -> None:
        """Count a skipped picture and warn at the 1st, 10th, 100th, ..."""
        self.num_skipped += 1
        self.last_reason = str(reason)
        if math.log10(self.num_skipped).is_integer():
            rank_zero_warn(
                f"{self.num_skipped} picture(s) skipped so far, most recently {name}: {reason}."
            )

    def fail(self) -> NoReturn:
        """Tell that no picture is usable, and why the last one is not.

        Raises:
            Mistake: always.
        """
        size = self.image_size
        fail_without_pictures("data.path", self.num_skipped, size, self.last_reason)

    def collate(self, samples: list[dict[str, Any] | None]) -> dict[str, Any]:
        """Samples to a batch, see `ImageData`."""
        usable = [sample for sample in samples if sample is not None]
        if not usable:
            self.fail()
        batch = {key: [sample[key] for sample in usable] for key in usable[0]}
        image, number = torch.stack(batch["image"]), torch.tensor(batch["number"])
        return {**batch, "image": image, "number": number}
