"""Two processes (gloo, CPU) train the same networks as one process with the same batches."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import processes
import pytest
import tiny
import torch
from torch import Tensor

from pid_lightning import DMD2, EMA
from pid_lightning.files import models as weights

NUM_STEPS = 4
GLOBAL_BATCH = 4
NETWORKS = (
    "denoiser",
    "denoiser_ema",
    "distillation.fake_score",
    "distillation.discriminator",
)


def train(folder: Path, teacher: Path | None, num_ranks: int) -> None:
    """Train a few steps as one of `num_ranks` processes; each saves its final state."""
    callbacks = [EMA()]
    if teacher is not None:
        callbacks.insert(0, DMD2(str(teacher), student_every=2, taps=(0, 1), learning_rate=1e-3))
    settings = {}
    if num_ranks > 1:
        name = "ddp" if teacher is None else "ddp_find_unused_parameters_true"
        settings = {"devices": num_ranks, "strategy": name}
    fitted = tiny.fit(
        folder / f"of_{num_ranks}",
        NUM_STEPS,
        *callbacks,
        batch_size=GLOBAL_BATCH // num_ranks,
        gradient_clip_val=1.0,
        **settings,
    )
    rank = os.environ.get("LOCAL_RANK", "0")
    torch.save(fitted.state_dict(), folder / f"rank_{rank}_of_{num_ranks}.pt")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a short training run in this process."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny.fit(folder, 2, EMA())
    return folder / "last.ckpt"


def networks(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state that a process saved, by network."""
    state = torch.load(path, weights_only=True)
    return {
        network: {k: v for k, v in state.items() if k.startswith(f"{network}.")}
        for network in NETWORKS
        if any(k.startswith(f"{network}.") for k in state)
    }


@pytest.mark.parametrize("kind", ["plain", "distilled"])
def test_two_processes_are_one_with_their_batches_together(
    kind: str, teacher: Path, tmp_path: Path
) -> None:
    distilled = teacher if kind == "distilled" else None
    alone = processes.start(tmp_path / "log", train, tmp_path, distilled, 1)
    processes.run_ranks(tmp_path / "log", train, tmp_path, distilled, 2)
    processes.finish(alone, tmp_path / "log")
    first, second, single = (
        networks(tmp_path / f"rank_{name}.pt") for name in ("0_of_2", "1_of_2", "0_of_1")
    )
    assert set(first) == set(NETWORKS if distilled else NETWORKS[:2])
    tiny.assert_equal_states(first, second)  # gradients are reduced over processes
    for network, state in single.items():
        # Not bit for bit: halves of a batch are summed separately and then averaged, and Adam
        # divides by the gradient's own size, so rounding decides the step where a gradient is
        # almost zero. The network as a whole must agree.
        ours, theirs = (
            torch.cat([tensor.flatten() for tensor in tensors.values()])
            for tensors in (first[network], state)
        )
        error = (ours - theirs).norm() / theirs.norm()
        print(f"{kind} {network}: relative difference {error:.1e}")
        assert error < 1e-5, network
    # Much less than the training moved it.
    start = weights.load_model(teacher)[0] if distilled else tiny.module().denoiser
    before, ours, theirs = (
        torch.cat([tensor.flatten() for tensor in tensors.values()])
        for tensors in (start.state_dict(), first["denoiser"], single["denoiser"])
    )
    assert (ours - theirs).norm() < 1e-3 * (theirs - before).norm()


@pytest.mark.slow
def test_the_table_is_the_same_from_two_processes(teacher: Path, tmp_path: Path) -> None:
    config = processes.write_config(tmp_path)

    def start(*arguments: str) -> tuple[str, ...]:
        return (f"--config={config}", "--data.num_val=3", *arguments)

    def table(version: int) -> list[list[str]]:
        with open(tmp_path / f"runs/tiny/version_{version}/test_metrics.csv") as file:
            rows = list(csv.reader(file))
        kept = [i for i, name in enumerate(rows[0]) if not name.startswith(("seconds", "peak"))]
        return [[row[i] for i in kept] for row in rows]

    log, testing = tmp_path / "log", ("test", *start(f"--ckpt_path={teacher}"))
    processes.finish(processes.start(log, processes.run_pid, tmp_path, *testing), log)
    alone = table(0)
    both = (*testing, "--trainer.devices=2", "--trainer.strategy=ddp")
    processes.run_ranks(log, processes.run_pid, tmp_path, *both)
    together = table(1)
    assert together[0] == alone[0]
    for ours, theirs in zip(together[1:], alone[1:], strict=True):  # 3 pictures on 2 processes
        for one, other in zip(ours, theirs, strict=True):
            try:
                assert float(one) == pytest.approx(float(other), rel=1e-4)
            except ValueError:
                assert one == other
    folders = sorted(path.name for path in (tmp_path / "runs/tiny").iterdir())
    assert folders == ["version_0", "version_1"]
