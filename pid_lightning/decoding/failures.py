"""Files that cannot be decoded, while the rest is."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tqdm.auto import tqdm

from pid_lightning.checks import Mistake, one_line
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.files import read_input


class Failures:
    """Why some of `num_files` could not be decoded: told as it happens, and raised at the end.

    Attributes:
        reasons: a sentence for each of them.
    """

    def __init__(self, num_files: int) -> None:
        self.num_files = num_files
        self.reasons: dict[Path, str] = {}
        self._fault: Exception | None = None

    @contextmanager
    def of(self, file: Path) -> Iterator[None]:
        """Take what goes wrong with one file as its failure, but for errors of the machine."""
        try:
            yield
        except OSError:  # a full disk fails the next one too
            raise
        except Exception as error:
            if isinstance(error, Mistake):
                self.reasons[file] = error.sentence.rstrip(".")
                return
            line = str(error).partition("\n")[0]
            self.reasons[file] = f"{file} ({type(error).__name__}: {line})"
            if "memory" not in line:  # which is a large file's, and no fault of the package
                traceback.clear_frames(error.__traceback__)  # they hold its tensors
                self._fault = self._fault or error

    def show(self) -> None:
        """Print what has failed, if anything has."""
        if self.reasons:
            tqdm.write(f"pid: {one_line(str(self))}", file=sys.stderr)

    def tell(self) -> None:
        """End what has decoded the rest.

        Raises:
            Mistake: there are failures.
            Exception: a fault of the package is among them.
        """
        if self._fault is not None:
            raise self._fault
        if self.reasons:
            raise Mistake("inputs", str(self))

    def __str__(self) -> str:
        more = f", and {len(self.reasons) - 3} more" if len(self.reasons) > 3 else ""
        told = "; ".join(list(self.reasons.values())[:3]) + more
        return f"{len(self.reasons)} of {self.num_files} cannot be decoded: {told}."


def find_unreadable(
    decoder: PiDDecoder, files: Sequence[Path], named: Collection[Path]
) -> Failures:
    """Read every file, to find a bad last one now and not after hours.

    Args:
        decoder: the model.
        files: pictures and latents.
        named: those of them that a user named, and did not leave to a folder.

    Raises:
        Mistake: a named file is damaged, or its latents do not fit the model; or all are.
    """
    failures = Failures(len(files))
    for file in files:
        with nullcontext() if file in named else failures.of(file):
            read_input(decoder, file)
    if len(failures.reasons) == len(files):
        failures.tell()
    failures.show()
    return failures
