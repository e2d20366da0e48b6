"""Upscalers from files: equal to the published equations, in every layout, at every scale."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import upscaler_files
from safetensors.torch import save_file

from pid_lightning.checks import Mistake
from pid_lightning.pictures.resizing import enlarge_picture, reduce_picture
from pid_lightning.pictures.upscalers import read_upscaler

pytest.importorskip("spandrel")


def transcription(tensors: dict, images: torch.Tensor) -> torch.Tensor:
    """The published equations, one convolution at a time, for images in [0, 1]."""
    count = iter(range(len(tensors)))

    def conv(x: torch.Tensor) -> torch.Tensor:
        i = next(count)
        return F.conv2d(x, tensors[f"{i}.weight"], tensors[f"{i}.bias"], padding=1)

    def bend(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    first = x = conv(images)
    for _ in range(upscaler_files.NUM_BLOCKS):
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
    return upscaler_files.write(tmp_path / "tiny.safetensors")


def test_the_network_equals_a_transcription_of_the_equations(file: Path) -> None:
    low = images(2, 3, 7, 5)
    expected = transcription(upscaler_files.numbered(), (low + 1) / 2)
    upscaler = read_upscaler(file)
    torch.testing.assert_close(upscaler(low, 4), (expected * 2 - 1).clamp(-1, 1))
    assert not any(p.requires_grad for p in upscaler.parameters())


def test_every_layout_gives_the_same_network(file: Path, tmp_path: Path) -> None:
    named = upscaler_files.published(upscaler_files.numbered())
    save_file(named, tmp_path / "named.safetensors")
    torch.save({"params_ema": named}, tmp_path / "named.pth")
    random_state = torch.get_rng_state()
    ours = read_upscaler(file).state_dict()
    assert torch.equal(random_state, torch.get_rng_state())
    for name in ("named.safetensors", "named.pth"):
        theirs = read_upscaler(tmp_path / name).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_half_precision_is_read_as_fp32_and_pictures_keep_their_dtype(tmp_path: Path) -> None:
    half = {name: value.half() for name, value in upscaler_files.numbered().items()}
    save_file(half, tmp_path / "half.safetensors")
    upscaler = read_upscaler(tmp_path / "half.safetensors")
    assert {p.dtype for p in upscaler.parameters()} == {torch.float32}
    assert upscaler(images(1, 3, 4, 4).bfloat16(), 4).dtype == torch.bfloat16


def test_other_scales_end_bicubically(file: Path) -> None:
    upscaler, low = read_upscaler(file), images(1, 3, 8, 8)
    four = upscaler(low, 4)
    assert torch.equal(upscaler(low, 2), reduce_picture(four, 2))
    torch.testing.assert_close(upscaler(low, 8), enlarge_picture(four, 2))
    assert upscaler(low, 6).shape == (1, 3, 48, 48)
    assert upscaler.label(4) == "ESRGAN"
    assert upscaler.label(8) == "ESRGAN + bicubic"


def _published(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    named = upscaler_files.published(tensors)
    tensors.clear()
    tensors.update(named | {name: value})


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("7.bias"),
        lambda t: t.update(extra=torch.zeros(1)),
        lambda t: t.update({"9.weight": t["9.weight"][:1].contiguous()}),
        lambda t: t.clear() or t.update(latents=torch.zeros(4, 2, 2)),
        lambda t: t.update({"body.99999999.rdb1.conv1.weight": torch.zeros(1)}),
        lambda t: _published(t, "conv_first.weight", torch.zeros(10**5, 3, 3, 3)),
        lambda t: _published(t, "body.1000000.rdb1.conv1.weight", torch.zeros(1)),
    ],
    ids=["missing", "extra", "shape", "latents", "numbers", "wide", "deep"],
)
def test_another_network_is_one_sentence(change: object, tmp_path: Path) -> None:
    tensors = upscaler_files.numbered()
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(Mistake) as told:
        read_upscaler(tmp_path / "other.safetensors")
    assert told.value.option == "baseline"
    assert "other.safetensors" in str(told.value)


def test_no_file_and_half_a_file_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="nowhere"):
        read_upscaler(tmp_path / "nowhere")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="tiny"):
        read_upscaler(file)


def test_a_missing_package_is_one_sentence(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(Mistake) as told:
        read_upscaler(file)
    assert told.value.option == "baseline"
    assert "pip install" in told.value.sentence
