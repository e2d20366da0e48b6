"""Which draw comes when: endless shuffled passes over the rows, and a loader that can resume."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from pid_lightning.checks import Mistake
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.pictures.pixels import UnusablePicture
from pid_lightning.training.data.rows import check_picture
from pid_lightning.training.data.samples import MAX_TRIES, Pictures
from pid_lightning.training.data.splits import fail_without_pictures

if TYPE_CHECKING:
    import datasets

SHUFFLE_BUFFER = 1000  # rows in the shuffle buffer of a stream


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
        # None, of a single pass over a stream, is a TypeError here, which is "no length" to
        # Lightning.
        return operator.index(self.num_batches)

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
        for row in _intact(rows):
            row = {"name": f"{num_rows:06d}", **row}
            num_rows += 1
            try:
                check_picture(row, self.pictures.image_size)
            except UnusablePicture as reason:
                self.pictures.skip(row["name"], reason)
                if num_usable == 0 and num_rows == MAX_TRIES:
                    break
                continue
            num_usable += 1
            yield row
        if num_usable == 0:
            if num_rows:
                self.pictures.fail()
            # All of them were held out.
            fail_without_pictures("data.num_val", 0, self.pictures.image_size)


def _intact(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except (OSError, ValueError) as error:  # what damaged parquet leads to, and a lost network
        raise Mistake(
            "data.path", f"the stream broke off ({error}); check its files, or the network."
        ) from error


class ResumableLoader:
    """Batches from the trainer's current position, which is read when an iteration starts.

    The trainer's count of trained batches is the only state. This is not a `DataLoader` because
    with several processes Lightning would replace its sampler. A loader with `state_dict` and
    `load_state_dict` counts as resumable within an epoch in Lightning; here they hold the values
    that must not change for the batches to match those of an uninterrupted run.
    """

    def __init__(self, draws: ShuffledDraws, num_workers: int) -> None:
        self.draws = draws
        self.loader: DataLoader[Any] = make_loader(draws.pictures, num_workers, draws)

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.loader)

    def state_dict(self) -> dict[str, int]:
        """The seed and the global batch size."""
        global_batch_size = self.draws.batch_size * self.draws.world_size
        return {"seed": self.draws.pictures.seed, "global batch size": global_batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Warn of a value that has changed."""
        for name, current in self.state_dict().items():
            if state[name] != current:
                rank_zero_warn(
                    f"data: the {name} was {state[name]} in the checkpoint and is {current} now, "
                    "so batches will differ from those of an uninterrupted run; restore the old "
                    "value to avoid this."
                )


def make_loader(
    samples: Dataset[Any], num_workers: int, batches: ShuffledDraws | None, batch_size: int = 1
) -> DataLoader[Any]:
    """A `DataLoader` over `batches` of items, or over all samples in order."""
    which = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
    return DataLoader(
        samples,
        **which,
        num_workers=num_workers,
        collate_fn=samples.collate if isinstance(samples, Pictures) else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # keeps iteration from drawing from the global generator
    )
