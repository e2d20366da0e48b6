"""Stopwatch: how the forward time of a step divides among networks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of named blocks.

    Attributes:
        is_running: whether blocks are timed on a GPU, which has to be synchronised for that; on a
            CPU they always are.
    """

    def __init__(self) -> None:
        self.is_running = False
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's duration to that of `name`."""
        if torch.cuda.is_available() and not self.is_running:
            yield
            return
        start = _now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + _now() - start

    def take_shares(self) -> dict[str, float]:
        """Each name's share of the time since the last call; empty if nothing was timed."""
        total = sum(self._seconds.values())
        shares = {name: seconds / total for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return shares


def _now() -> float:
    """Seconds, after queued GPU work has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
