"""The next batch's latents, made on a GPU's stream of their own while the current batch trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class SideStream:
    """Runs preparations beside the training that a GPU has been asked for and has yet to finish.

    On one stream the next batch's copy and latents would wait for the end of the current step,
    and the CPU with them wherever it reads a number of theirs.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.catch_up()

    def run(self, prepare: Callable[[], T]) -> T:
        """The result of `prepare`, complete before the training's next operation.

        Args:
            prepare: reads nothing that training writes.
        """
        with torch.cuda.stream(self._stream):
            prepared = prepare()
        training = torch.cuda.current_stream(self._stream.device)
        training.wait_stream(self._stream)
        for value in tree_leaves(prepared):
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(training)  # or its memory may be taken before that is through
        return prepared

    def catch_up(self) -> None:
        """Let preparations see what other work, such as loading or validation, wrote till now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
