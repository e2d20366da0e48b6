"""8-bit weights: closeness to the exact picture, memory, what stays exact, what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pid_lightning import PiDDecoder
from pid_lightning.__main__ import main
from pid_lightning.checks import Mistake
from pid_lightning.decoding.memory_estimate import weight_bytes
from pid_lightning.files.hub import BUNDLED_MODELS
from pid_lightning.nn.quantisation import MIN_WIDTH, is_quantised
from pid_lightning.pictures.files import read_picture
from pid_lightning.pictures.resizing import reduce_picture

pytest.importorskip("torchao", reason="8-bit weights need the extra int8")

(NAME,) = BUNDLED_MODELS
PHOTO = next((Path(BUNDLED_MODELS[NAME]).parent / "photos" / "test").glob("*.jpg"))


def make(dtype: torch.dtype = torch.float32) -> PiDDecoder:
    return PiDDecoder.from_pretrained(NAME, dtype)


def picture(decoder: PiDDecoder) -> Tensor:
    photo = read_picture(PHOTO)[None, :, :128, :128]
    return decoder.decode(decoder.encode(reduce_picture(photo, 4)), seed=0, progress=False)


@pytest.mark.parametrize("activations", [False, True])
def test_pictures_are_near_the_exact_ones(activations: bool) -> None:
    exact, rounded = picture(make()), picture(make().quantise(activations))
    psnr = 10 * torch.log10(4 / (exact - rounded).square().mean())
    assert psnr > 50
    assert not torch.equal(exact, rounded)


def test_a_weight_is_rounded_to_a_127th_of_its_rows_largest() -> None:
    exact, rounded = make().denoiser, make().quantise().denoiser
    num_rounded = 0
    for (name, weight), now in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        wide = weight.ndim == 2 and min(weight.shape) >= MIN_WIDTH
        exact = re.match(r"time_embedding|pixel_blocks\.\d+\.modulation", name)
        assert is_quantised(now) == (wide and not exact)
        if is_quantised(now):
            num_rounded += 1
            step = weight.abs().amax(dim=1, keepdim=True) / 127
            assert ((now.dequantize() - weight).abs() <= 0.51 * step).all()
        else:
            assert torch.equal(now, weight)
    assert num_rounded > 20


@pytest.mark.parametrize("activations", [False, True])
def test_the_settings_of_the_process_stay_as_they_were(activations: bool) -> None:
    from torch._inductor import config

    before = config.get_config_copy(), torch.get_float32_matmul_precision()
    make().quantise(activations)
    assert (config.get_config_copy(), torch.get_float32_matmul_precision()) == before


def test_a_single_row_is_not_rounded_for_products_in_8_bits() -> None:
    """A GPU multiplies at least 17 rows in 8 bits; a modulation has one a picture."""
    stream = make().quantise(activations=True).denoiser.patch_blocks[0].image
    generator = torch.Generator().manual_seed(0)
    for linear, rounds in ((stream.modulation, False), (stream.attention_out, True)):
        x = torch.randn(1, 1, linear.in_features, generator=generator)
        expected = F.linear(x, linear.weight.dequantize(), linear.bias)
        assert torch.allclose(linear(x), expected, rtol=0, atol=1e-5) != rounds


def test_weights_take_half_the_memory_of_bf16() -> None:
    exact, rounded = make(torch.bfloat16), make(torch.bfloat16).quantise()
    linear = sum(p.numel() for p in rounded.denoiser.parameters() if is_quantised(p))
    saved = weight_bytes(exact.denoiser) - weight_bytes(rounded.denoiser)
    assert 0.9 * linear < saved < linear  # one byte per weight, minus the scales
    estimates = [decoder.estimate_memory(128, 128) for decoder in (exact, rounded)]
    assert estimates[0] - estimates[1] == saved


def test_mistakes_are_told_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    decoder = make().quantise()
    refused = {
        "quantise": decoder.quantise,
        "dtype": lambda: decoder.to(dtype=torch.bfloat16),
        "save": lambda: decoder.save_pretrained(tmp_path / "model"),
    }
    for option, change in refused.items():
        with pytest.raises(Mistake) as told:
            change()
        assert told.value.option == option
    with pytest.raises(Mistake) as told:
        make(torch.float64).quantise()
    assert told.value.option == "quantise"
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(Mistake) as told:
        make().quantise()
    assert told.value.option == "int8"


def test_a_missing_torchao_is_told_by_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SystemExit) as stopped:
        main(["decode", str(PHOTO), "--int8", "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("pid: int8: 8-bit weights need torchao")
    assert not (tmp_path / "out").exists()
