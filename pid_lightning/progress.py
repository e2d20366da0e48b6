"""A bar over evaluations of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def progress_bar(total: int, told: str, shown: bool) -> Iterator[Callable[[], None]]:
    """Yields what advances the bar.

    Args:
        total: evaluations to come.
        told: what is decoded.
        shown: whether there is a bar to see.
    """
    with tqdm(total=total, desc=told, disable=not shown, leave=False) as bar:
        yield lambda: bar.update() and None
