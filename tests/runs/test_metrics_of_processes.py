"""What two processes measure together is what one measures alone."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from pid_lightning.pictures.lpips import lpips_network
from pid_lightning.pictures.metrics import PictureMetrics
from pid_lightning.pictures.resizing import reduce_picture


def _measure_share(ranks: tuple[int, ...]) -> list[dict]:
    """Rank 0 measures three pictures in two rows, rank 1 one picture in one row."""
    measured = PictureMetrics(lpips_network())
    generator = torch.Generator().manual_seed(0)
    target, prediction = (torch.rand(4, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2))
    low = reduce_picture(target, 4)
    shares = [(0, slice(0, 2), 0.8), (0, slice(2, 3), 0.0), (1, slice(3, 4), 0.8)]
    for rank, part, sigma in shares:
        if rank in ranks:
            pictures = (prediction[part], target[part], low[part])
            measured.update(("PiD", sigma), *pictures, 4, 2.0 + rank, 2**20 * (rank + 1))
    return measured.compute()


def _measure_as_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(_measure_share((rank,)), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    other = torch.multiprocessing.get_context("spawn").Process(
        target=_measure_as_rank, args=(1, str(tmp_path)), daemon=True
    )
    other.start()
    _measure_as_rank(0, str(tmp_path))
    other.join()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert [row["num_pictures"] for row in first] == [1, 3]
    for row, alone in zip(first, _measure_share((0, 1)), strict=True):
        assert row.keys() == alone.keys()
        for key, value in alone.items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
            assert row[key] == same
