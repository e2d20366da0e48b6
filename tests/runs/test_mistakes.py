"""Mistakes on the command line end in one sentence that begins with the option they are in."""

from __future__ import annotations

from pathlib import Path

import golden
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from pid_lightning.__main__ import COMMANDS, main
from pid_lightning.checks import Mistake
from pid_lightning.commands.fit import PiDCLI
from pid_lightning.commands.parsing import parser_sentence

SAVED_RUN = golden.DATA / "saved_run"
LAST = SAVED_RUN / "checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files that options name by mistake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pid"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = (SAVED_RUN / "config.yaml").read_text()
    Path("config.yaml").write_text(config.replace("max_steps: 300", "max_steps: 2"))
    Path("text.yaml").write_text("some text")
    Path("broken.yaml").write_text("model: [1, 2\ndata: :")
    Path("a_file").write_text("something")
    Path("model.safetensors").write_text("something")
    Path("cut.png").write_bytes(b"\x89PNG")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save("good.png")
    Path("cut.ckpt").write_bytes(LAST.read_bytes()[:-1])
    # Lightning would build the class that such a file names.
    foreign = {"hyper_parameters": {"_class_path": "AutoencoderModule"}, "state_dict": {}}
    torch.save(foreign, "foreign.ckpt")
    gone = torch.load(LAST, weights_only=True)
    gone["pid"]["latent_space"] = "pid-small"
    torch.save(gone, "gone.ckpt")
    Path("empty").mkdir()
    return tmp_path


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes opening the data an error: a mistake must be told before."""

    def opened(*_: object) -> None:
        raise AssertionError("data was opened")

    monkeypatch.setattr("pid_lightning.training.data.image_data.ImageData.setup", opened)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a wrong command ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("pid: ")] == said[-1:]
    assert not any("Traceback" in line for line in said)
    return said[-1].removeprefix("pid: ")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        # What the parser refuses.
        ("--trainer.max_stpes=3", "unrecognized arguments: --trainer.max_stpes=3"),
        ("--model.scael=3", "model: in 'pid_lightning.VAEPiD': Option 'scael'"),
        ("--model.denoiser.widht=3", "model: in 'pid_lightning.VAEPiD': unrecognized"),
        ("--data.resize=y0", "data.resize"),
        ("--data.batch_size=many", "data.batch_size"),
        ("--trainer.precision=foo", "trainer.precision"),
        ("--model=VAEPid", "model: 'VAEPid'"),
        ("--trainer.logger=null --trainer.logger.name=a", "trainer.logger"),
        ("--trainer.callbacks+=EMA --trainer.callbacks.decya=1", "trainer.callbacks: in 'pid_l"),
        ("--trainer.callbacks=DMD2", "trainer.callbacks: in 'pid_lightning.DMD2'"),
        ("--config=nowhere.yaml", "config"),
        ("--config=cut.png", "config"),
        ("--config=text.yaml", "Unexpected config"),
        ("--config=broken.yaml", "Problems parsing config"),
        # What Lightning would take silently, or stumble over late.
        ("--seed_everything=-1", "seed_everything"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches"),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval"),
        # What Lightning refuses.
        ("--trainer.devices=two", "trainer"),
        ("--trainer.callbacks+=EMA", "trainer"),
        ("--trainer.callbacks=ModelCheckpoint --trainer.callbacks.every_n_epochs=-1", "trainer"),
        # What the classes refuse when they are built.
        ("--model.scale=3", "patch_size"),
        ("--model.denoiser.adapter.gate=y0", "model.denoiser.adapter.gate"),
        ("--model.training.time_shift=0", "model.training.time_shift"),
        ("--model.vae=foo", "vae"),
        ("--data.batch_size=0", "data.batch_size"),
        (
            "--trainer.callbacks=PictureGrids --trainer.callbacks.num_pictures=0",
            "PictureGrids num_pictures",
        ),
        # What is found before the data is opened.
        ("--trainer.logger.save_dir=a_file", "trainer.logger.save_dir"),
        ("--ckpt_path=nowhere.ckpt", "ckpt_path"),
        ("--ckpt_path=empty", "ckpt_path"),
        ("--ckpt_path=", "ckpt_path"),
        ("--ckpt_path=last", "ckpt_path"),
        ("--ckpt_path=model.safetensors", "ckpt_path"),
        ("--ckpt_path=foreign.ckpt", "ckpt_path"),
        ("--ckpt_path=cut.ckpt", "ckpt_path"),
        (f"--ckpt_path={LAST} --model.denoiser.width=16", "ckpt_path"),
    ],
    ids=lambda value: value,
)
def test_a_wrong_setting_is_told_before_data_is_opened(
    arguments: str, option: str, unopened: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, "fit", "--config=config.yaml", *arguments.split()).startswith(option)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("fit", "config"),
        ("test --config=config.yaml", "ckpt_path"),
        ("fit --config=config.yaml --model=lightning.pytorch.demos.BoringModel", "model"),
        # What is gone.
        ("fit --config=config.yaml --model=AutoencoderModule", "model"),
        (f"fit --config={golden.DATA}/old_config.yaml", "vae"),
        ("fit --config=config.yaml --ckpt_path=gone.ckpt", "ckpt_path"),
        (f"decode good.png --model={golden.DATA}/old_model.safetensors", "path"),
        ("decode good.png --model=gone.ckpt", "path"),
        ("export gone.ckpt out.safetensors", "path"),
        (f"fit --config=config.yaml --ckpt_path={LAST} --model.training.optimizer=adamw", "ckpt_"),
        ("fit --config=config.yaml --data.path=empty", "data.path"),
        ("fit --config=config.yaml --data.test_path=none --test_after_fit=true", "data.test_path"),
        ("decod good.png", "command"),
        ("decode", "the following arguments are required: inputs"),
        ("decode good.png --ove", "unrecognized arguments: --ove"),
        ("decode good.png --steps many", "steps"),
        ("decode good.png --format jpg", "format"),
        ("decode good.png --sigma 2", "sigma"),
        ("export nowhere out.safetensors", "run"),
        (f"export {SAVED_RUN} model.safetensors", "out"),
        ("import nowhere.pth out.safetensors --family flux --version v2", "version"),
        ("import nowhere.pth out.safetensors --family flux", "the following arguments are requ"),
        ("import a_file model.safetensors --family flux --version v1", "out"),
    ],
    ids=lambda value: value.replace(f"{golden.DATA}/", ""),
)
def test_a_wrong_command_is_told(
    arguments: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, *arguments.split()).startswith(option)


def test_a_monitor_that_is_not_logged_stops_the_run_when_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watches = "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=validate/los"
    validates = "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1"
    with pytest.warns(UserWarning, match="validation has not logged 'validate/los', only validate"):
        said = told(capsys, "fit", "--config=config.yaml", *watches, *validates)
    assert said.startswith("trainer")
    assert "validate/los" in said


class Refusing(pl.Callback):
    """What a user might write."""

    def __init__(self, number: int = 0) -> None:
        if number < 0:
            raise Mistake("number", f"{number} must be at least 0.")
        self.half = {"a": 1}["b"]  # the bug


def test_a_callback_of_a_user_tells_mistakes_too_and_its_bug_is_shown_in_full(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = "fit", "--config=config.yaml", f"--trainer.callbacks={__name__}.Refusing"
    assert told(capsys, *given, "--trainer.callbacks.number=-1").startswith("number: -1")
    with pytest.raises(ValueError, match="Does not validate") as raised:
        main([*given])
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_fault_of_the_package_is_shown_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "pid_lightning.training.data.image_data.ImageData.setup"
    monkeypatch.setattr(where, lambda *_, **stage: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fit", "--config=config.yaml"])


def test_a_full_disk_is_told_and_costs_no_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(checkpoint: dict, file: object) -> None:
        if checkpoint["global_step"] > 2:
            file.write(b"some of it")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr("pid_lightning.training.checkpoints.torch.save", full)
    every = "--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"
    last = "--trainer.callbacks.save_last=true", "--trainer.max_steps=3"
    said = told(capsys, "fit", "--config=config.yaml", *every, *last)
    assert "No space left on device" in said
    checkpoints = folder / "runs/saved_run/version_0/checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not list(checkpoints.glob(".*"))  # nothing half written


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]}
    assert listed == {*COMMANDS, *PiDCLI.subcommands()}
    with pytest.raises(SystemExit) as status:
        main([])
    assert status.value.code == 2


def test_a_paragraph_of_the_parser_becomes_a_sentence() -> None:
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
    assert parser_sentence(message) == "steps: expected int or null, not 'abc'."
    message = "Parser key \"format\":\n  Expected a typing.Literal['png', 'webp']. Got value: jpg"
    assert parser_sentence(message) == "format: expected 'png', 'webp', not 'jpg'."
