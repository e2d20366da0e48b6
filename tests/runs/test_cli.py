"""The command line: what mistakes say, what runs leave behind, and that they go on exactly."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import processes
import pytest
import tiny
import torch
from PIL import Image

from pid_lightning import DMD2, EMA, DINOv2PiD, ImageData, SigLIPPiD
from pid_lightning.__main__ import main as pid
from pid_lightning.training.callbacks import LastCheckpoint, turns
from pid_lightning.commands.fit import PiDCLI, main
from pid_lightning.__main__ import COMMANDS
from pid_lightning.files.hub import find_last_checkpoint
from pid_lightning.commands.parsing import PACKAGE, parser_sentence, raised_here, raised_in
from pid_lightning.training.modules.autoencoder import AutoencoderModule
from pid_lightning.nn import Discriminator

ROOT = Path(__file__).parents[2]
NUM_STEPS = 14
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


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a wrong command says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code in (1, 2)
    said = capsys.readouterr().err.splitlines()
    told = [line for line in said if line.startswith("pid: ")]
    assert len(told) == 1
    assert told[0] == said[-1]
    assert not any("Traceback" in line for line in said)
    return told[0]


def forbid_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make opening the data an error: a mistake must be told before."""

    def opened(*_: object) -> None:
        raise AssertionError("data was opened")

    monkeypatch.setattr("pid_lightning.training.data.image_data.ImageData.setup", opened)


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model.scale=3"], "scale: 3 does not fit"),
        (["--data.image_size=1000"], "1000 x 1000 is not a multiple of 32"),
        (["--model.scael=3"], "'scael' is not accepted"),
        (["--model.denoiser.widht=3"], "denoiser.widht"),
        (["--trainer.max_stpes=3"], "max_stpes"),
        (["--model.denoiser.prediction=y0"], "prediction: Expected one of 'velocity', 'x0', not y0"),
        (["--model.denoiser.adapter.gate=y0"], "gate: Expected one of 'channel', 'token', 'none', not y0"),
        (
            ["--model.training.train=rgb_head", "--model.training.compile=true"],
            "with training.train rgb_head the backbone",
        ),
        (["--model.training.time_shift=0"], "time_shift: 0.0 must be above 0"),
        (["--model.training.train=y0"], "'y0' is not one of all, adapter, rgb_head"),
        (["--data.resize=y0"], "resize: Expected one of 'none', 'random', not y0"),
        (["--data.batch_size=0"], "data.batch_size: 0 must be at least 1"),
        (["--trainer.precision=foo"], "bf16-mixed"),
        (["--model=Nothing"], "Nothing"),
        (["--trainer.strategy=fsdp"], "fsdp"),
        (["--model.vae=flux"], "'flux' (black-forest-labs/FLUX.1-schnell) are not available"),
        (["--ckpt_path=nowhere.ckpt"], "'nowhere.ckpt' is no checkpoint and no folder of a run"),
        (["--ckpt_path=."], "ckpt_path: '.' is no checkpoint and no folder of a run"),
        (["--ckpt_path="], "ckpt_path: '' is no checkpoint and no folder of a run"),
        (["--model.denoiser.num_block=2"], "num_block"),
        (["--seed_everything=-1"], "seed_everything: -1 must be at least 0"),
        (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches: 0 must be at least 1"),
        (["--trainer.logger.save_dir=a_file"], "save_dir: cannot write to folder a_file (File ex"),
        (["--trainer.logger.save_dir=/proc/no"], "save_dir: cannot write to folder /proc/no"),
        (["--seed_everything=99999999999"], "seed_everything: 99999999999 must be below 2^32"),
        (["--trainer.gradient_clip_val=-1"], "gradient_clip_val: -1"),
        (["--trainer.val_check_interval=0"], "val_check_interval: 0 must be above 0"),
        (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch: 0 must be at least 1"),
        (
            ["--trainer.val_check_interval=0.5", "--trainer.check_val_every_n_epoch=null"],
            "val_check_interval: 0.5 is a fraction of an epoch, which needs",
        ),
        (["--trainer.devices=two"], "trainer: `devices` selected with"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs=-1"],
            "Invalid value for every_n_epochs=-1",
        ),
        (["--model=VAEPid"], "model: there is no class 'VAEPid'; check its spelling"),
        (
            ["--trainer.logger=null", "--trainer.logger.name=a"],
            "trainer.logger.name: no class is set that takes it; name one first",
        ),
        (
            ["--trainer.callbacks+=EMA", "--trainer.callbacks+=EMA"],
            "more than one stateful",
        ),
        (["--model.evaluation.guidance_scale=3"], "guidance_scale: 3.0 guides by text"),
        (
            ["--ckpt_path=a_model.safetensors"],
            "is a model file, not a run's checkpoint",
        ),
        (["--config=a_picture.png"], "config: not a text file"),
        (["--model.evaluation.lpips=no.safetensors"], "LPIPS weights no.safetensors do not exist"),
        (["--trainer.callbacks+=DMD2", "--trainer.callbacks.teacher=no.ckpt"], "model no.ckpt was"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--optimizer=SGD"], "optimizer"),
        (["--model.init_from="], "init_from: an empty name; name"),
        (["--model.evaluation.latent_sigmas=[]"], "evaluation.latent_sigmas: none are given"),
        (
            ["--trainer.callbacks+=PictureGrids", "--trainer.callbacks.num_pictures=0"],
            "num_pictures: 0 must be at least 1",
        ),
        (
            ["--trainer.callbacks+=PictureGrids", "--trainer.callbacks.latent_sigmas=[1.5]"],
            "latent_sigmas: 1.5 must lie between 0 and 1",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_sentence_before_data_is_opened(
    arguments: list[str],
    told: str,
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_pictures(monkeypatch)
    for name in ("a_file", "a_model.safetensors"):
        Path(name).write_text("something")
    Path("a_picture.png").write_bytes(b"\x89PNG")
    assert told in mistake(capsys, "fit", f"--config={runs / 'tiny.yaml'}", *arguments)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("test_path=nowhere", "data.test_path: 'nowhere' is no"),
        ("num_val=0", "data.num_val: 0 pictures"),
    ],
)
def test_a_test_that_cannot_follow_is_told_before_the_fit(
    setting: str, told: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (f"--config={runs / 'tiny.yaml'}", "--data.path", str(runs / "photos"))
    if not (runs / "photos").exists():
        (runs / "photos").mkdir()
        for i in range(4):
            Image.new("RGB", (64, 64)).save(runs / f"photos/{i}.png")
    said = mistake(capsys, "fit", *given, f"--data.{setting}", "--test_after_fit=true")
    assert told in said


class BuggyCallback(pl.Callback):
    """What a user might write."""

    def __init__(self, number: str = "0") -> None:
        try:
            self.number = int(number)
        except ValueError as error:
            raise ValueError(f"number: {number} is none; give one, as in 5.") from error
        self.half = {"a": 1}["b"]  # the bug


def test_a_callbacks_sentence_is_told_and_its_bug_keeps_its_traceback(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"--config={runs / 'tiny.yaml'}", f"--trainer.callbacks+={__name__}.BuggyCallback"
    said = mistake(capsys, "fit", *given, "--trainer.callbacks.number=x")
    assert said == "pid: number: x is none; give one, as in 5."
    with pytest.raises(ValueError, match="Does not validate"):
        main(["fit", *given])


def test_a_monitor_that_is_not_logged_is_warned_of_and_stops_the_run_when_read(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watches = "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=validate/los"
    sanity = "--trainer.num_sanity_val_steps=1"
    with pytest.warns(UserWarning, match="validation has not logged 'validate/los', only validate"):
        said = mistake(capsys, "fit", f"--config={runs / 'tiny.yaml'}", *watches, sanity)
    assert "conditioned on metric `validate/los` which is not available" in said


def test_an_earlier_runs_checkpoint_is_not_replaced(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", f"--config={runs / 'tiny.yaml'}", "--trainer.logger=false"]
    fit += ["--trainer.callbacks=null", "--trainer.max_steps=1"]
    main(fit)
    last = Path("checkpoints/last.ckpt")

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path().rglob("*.*")}

    before = files()
    said = mistake(capsys, *fit)
    assert "last.ckpt is of an earlier run: resume that with --ckpt_path, or give this" in said
    main([*fit, "--trainer.fast_dev_run=true"])
    assert files() == before
    main([*fit, "--trainer.max_steps=2", f"--ckpt_path={last}"])
    assert torch.load(last, weights_only=True)["global_step"] == 2
    logged = [*fit, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=csv"]
    logged += ["--trainer.logger.version=v", "--trainer.callbacks+=ModelCheckpoint"]
    logged.remove("--trainer.logger=false")
    main(logged)
    before = files()
    assert "is of an earlier run" in mistake(capsys, *logged)
    assert files() == before  # the logger would begin its table anew


def test_a_checkpoint_does_not_choose_what_is_trained(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"width": 8, "num_encoder_blocks": 1, "num_decoder_blocks": 1, "refine_width": 8}
    autoencoder = AutoencoderModule(**sizes)
    trainer = pl.Trainer(max_steps=1, logger=False, enable_progress_bar=False, accelerator="cpu")
    data = ImageData(str(runs / "pictures"), image_size=64, batch_size=1)
    trainer.fit(autoencoder, data)
    trainer.save_checkpoint("autoencoder.ckpt")
    given = f"--config={runs / 'tiny.yaml'}", "--ckpt_path=autoencoder.ckpt"
    assert "not a checkpoint of a PiD run" in mistake(capsys, "fit", *given)


@pytest.mark.parametrize(
    ("command", "more", "told"),
    [
        ("fit", "--trainer.callbacks+=EMA", "trainer.callbacks: EMA needs a PiD, not Autoencoder"),
        ("fit", "--trainer.callbacks+=PictureGrids", "PictureGrids needs a PiD"),
        ("fit", "--test_after_fit=true", "pid test: AutoencoderModule has no test_step"),
        ("test", "--ckpt_path", "pid test: AutoencoderModule has no test_step; use pid validate."),
    ],
)
def test_what_only_a_pid_has_is_refused_with_an_autoencoder(
    command: str, more: str, told: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = runs / "runs/tiny/version_0/checkpoints/last.ckpt"
    given = ["--config", str(ROOT / "configs/autoencoder.yaml"), "--data.path=bundled", more]
    given += [str(last)] if command == "test" else []
    assert told in mistake(capsys, command, *given)


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
    [(2, 1, 2), (4, 1, 4), (4, 2, 3)],
    ids=["between", "last", "accumulating"],
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


def test_validate_takes_the_callbacks_and_the_logger_of_any_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = runs / "runs/tiny/version_0/checkpoints/last.ckpt"
    saver = "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=train/loss"
    for given in (saver, ("--trainer.logger=true",)):
        main(["validate", f"--config={runs / 'tiny.yaml'}", f"--ckpt_path={last}", *given])
        assert "validate/loss" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "small"])
def test_unusable_data_is_one_sentence(
    kind: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / kind
    if kind != "missing":
        folder.mkdir()
    if kind == "text":
        (folder / "a.jpg").write_text("no picture")
    if kind == "small":
        Image.new("RGB", (40, 90)).save(folder / "a.png")
    said = mistake(capsys, "fit", f"--config={runs / 'tiny.yaml'}", f"--data.path={folder}")
    assert {
        "missing": "is no folder of pictures",
        "empty": "none of 0 pictures is usable at image_size 64",
        "text": "none of 1 pictures is usable at image_size 64",
        "small": "none of 1 pictures is usable at image_size 64",
    }[kind] in said


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_cut_checkpoint_is_one_sentence(
    command: str,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_pictures(monkeypatch)
    whole = (runs / "runs/tiny/version_0/checkpoints/last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    for size in (0, 1000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        said = mistake(capsys, command, f"--config={runs / 'tiny.yaml'}", f"--ckpt_path={cut}")
        assert "cut.ckpt cannot be read: it is truncated" in said
    cut.write_bytes(b"hello, a,b\n1,2\n")
    said = mistake(capsys, command, f"--config={runs / 'tiny.yaml'}", f"--ckpt_path={cut}")
    assert "cut.ckpt cannot be read" in said


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        pid(["--help"])
    assert status.value.code == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]}
    assert listed == {*COMMANDS, *PiDCLI.subcommands()}
    with pytest.raises(SystemExit) as status:
        pid([])
    assert status.value.code == 2


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("optimizer=muon", "training.optimizer of this run is adamw, here muon; set it to adamw"),
        ("train=adapter", "training.train of this run is all, here adapter; set it to all"),
        ("learning_rate=0.5", "training.learning_rate of this run is 0.001, here 0.5; set it to"),
        ("weight_decay=0.5", "training.weight_decay of this run is 0.001, here 0.5; set it to"),
    ],
)
def test_resuming_with_another_optimiser_is_one_sentence(
    setting: str, told: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = runs / "runs/tiny/version_0/checkpoints/last.ckpt"
    said = mistake(
        *(capsys, "fit", f"--config={runs / 'tiny.yaml'}", f"--ckpt_path={last}"),
        *("--trainer.max_steps=9", f"--model.training.{setting}"),
    )
    assert told in said


def test_a_checkpoint_of_another_family_is_one_sentence(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_pictures(monkeypatch)
    siglip = SigLIPPiD("vit_base_patch16_siglip_224", pretrained=False, denoiser=tiny.config())
    checkpoint = {"state_dict": siglip.state_dict(), "pytorch-lightning_version": pl.__version__}
    siglip.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "siglip.ckpt")
    text = (runs / "tiny.yaml").read_text()
    dinov2 = tmp_path / "dinov2.yaml"
    small = "model: vit_small_patch14_dinov2\n    pretrained: false"
    dinov2.write_text(text.replace("VAEPiD", "DINOv2PiD").replace("vae: bundled", small))
    assert DINOv2PiD.__name__ in dinov2.read_text()
    for command in ("fit", "test"):
        said = mistake(capsys, command, f"--config={dinov2}", "--ckpt_path=siglip.ckpt")
        assert "family: SigLIPPiD, here DINOv2PiD" in said


def test_a_fit_of_nothing_asks_for_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, "fit").endswith(
        "required: fit.data, fit.model; --config FILE gives them"
    )


def test_a_file_of_something_else_is_no_checkpoint(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.zeros(3), tmp_path / "z.pt")
    said = mistake(capsys, "fit", f"--config={runs / 'tiny.yaml'}", "--ckpt_path=z.pt")
    assert "ckpt_path: not a checkpoint of a PiD run" in said


def test_testing_nothing_is_one_sentence(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={runs / 'tiny.yaml'}"
    assert "pid test needs a trained network" in mistake(capsys, "test", config)
    said = mistake(capsys, "test", config, "--ckpt_path=last")
    assert "no checkpoint under runs/tiny" in said


def test_a_full_disk_is_one_sentence_and_costs_no_checkpoint(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(checkpoint: dict, file: object) -> None:
        if checkpoint["global_step"] > 2:
            file.write(b"some of it")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr("pid_lightning.training.checkpoints.torch.save", full)
    said = mistake(capsys, "fit", f"--config={runs / 'tiny.yaml'}")
    assert "No space left on device" in said
    assert "what was there before is intact" in said
    checkpoints = tmp_path / "runs/tiny/version_0/checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not list(checkpoints.glob(".*"))  # nothing half written


def test_a_parser_message_keeps_what_tells() -> None:
    message = (
        'Parser key "a":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [x, y]\n  Errors:\n    - Option 'b' is not accepted\n    - Expected a y\n"
        "  Given value type: z\n  Given value: 3"
    )
    assert parser_sentence(message) == "a: Option 'b' is not accepted"
    message = (
        'Parser key "steps":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [<class 'int'>, <class 'NoneType'>]\n  Errors:\n"
        "    - Expected a <class 'int'>\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>\n  Given value: abc"
    )
    assert parser_sentence(message) == "steps: Expected a int or null, not abc"
    message = "Parser key \"format\":\n  Expected a typing.Literal['png', 'webp']. Got value: jpg"
    assert parser_sentence(message) == "format: Expected one of 'png', 'webp', not jpg"


def test_a_fault_of_the_package_is_shown_in_full(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pid_lightning.training.data.image_data.ImageData.setup", lambda *_: int("no number")
    )
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fit", f"--config={runs / 'tiny.yaml'}"])


# What a run leaves behind.


def test_curves_pictures_gates_and_config_are_in_tensorboard(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_a_fit_may_end_with_the_test_of_what_it_made(tmp_path: Path) -> None:
    config = processes.write_config(tmp_path)

    def quality(name: str) -> list[str]:  # without seconds and bytes
        table = tmp_path / "runs/tiny/version_0" / name
        return [",".join(row.split(",")[:6]) for row in table.read_text().splitlines()]

    main(["fit", f"--config={config}", "--trainer.max_steps=2", "--test_after_fit=true"])
    main(["test", f"--config={config}", "--ckpt_path=last"])
    assert quality("test_metrics.csv") == quality("test_metrics_1.csv")


def test_tests_and_validations_of_a_checkpoint_are_at_its_step_and_replace_nothing(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, folder = processes.write_config(tmp_path), tmp_path / "runs/tiny/version_0"
    main(["fit", f"--config={config}", "--trainer.max_steps=2"])
    again = (f"--config={config}", "--ckpt_path=last")
    main(["test", *again])
    first = (folder / "test_metrics.csv").read_bytes()
    main(["test", *again, "--model.evaluation.steps=3"])
    assert (folder / "test_metrics.csv").read_bytes() == first
    assert (folder / "test_metrics_1.csv").is_file()
    told = [json.loads((folder / f"test_grid{n}.json").read_text()) for n in ("", "_1")]
    assert [one["sampling_steps"] for one in told] == [2, 3]
    assert {(one["trained_steps"], Path(one["weights"]).name) for one in told} == {(2, "last.ckpt")}
    main(["validate", *again])
    found = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in found.Scalars("test/PiD/psnr/sigma_0.8")] == [2, 2]
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
        ("plain", signal.SIGINT, 1),
        ("distilled", signal.SIGINT, 1),
        ("plain", signal.SIGTERM, 128 + signal.SIGTERM),
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


@pytest.mark.parametrize("kind", ["plain", "distilled"])
def test_a_kill_at_any_moment_costs_no_more_than_the_steps_since_the_last_save(
    kind: str, uninterrupted: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    config, end = uninterrupted[kind]
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


def test_measuring_time_changes_nothing(
    uninterrupted: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    config, end = uninterrupted["distilled"]
    monkeypatch.setattr(turns.Turns, "timed", lambda self, network: nullcontext())
    main(["fit", f"--config={config}", f"--trainer.max_steps={NUM_STEPS}"])
    assert_ends_equal(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt", end)


def test_a_folder_named_like_the_package_hides_no_bug(tmp_path: Path) -> None:
    """As a library's in the virtual environment of a clone named pid_lightning."""
    library = tmp_path / "pid_lightning/.venv/library.py"
    library.parent.mkdir(parents=True)
    library.write_text("int('x')")
    with pytest.raises(ValueError, match="invalid literal") as raised:
        exec(compile(library.read_text(), str(library), "exec"))
    assert raised_here(raised.value) is None


def test_a_builtin_that_fails_in_the_package_is_a_bug() -> None:
    """Written in C it has no frame of its own: the last one is the package's."""
    network = Discriminator(width=8, num_taps=2)
    with pytest.raises(ValueError, match="shorter") as raised:
        network([torch.zeros(1, 8, 4, 4)])
    assert raised_in(raised.value, PACKAGE)
    assert raised_here(raised.value) is None


def test_such_a_bug_in_a_class_of_ours_keeps_its_traceback_too(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pid_lightning.training.callbacks.dmd2.Turns", partial(int, "x"))
    given = ("--trainer.callbacks+=DMD2", "--trainer.callbacks.teacher=no.ckpt")
    with pytest.raises(ValueError, match="Does not validate"):
        main(["fit", f"--config={runs / 'tiny.yaml'}", *given])
