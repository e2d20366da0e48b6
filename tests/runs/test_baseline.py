"""`pid test --baseline`: the cascade of native decoder and upscaler beside PiD."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import tiny
import torch
import upscaler_files

from pid_lightning import Evaluation, PiDDecoder
from pid_lightning.__main__ import main
from pid_lightning.diffusion.noising import add_latent_noise
from pid_lightning.diffusion.randomness import draw_noise, sample_generators
from pid_lightning.pictures.resizing import reduce_picture
from pid_lightning.pictures.upscalers import read_upscaler

pytest.importorskip("spandrel")

CONFIG = """
model:
  class_path: VAEPiD
  init_args:
    denoiser:
      width: 32
      num_heads: 2
      num_blocks: 2
      patch_size: 16
      pixel_width: 4
      pixel_attention_width: 16
      pixel_num_heads: 2
      num_pixel_blocks: 1
      text_length: 0
      rope_reference: null
      adapter: {width: 16, num_res_blocks: 1}
    evaluation: {latent_sigmas: [0.0, 0.8], steps: 1}
data:
  class_path: ImageData
  init_args: {path: bundled, image_size: 64, batch_size: 3}
trainer:
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  limit_test_batches: 0.5
  logger:
    class_path: TensorBoardLogger
    init_args: {save_dir: runs, name: tiny}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a checkpoint and an upscaler."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(CONFIG)
    upscaler_files.write(folder / "upscaler.safetensors")
    tiny.fit(folder, 1)
    return folder


def pid(run: Path, monkeypatch: pytest.MonkeyPatch, command: str, *options: str) -> None:
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", ["pid"])
    main([command, "--config=tiny.yaml", *options])


def table(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The newest one."""
    path = max(folder.glob("runs/tiny/*/test_metrics*.csv"))
    with path.open(newline="") as rows:
        return {(row["method"], row["latent_sigma"]): row for row in csv.DictReader(rows)}


def test_the_report_has_the_cascade_as_measured_by_hand(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tested = ("test", "--ckpt_path=last.ckpt", "--trainer.logger.init_args.version=0")
    pid(run, monkeypatch, *tested)
    before = table(run)
    assert {method for method, _ in before} == {"PiD", "native + bicubic"}
    capsys.readouterr()
    pid(run, monkeypatch, *tested, "--baseline=upscaler.safetensors")
    said, rows = capsys.readouterr().out, table(run)
    for key in before:  # existing rows are unchanged
        assert rows[key]["psnr"] == before[key]["psnr"]
    for sigma in ("0.0", "0.8"):
        row = rows["native + ESRGAN", sigma]
        numbers = [float(row[name]) for name in ("psnr", "ssim", "consistency", "seconds")]
        assert torch.tensor(numbers).isfinite().all()
        assert float(row["seconds"]) > 0
        assert float(row["peak_mebibytes"]) >= 0
        assert row["num_pictures"] == "3"
        assert row["psnr"] != rows["native + bicubic", sigma]["psnr"]
    assert "native + ESRGAN  " in said
    assert "ESRGAN 0, ESRGAN 0.8, original" in said
    assert "baseline upscaler.safetensors" in said
    assert max(map(len, said.split("sampling steps")[0].splitlines())) <= 100
    scalars = EventAccumulator(str(run / "runs/tiny/version_0")).Reload().Tags()["scalars"]
    assert "test/native + ESRGAN/psnr/sigma_0.8" in scalars

    decoder = PiDDecoder.from_pretrained(run / "last.ckpt")
    data = tiny.data(batch_size=3)
    data.setup("test")
    x0 = next(iter(data.test_dataloader()))["image"]
    latents, pixels = (
        sample_generators(0, f"test {what}", range(3)) for what in ("latents", "pixels")
    )
    with torch.no_grad():
        clean = decoder.encode(reduce_picture(x0, 4))
        cascade = read_upscaler(run / "upscaler.safetensors")(decoder.encoder.decode(clean), 4)
        eps = draw_noise(clean.shape, latents, "cpu")
        noisy = add_latent_noise(clean, eps, torch.full((3,), 0.8))
        ours = decoder.decode(noisy, 0.8, steps=1, generator=pixels)
    for key, made in ((("native + ESRGAN", "0.0"), cascade), (("PiD", "0.8"), ours)):
        psnr = 10 * torch.log10(4 / (made - x0).square().mean(dim=(1, 2, 3)))
        assert float(rows[key]["psnr"]) == pytest.approx(psnr.mean().item(), rel=1e-4)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_mistakes_are_told_before_data_is_opened(
    stage: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny.module()
    module.evaluation = Evaluation(baseline="nowhere")
    with pytest.raises((OSError, ValueError), match="nowhere"):
        module.prepare(None, stage)
    module.prepare(None, "predict")  # uses no baseline
    module.evaluation = Evaluation(baseline=str(run / "upscaler.safetensors"))
    module.prepare(None, stage)
    monkeypatch.setattr(type(module.encoder), "has_decoder", False)
    with pytest.raises(ValueError, match="native decoder"):
        module.prepare(None, stage)


@pytest.mark.parametrize("option", ["--baseline", "--model.evaluation.baseline"])
def test_the_command_line_refuses_before_data_is_opened(
    option: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("data was opened")

    monkeypatch.setattr("pid_lightning.training.data.image_data.ImageData.setup", opened)
    with pytest.raises(SystemExit):
        pid(run, monkeypatch, "test", "--ckpt_path=last.ckpt", f"{option}=nowhere")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("pid: ")
    assert "nowhere" in said


def test_a_saved_config_names_the_baseline_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--baseline=upscaler.safetensors", "--trainer.max_steps=0")
    pid(run, monkeypatch, "fit", *options, "--trainer.logger.init_args.version=9")
    saved = run / "runs" / "tiny" / "version_9" / "config.yaml"
    lines = [line.strip() for line in saved.read_text().splitlines()]
    assert [line for line in lines if line.startswith("baseline:")] == [
        "baseline: upscaler.safetensors",  # the model's
        "baseline: null",
    ]
