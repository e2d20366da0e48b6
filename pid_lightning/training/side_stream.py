"""Prepares the next batch's latents on a side stream while the current batch trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class SideStream:
    """Runs preparation on its own GPU stream, concurrently with queued training work.

    On a single stream the next batch's copy and latents would wait for the current step, and so
    would the CPU whenever it reads one of their values.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.catch_up()

    def run(self, prepare: Callable[[], T]) -> T:
        """Run `prepare` on the side stream; training's next operation waits for its result.

        Args:
            prepare: must not read anything that training writes.
        """
        with torch.cuda.stream(self._stream):
            prepared = prepare()
        training = torch.cuda.current_stream(self._stream.device)
        training.wait_stream(self._stream)
        for value in tree_leaves(prepared):
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(training)  # or its memory may be reused while training reads it
        return prepared

    def catch_up(self) -> None:
        """Make preparation wait for other work so far, such as loading or validation."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
