"""Splits: which names say train, val or test, and the rows of one of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.pictures.pixels import PICTURE_SUFFIXES
from pid_lightning.training.data.rows import first_text

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "valset"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "eval", "evaluation"), "test"),
}
MAX_REASONS = 6  # that a line lists


@dataclass
class Origin:
    """What the rows of a split were taken from, as it is told.

    Attributes:
        of: "of 12 files", or the like.
        where: the path.
        left_out: how many were not taken, by reason.
    """

    of: str
    where: str
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass
class Split:
    """Rows {"file" or "image", "caption"?, "name"?}, see `rows`, and their pixels if cached."""

    rows: datasets.Dataset | datasets.IterableDataset
    origin: Origin
    pixels: list[Tensor] | None = None

    @property
    def is_stream(self) -> bool:
        """Whether rows come one after the other, and their number is not known."""
        return not hasattr(self.rows, "select")

    def select(self, indices: list[int], origin: Origin) -> Split:
        """The rows at these indices."""
        pixels = None if self.pixels is None else [self.pixels[i] for i in indices]
        return Split(self.rows.select(indices), origin, pixels)

    def hold_out(self, num_held: int, least: int) -> tuple[Split, Split]:
        """Hold out rows, spread evenly (of a stream, the first); returns (rest, held out).

        Args:
            num_held: how many.
            least: how many are needed.

        Raises:
            Mistake: they are fewer than needed, or all.
        """
        total = math.inf if self.is_stream else len(self.rows)
        if not least <= num_held < total:
            raise Mistake(
                "data.num_val",
                f"{num_held} pictures cannot be held out of {total}: at least {least} must be, and "
                "one must be left to train on; change it, or give splits named train and val.",
            )
        left_out = self.origin.left_out + Counter({"held out": num_held})
        of_rest = replace(self.origin, left_out=left_out)
        of_held = Origin("held out of train", self.origin.where)
        if self.is_stream:
            return Split(self.rows.skip(num_held), of_rest), Split(
                self.rows.take(num_held), of_held
            )
        held = [(2 * i + 1) * total // (2 * num_held) for i in range(num_held)]
        rest = sorted(set(range(total)) - set(held))
        return self.select(rest, of_rest), self.select(held, of_held)

    def __str__(self) -> str:
        """What was taken, in a line."""
        if self.is_stream:
            told = f"pictures {self.origin.of}"
        else:
            number = self._num_captions() or "none"
            told = f"{count(len(self.rows), 'picture')} {self.origin.of}, {number} with captions"
        reasons = self.origin.left_out.most_common()
        listed = [f"{number} {reason}" for reason, number in reasons[:MAX_REASONS]]
        if len(reasons) > MAX_REASONS:
            listed.append(f"{sum(number for _, number in reasons[MAX_REASONS:])} more")
        left_out = f"; left out: {', '.join(listed)}" if listed else ""
        return f"{told}{left_out}; from {self.origin.where}"

    def _num_captions(self) -> int:
        if "caption" not in self.rows.column_names:
            return 0
        table = self.rows.select_columns(["caption"]).with_format("arrow")[:]
        chunks = table["caption"].chunks
        return sum(bool(first_text(value)) for chunk in chunks for value in chunk.to_pylist())


def count(number: int, noun: str) -> str:
    """A number of something, in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def name_splits(names: Iterable[str]) -> dict[str, list[str]]:
    """Which of some names of folders or files say "train", "val" or "test".

    Names that are one word for a split ("Train", "dev") come first. Where they are not, others with
    such a word ("DIV2K_train_HR", "validation-00000") count if several splits are named so.
    """
    exact: dict[str, list[str]] = {}
    loose: dict[str, list[str]] = {}
    for name in names:
        words = re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower())
        meant = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        if len(meant) == 1:
            kind = exact if name.lower() in SPLIT_WORDS else loose
            kind.setdefault(meant.pop(), []).append(name)
    found = loose | exact
    return found if exact or len(found) > 1 else {}


def fail_without_pictures(
    option: str, num_skipped: int, image_size: int, reason: object = ""
) -> NoReturn:
    """Tell that no picture of a source is usable.

    Raises:
        Mistake: always.
    """
    because = f" ({reason})" if reason else ""
    raise Mistake(
        option,
        f"none of {num_skipped} pictures is usable at image_size {image_size}{because}; give "
        f"{', '.join(PICTURE_SUFFIXES)} files with both sides at least that long, or lower "
        "image_size or num_val.",
    )
