"""Batches prepared on the side stream are the same, and so are the weights after training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch

from pid_lightning import EMA
from pid_lightning.training.side_stream import SideStream

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Watched:
    """Replaces `SideStream`: prepares immediately and records the results."""

    def __init__(self) -> None:
        self.prepared: list[object] = []
        self.num_catches = 0

    def run(self, prepare: Callable[[], object]) -> object:
        self.prepared.append(prepare())
        return self.prepared[-1]

    def catch_up(self) -> None:
        self.num_catches += 1


class Swap(pl.Callback):
    """Replaces the module's side stream by another or by none."""

    def __init__(self, other: object) -> None:
        self.other = other

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module._side_stream = self.other


def test_copies_and_latents_of_training_alone_are_prepared_beside_it(tmp_path: Path) -> None:
    watched = Watched()
    limits = {"limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 0}
    beside = tiny.fit(tmp_path / "a", 3, Swap(watched), EMA(), **limits)
    batches, samples = watched.prepared[::2], watched.prepared[1::2]
    assert len(batches) == len(samples) == watched.num_catches == 3
    for batch, sample in zip(batches, samples, strict=True):
        assert torch.equal(batch["image"], sample.x0)
        assert batch["number"].tolist() == sample.numbers
    alone = tiny.fit(tmp_path / "b", 3, **limits)
    tiny.assert_equal_states(beside.state_dict(), alone.state_dict())


@needs_cuda
def test_on_a_gpu_training_takes_the_same_steps(tmp_path: Path) -> None:
    on_gpu = {"accelerator": "gpu"}
    beside = tiny.fit(tmp_path / "a", 4, **on_gpu)
    alone = tiny.fit(tmp_path / "b", 4, Swap(None), EMA(), **on_gpu)
    assert isinstance(beside._side_stream, SideStream)
    for name, weight in beside.state_dict().items():  # sums on a GPU have no fixed order
        assert torch.allclose(weight, alone.state_dict()[name], rtol=0, atol=1e-4), name


@needs_cuda
def test_what_was_prepared_is_complete_when_training_reads_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    side, total = SideStream(device), torch.zeros((), device=device)
    for i in range(50):
        made = side.run(lambda i=i: [torch.full((2**22,), float(i), device=device) + 1])
        total += made[0].mean()
        del made
    assert total.item() == sum(range(1, 51))
