"""Runs of the command line: what they leave behind, and that they go on exactly."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import processes
import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pid_lightning import DMD2, EMA
from pid_lightning.__main__ import main
from pid_lightning.files.hub import find_last_checkpoint
from pid_lightning.training.callbacks import LastCheckpoint
from pid_lightning.training.stopwatch import Stopwatch

NUM_STEPS = 10
STATE = ("state_dict", "optimizer_states", "lr_schedulers", "pid", "global_step")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and its finished run of 4 steps."""
    folder = tmp_path_factory.mktemp("runs")
    config = processes.write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pid"])
        main(["fit", f"--config={config}"])
    return folder


@pytest.fixture(autouse=True)
def as_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Away from other runs, without network, and without pytest's own arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["pid"])


def test_an_earlier_runs_checkpoint_is_not_replaced(runs: Path) -> None:
    fit = ["fit", f"--config={runs / 'tiny.yaml'}", "--trainer.max_steps=1"]
    fit += ["--trainer.callbacks=ModelCheckpoint", "--trainer.logger=CSVLogger"]
    fit += ["--trainer.logger.save_dir=csv", "--trainer.logger.version=v"]
    main(fit)
    last = Path("csv/tiny/v/checkpoints/last.ckpt")

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path().rglob("*.*")}

    before = files()
    with pytest.raises(SystemExit) as stopped:
        main(fit)
    assert stopped.value.code == 2
    main([*fit, "--trainer.fast_dev_run=true"])
    assert files() == before  # and the logger did not begin its table anew
    main([*fit, "--trainer.max_steps=2", f"--ckpt_path={last}"])
    assert torch.load(last, weights_only=True)["global_step"] == 2


class SendSIGTERM(pl.Callback):
    """Sends it to this process in a validation batch."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        trained = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if trained == self.num_batches and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("num_batches", "accumulate", "step"),
    [pytest.param(4, 1, 4, marks=pytest.mark.slow), (4, 2, 3)],
    ids=["last", "accumulating"],
)
def test_sigterm_in_a_validation_saves_between_steps_and_resumes_exactly(
    num_batches: int, accumulate: int, step: int, runs: Path, tmp_path: Path
) -> None:
    fit = ["fit", f"--config={runs / 'tiny.yaml'}", "--trainer.val_check_interval=1"]
    fit += ["--trainer.check_val_every_n_epoch=null", "--trainer.max_steps=4"]
    fit += [f"--trainer.accumulate_grad_batches={accumulate}", "--test_after_fit=true"]
    main([*fit, "--trainer.logger.save_dir=whole"])
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    sent = (f"--trainer.callbacks+={__name__}.SendSIGTERM",)
    sent += (f"--trainer.callbacks.num_batches={num_batches}",)
    with pytest.raises(SystemExit) as stopped:
        main([*fit, "--trainer.logger.save_dir=parts", *sent])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    last = tmp_path / "parts/tiny/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step
    assert not (last.parent.parent / "test_metrics.csv").exists()  # no test
    main([*fit, "--trainer.logger.save_dir=parts", f"--ckpt_path={last}"])
    assert_ends_equal(last, tmp_path / "whole/tiny/version_0/checkpoints/last.ckpt", 4)


@pytest.mark.slow
def test_validate_takes_the_callbacks_and_the_logger_of_any_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = runs / "runs/tiny/version_0/checkpoints/last.ckpt"
    saver = "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=train/loss"
    for given in (saver, ("--trainer.logger=true",)):
        main(["validate", f"--config={runs / 'tiny.yaml'}", f"--ckpt_path={last}", *given])
        assert "validate/loss" in capsys.readouterr().out


# What a run leaves behind.


def test_curves_pictures_gates_and_config_are_in_tensorboard(runs: Path) -> None:
    (events,) = (runs / "runs/tiny/version_0").glob("events.*")
    found = EventAccumulator(str(events)).Reload()
    tags = found.Tags()
    wanted = ["train/loss", "train/velocity_loss", "train/gradient_norm", "train/images_per_second"]
    for tag in wanted:
        values = [event.value for event in found.Scalars(tag)]
        assert len(values) >= 3
        assert min(values) > 0
    assert [event.step for event in found.Scalars("train/loss")] == [0, 1, 2, 3]
    rates = [event.value for event in found.Scalars("lr-AdamW")]
    assert rates == pytest.approx([0.0005, 0.001, 0.001, 0.001])
    assert "validate/loss" in tags["scalars"]
    assert "gates/injection_0/sigma_0.8" in tags["scalars"]
    assert "pictures" in tags["images"]
    (text,) = (tag for tag in tags["tensors"] if tag.startswith("config"))
    assert "class_path: pid_lightning.VAEPiD" in str(found.Tensors(text)[0].tensor_proto)


def test_images_per_second_are_honest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seconds:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 0.5
            return self.now

    seen = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            seen.append(trainer.callback_metrics.get("train/images_per_second"))

    monkeypatch.setattr("pid_lightning.training.modules.base.time", Seconds())
    tiny.fit(tmp_path, 4, EMA(), Record(), batch_size=3)
    assert seen[-1] == 3 / 0.5  # one reading of the clock a batch


@pytest.mark.slow
def test_last_is_the_newest_run_and_goes_on_in_its_folder(runs: Path, tmp_path: Path) -> None:
    config = f"--config={runs / 'tiny.yaml'}"
    family = tmp_path / "runs/tiny"

    def contents(version: int) -> dict[Path, bytes]:
        files = (family / f"version_{version}").rglob("*")
        return {file: file.read_bytes() for file in files if file.is_file()}

    main(["fit", config, "--trainer.max_steps=2"])
    first = contents(0)
    main(["fit", config, "--trainer.max_steps=2", "--model.training.warmup_steps=3"])
    assert contents(0) == first
    kept = (family / "version_1/config.yaml").read_text()
    assert "warmup_steps: 3" in kept

    main(["fit", config, "--ckpt_path=last"])
    main(["test", config, "--ckpt_path=last"])
    assert contents(0) == first
    assert sorted(path.name for path in family.iterdir()) == ["version_0", "version_1"]
    assert (family / "version_1/config.yaml").read_text() == kept
    assert (family / "version_1/test_metrics.csv").is_file()
    last = torch.load(family / "version_1/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert [p.name for p in (family / "version_1/checkpoints").glob("last*")] == ["last.ckpt"]


@pytest.mark.slow
def test_tests_and_validations_of_a_checkpoint_are_at_its_step_and_replace_nothing(
    tmp_path: Path,
) -> None:
    config, folder = processes.write_config(tmp_path), tmp_path / "runs/tiny/version_0"
    again = (f"--config={config}", "--ckpt_path=last")
    main(["fit", f"--config={config}", "--trainer.max_steps=2", "--test_after_fit=true"])
    first = (folder / "test_metrics.csv").read_bytes()
    main(["test", *again])
    main(["test", *again, "--model.evaluation.steps=3"])
    assert (folder / "test_metrics.csv").read_bytes() == first

    def quality(name: str) -> list[str]:  # without seconds and bytes
        return [",".join(row.split(",")[:6]) for row in (folder / name).read_text().splitlines()]

    tables = [quality(f"test_metrics{n}.csv") for n in ("", "_1", "_2")]
    assert tables[0] == tables[1] != tables[2]
    told = [json.loads((folder / f"test_grid{n}.json").read_text()) for n in ("", "_1", "_2")]
    assert [one["sampling_steps"] for one in told] == [2, 2, 3]
    assert {one["trained_steps"] for one in told} == {2}
    assert {Path(one["weights"]).name for one in told[1:]} == {"last.ckpt"}
    main(["validate", *again])
    found = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in found.Scalars("test/PiD/psnr/sigma_0.8")] == [2, 2, 2]
    assert found.Scalars("validate/loss")[-1].step == 2
    assert {event.step for event in found.Images("pictures")} == {2}


# Stopped anywhere, a run goes on as if it had not been.


@pytest.fixture(scope="module")
def uninterrupted(
    runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Configs and the ends of runs of `NUM_STEPS`, plain and distilled."""
    teacher = runs / "runs/tiny/version_0/checkpoints/last.ckpt"
    found, started = {}, []
    for kind in ("plain", "distilled"):
        folder = tmp_path_factory.mktemp(kind)
        config = processes.write_config(folder, teacher if kind == "distilled" else None)
        started.append((start_fit(folder, config), folder / "log"))
        found[kind] = (config, folder / "runs/tiny/version_0/checkpoints/last.ckpt")
    for process, log in started:
        processes.finish(process, log)
    return found


def start_fit(folder: Path, config: Path, *arguments: str) -> processes.BaseProcess:
    arguments = ("fit", f"--config={config}", f"--trainer.max_steps={NUM_STEPS}", *arguments)
    return processes.start(folder / "log", processes.run_pid, folder, *arguments)


def wait_for_step(folder: Path, process: processes.BaseProcess, step: int) -> None:
    """Until the checkpoint of a step is there."""
    until = time.monotonic() + 60
    while not list(folder.glob(f"runs/tiny/version_0/checkpoints/*step={step}.ckpt")):
        assert process.is_alive(), (folder / "log").read_text()[-2000:]
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_ends_equal(one: Path, other: Path, num_steps: int = NUM_STEPS) -> None:
    states = [torch.load(path, weights_only=True) for path in (one, other)]
    assert states[0]["global_step"] == num_steps
    for part in STATE:
        tiny.assert_equal_states(*(state[part] for state in states), part)


@pytest.mark.parametrize(
    ("kind", "number", "status"),
    [
        ("distilled", signal.SIGTERM, 128 + signal.SIGTERM),
        pytest.param("plain", signal.SIGINT, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_finishes_the_step_and_resumes_exactly(
    kind: str,
    number: signal.Signals,
    status: int,
    uninterrupted: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    config, end = uninterrupted[kind]
    process = start_fit(tmp_path, config)
    wait_for_step(tmp_path, process, 4)
    os.kill(process.pid, number)
    process.join(60)
    log = tmp_path / "log"
    assert process.exitcode == status, log.read_text()[-2000:]
    assert "continue with --ckpt_path last" in log.read_text()
    assert "Traceback" not in log.read_text()
    last = tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt"
    assert 4 <= torch.load(last, weights_only=True)["global_step"] < NUM_STEPS
    processes.finish(start_fit(tmp_path, config, "--ckpt_path=last"), log)
    assert_ends_equal(last, end)
    assert [p.name for p in (tmp_path / "runs/tiny").iterdir()] == ["version_0"]


def test_a_kill_at_any_moment_costs_no_more_than_the_steps_since_the_last_save(
    uninterrupted: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    config, end = uninterrupted["distilled"]
    family, resume = tmp_path / "runs/tiny", ()
    for step, more in ((2, 0.0), (6, 0.05)):  # between and inside steps and saves
        process = start_fit(tmp_path, config, *resume)
        wait_for_step(tmp_path, process, step)
        time.sleep(more)
        process.kill()
        process.join()
        found = torch.load(find_last_checkpoint(family), weights_only=True)
        assert step <= found["global_step"] < NUM_STEPS
        resume = ("--ckpt_path=last",)
    processes.finish(start_fit(tmp_path, config, *resume), tmp_path / "log")
    checkpoints = family / "version_0/checkpoints"
    assert_ends_equal(checkpoints / "last.ckpt", end)
    assert not list(checkpoints.glob(".*"))  # nothing half written


@pytest.mark.slow
def test_an_epoch_that_ends_within_accumulated_batches_ends_with_a_step(
    runs: Path, tmp_path: Path
) -> None:
    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.seen = []

        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_
        ) -> None:
            has_gradient = any(p.grad is not None for p in pl_module.parameters())
            self.seen.append((trainer.global_step, has_gradient))

    teacher = str(runs / "runs/tiny/version_0/checkpoints/last.ckpt")
    watch = Watch()

    def fit(folder: Path, num_steps: int, resume: Path | None = None) -> Path:
        dmd2 = DMD2(teacher, student_every=2, taps=(0, 1), learning_rate=1e-3)
        accumulated = {"accumulate_grad_batches": 2, "limit_train_batches": 3, "resume": resume}
        callbacks = (dmd2, EMA(), watch, LastCheckpoint())
        tiny.fit(folder, num_steps, *callbacks, batch_size=2, **accumulated)
        return folder / "last.ckpt"

    whole = fit(tmp_path / "whole", 4)
    assert watch.seen == [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False)]
    for num_steps in (2, 3):  # between two epochs, and within one
        parts = fit(tmp_path / str(num_steps), num_steps)
        parts = fit(parts.parent, 4, resume=parts)
        once, twice = (torch.load(path, weights_only=True) for path in (whole, parts))
        for part in STATE:
            tiny.assert_equal_states(once[part], twice[part], part)


@pytest.mark.slow
def test_measuring_time_changes_nothing(
    uninterrupted: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, end = uninterrupted["distilled"]
    monkeypatch.setattr(Stopwatch, "timed", lambda self, name: nullcontext())
    main(["fit", f"--config={config}", f"--trainer.max_steps={NUM_STEPS}"])
    assert_ends_equal(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt", end)
