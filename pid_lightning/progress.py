"""A progress bar over network evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def progress_bar(total: int, told: str, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar; yields a function that advances it by one.

    Args:
        total: number of evaluations.
        told: label of the bar.
        shown: whether to show the bar.
    """
    with tqdm(total=total, desc=told, disable=not shown, leave=False) as bar:

        def advance() -> None:
            bar.update()

        yield advance
