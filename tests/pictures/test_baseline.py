"""The cascade of native decoder and Real-ESRGAN: network, tiles, files and report."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pid_lightning import Evaluation, PiDDecoder, SigLIPPiD
from pid_lightning.commands.fit import main
from pid_lightning.diffusion.noising import add_latent_noise
from pid_lightning.diffusion.randomness import draw_noise, sample_generators
from pid_lightning.pictures.real_esrgan import RRDBNet, Upscaler, read_upscaler, upscaler_label
from pid_lightning.pictures.resizing import enlarge_picture, reduce_picture

WIDTH, GROWTH, NUM_BLOCKS = 6, 4, 2


def shapes(width: int, growth: int, num_blocks: int) -> list[tuple[int, int]]:
    """Input and output channels of every convolution, in the order of the forward pass."""
    dense = [(width + i * growth, growth) for i in range(4)] + [(width + 4 * growth, width)]
    return [(3, width), *dense * 3 * num_blocks, *[(width, width)] * 4, (width, 3)]


def numbered(num_blocks: int = NUM_BLOCKS, dtype: torch.dtype = torch.float32) -> dict:
    """Random tensors in the numbered layout."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (inputs, outputs) in enumerate(shapes(WIDTH, GROWTH, num_blocks)):
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
        tensors[f"{i}.weight"] = (weight / (9 * inputs) ** 0.5).to(dtype)
        tensors[f"{i}.bias"] = (torch.randn(outputs, generator=generator) * 0.1).to(dtype)
    return tensors


def published(tensors: dict) -> dict:
    """The same tensors in the published layout."""
    body = [
        f"body.{b}.rdb{r}.conv{c}"
        for b in range(NUM_BLOCKS)
        for r in range(1, 4)
        for c in range(1, 6)
    ]
    last = ["conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    names = ["conv_first", *body, *last]
    return {f"{names[int(k.split('.')[0])]}.{k.split('.')[1]}": v for k, v in tensors.items()}


def transcription(tensors: dict, images: torch.Tensor) -> torch.Tensor:
    """The published equations, one convolution at a time, for images in [0, 1]."""
    count = iter(range(len(tensors)))

    def conv(x: torch.Tensor) -> torch.Tensor:
        i = next(count)
        return F.conv2d(x, tensors[f"{i}.weight"], tensors[f"{i}.bias"], padding=1)

    def bend(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    first = x = conv(images)
    for _ in range(NUM_BLOCKS):
        block = x
        for _ in range(3):
            outputs = [block]
            for _ in range(4):
                outputs.append(bend(conv(torch.cat(outputs, 1))))
            block = block + 0.2 * conv(torch.cat(outputs, 1))
        x = x + 0.2 * block
    x = first + conv(x)
    for _ in range(2):
        x = bend(conv(x.repeat_interleave(2, -1).repeat_interleave(2, -2)))
    return conv(bend(conv(x)))


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(numbered(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


# The network and its tiling.


def test_the_network_equals_a_transcription_of_the_equations(file: Path) -> None:
    low = images(2, 3, 7, 5)
    expected = transcription(numbered(), (low + 1) / 2)
    upscaler = read_upscaler(file)
    torch.testing.assert_close(upscaler.network((low + 1) / 2), expected)
    torch.testing.assert_close(upscaler(low, 4), (expected * 2 - 1).clamp(-1, 1))
    assert not any(p.requires_grad for p in upscaler.parameters())


def test_the_published_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        network = RRDBNet()
    weights = [p for p in network.parameters() if p.ndim == 4]
    assert [(w.shape[1], w.shape[0]) for w in weights] == shapes(64, 32, 23)
    assert len(weights) == 351


def test_every_layout_gives_the_same_network(file: Path, tmp_path: Path) -> None:
    named = published(numbered())
    save_file(named, tmp_path / "named.safetensors")
    torch.save({"params_ema": named}, tmp_path / "named.pth")
    random_state = torch.get_rng_state()
    ours = read_upscaler(file).state_dict()
    assert torch.equal(random_state, torch.get_rng_state())
    for name in ("named.safetensors", "named.pth"):
        tiny.assert_equal_states(read_upscaler(tmp_path / name).state_dict(), ours)


def test_half_precision_is_read_as_fp32_and_pictures_keep_their_dtype(tmp_path: Path) -> None:
    save_file(numbered(dtype=torch.float16), tmp_path / "half.safetensors")
    upscaler = read_upscaler(tmp_path / "half.safetensors")
    assert {p.dtype for p in upscaler.parameters()} == {torch.float32}
    assert upscaler(images(1, 3, 4, 4).bfloat16(), 4).dtype == torch.bfloat16


def test_tiles_with_a_wide_margin_equal_the_whole(file: Path) -> None:
    network = read_upscaler(file).network
    low = images(1, 3, 50, 37)
    whole = Upscaler(network, tile=50)(low, 4)
    # The receptive field: 30 dense layers and 3 more at input resolution, and the last 4 within
    # 3 pixels.
    wide = Upscaler(network, tile=16, margin=37)(low, 4)
    torch.testing.assert_close(wide, whole, atol=1e-5, rtol=0)
    without = (Upscaler(network, tile=16, margin=0)(low, 4) - whole).abs()
    narrow = (Upscaler(network, tile=16, margin=4)(low, 4) - whole).abs()
    assert without.max() > 1e-2  # the margin is what makes them equal
    assert narrow.max() < 1e-2 * without.max()  # distant pixels have little weight


def test_other_scales_end_bicubically(file: Path) -> None:
    upscaler, low = read_upscaler(file), images(1, 3, 8, 8)
    four = upscaler(low, 4)
    assert torch.equal(upscaler(low, 2), reduce_picture(four, 2))
    torch.testing.assert_close(upscaler(low, 8), enlarge_picture(four, 2))
    assert upscaler(low, 6).shape == (1, 3, 48, 48)
    assert upscaler_label(4) == "Real-ESRGAN"
    assert upscaler_label(8) == "Real-ESRGAN + bicubic"


# Files that do not fit.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("7.bias"), "1 tensors are missing, unexpected or of another shape"),
        (lambda t: t.pop("0.weight"), "holds no tensor 'conv_first.weight'"),
        (lambda t: t.update(extra=torch.zeros(1)), "the first is 'extra'"),
        (lambda t: t.update({"0.weight": torch.zeros(WIDTH, 12, 3, 3)}), "'conv_first.weight'"),
        (lambda t: t.update({"9.weight": t["9.weight"][:1]}), "'body.0.rdb2.conv4.weight'"),
    ],
    ids=["missing", "first", "extra", "x2plus", "shape"],
)
def test_another_network_is_one_sentence(change: object, message: str, tmp_path: Path) -> None:
    tensors = numbered()
    change(tensors)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors") as raised:
        read_upscaler(tmp_path / "other.safetensors")
    assert message in str(raised.value)
    assert "give the file of Real-ESRGAN x4plus" in str(raised.value)


def test_no_file_and_half_a_file_are_one_sentence(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_upscaler(tmp_path / "nowhere")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="cannot be read"):
        read_upscaler(file)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_mistakes_are_told_before_data_is_opened(stage: str, file: Path) -> None:
    judged = Evaluation(baseline="nowhere")
    fitted = tiny.module()
    fitted.evaluation = judged
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        fitted.prepare(None, stage)
    fitted.prepare(None, "predict")  # uses no baseline
    judged = Evaluation(baseline=str(file))
    siglip = SigLIPPiD(
        "vit_base_patch16_siglip_224",
        pretrained=False,
        denoiser=tiny.config(),
        evaluation=judged,
    )
    with pytest.raises(ValueError, match="have no native decoder whose pictures"):
        siglip.prepare(None, stage)


# The report.


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


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A config and a checkpoint to test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pid"])
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    tiny.fit(tmp_path, 1)
    return "--config=tiny.yaml", "--ckpt_path=last.ckpt"


def table(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The newest one."""
    path = max(folder.glob("runs/tiny/*/test_metrics*.csv"))
    with path.open(newline="") as rows:
        return {(row["method"], row["latent_sigma"]): row for row in csv.DictReader(rows)}


def test_the_report_has_the_cascade(
    run: tuple[str, str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(["test", *run, "--trainer.logger.init_args.version=0"])
    before = table(tmp_path)
    assert {method for method, _ in before} == {"PiD", "native + bicubic"}
    capsys.readouterr()
    main(["test", *run, f"--baseline={file}", "--trainer.logger.init_args.version=0"])
    said, rows = capsys.readouterr().out, table(tmp_path)
    for key in before:  # existing rows are unchanged
        assert rows[key]["psnr"] == before[key]["psnr"]
    for sigma in ("0.0", "0.8"):
        row = rows["native + Real-ESRGAN", sigma]
        numbers = [float(row[name]) for name in ("psnr", "ssim", "consistency", "seconds")]
        assert torch.tensor(numbers).isfinite().all()
        assert float(row["seconds"]) > 0
        assert float(row["peak_mebibytes"]) >= 0
        assert row["num_pictures"] == "3"
        assert row["psnr"] != rows["native + bicubic", sigma]["psnr"]
    assert "native + Real-ESRGAN  " in said
    assert "Real-ESRGAN 0, Real-ESRGAN 0.8, original" in said
    assert f"baseline {file}" in said
    assert max(map(len, said.split("sampling steps")[0].splitlines())) <= 100
    scalars = EventAccumulator(str(tmp_path / "runs/tiny/version_0")).Reload().Tags()["scalars"]
    assert "test/native + Real-ESRGAN/psnr/sigma_0.8" in scalars


def test_the_rows_are_what_is_measured_by_hand(
    run: tuple[str, str], file: Path, tmp_path: Path
) -> None:
    main(["test", *run, f"--model.evaluation.baseline={file}"])
    decoder = PiDDecoder.from_pretrained(tmp_path / "last.ckpt")
    data = tiny.data(batch_size=3)
    data.setup("test")
    x0 = next(iter(data.test_dataloader()))["image"]
    latents, pixels = (
        sample_generators(0, f"test {what}", range(3)) for what in ("latents", "pixels")
    )
    with torch.no_grad():
        clean = decoder.encode(reduce_picture(x0, 4))
        cascade = read_upscaler(file)(decoder.encoder.decode(clean), 4)
        eps = draw_noise(clean.shape, latents, "cpu")
        noisy = add_latent_noise(clean, eps, torch.full((3,), 0.8))
        ours = decoder.decode(noisy, 0.8, steps=1, generator=pixels)
    rows = table(tmp_path)
    for key, made in ((("native + Real-ESRGAN", "0.0"), cascade), (("PiD", "0.8"), ours)):
        psnr = 10 * torch.log10(4 / (made - x0).square().mean(dim=(1, 2, 3)))
        assert float(rows[key]["psnr"]) == pytest.approx(psnr.mean().item(), rel=1e-4)


def test_the_command_line_refuses_before_data_is_opened(
    run: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("data was opened")

    monkeypatch.setattr("pid_lightning.training.data.image_data.ImageData.setup", opened)
    for argument in ("--baseline=nowhere", "--model.evaluation.baseline=nowhere"):
        with pytest.raises(SystemExit):
            main(["test", *run, argument])
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("pid: evaluation.baseline: nowhere does not exist")


def test_a_saved_config_names_the_baseline_once(
    run: tuple[str, str], file: Path, tmp_path: Path
) -> None:
    main(["fit", run[0], f"--baseline={file}", "--trainer.max_steps=0"])
    (saved,) = tmp_path.glob("runs/tiny/*/config.yaml")
    lines = [line.strip() for line in saved.read_text().splitlines()]
    assert [line for line in lines if line.startswith("baseline:")] == [
        f"baseline: {file}",  # the model's
        "baseline: null",
    ]
