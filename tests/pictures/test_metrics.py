from __future__ import annotations

import csv
import importlib.resources
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pid_lightning.checks import Mistake
from pid_lightning.files.tensors import read_tensors
from pid_lightning.pictures.lpips import SMALLEST_SIDE, alexnet_lpips, lpips_network
from pid_lightning.pictures.metrics import PictureMetrics, format_table, write_csv
from pid_lightning.pictures.resizing import reduce_picture

SHAPES = {name: value.shape for name, value in alexnet_lpips().state_dict().items()}


def _random_state() -> dict[str, torch.Tensor]:
    """LPIPS weights as in the published file, whose heads are non-negative vectors."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in SHAPES.items():
        spread = math.sqrt(2 / max(1, math.prod(shape[1:])))
        state[name] = torch.randn(shape, generator=generator) * spread
        if name.startswith("lin"):
            state[name] = state[name].abs().flatten()
    return state


def _torchmetrics_lpips(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(pretrained=False, net="alex", pnet_rand=True)
    layers = {"0": 1, "3": 2, "6": 3, "8": 4, "10": 5}
    with torch.no_grad():
        for name, value in state.items():
            _, index, kind = name.split(".") if name.startswith("features") else (0, 0, 0)
            if name.startswith("features"):
                slice_ = getattr(network.net, f"slice{layers[index]}")
                getattr(slice_.get_submodule(index), kind).copy_(value)
            else:
                head = network.get_submodule(name.removesuffix(".weight")).model[-1]
                head.weight.copy_(value.reshape(1, -1, 1, 1))
    return network


def _pictures(batch: int, height: int = 32, width: int = 48, seed: int = 0):
    """Random targets, predictions close to them, and low-resolution images at scale 4."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    noise = torch.randn(target.shape, generator=generator)
    strength = 0.05 * torch.arange(1, batch + 1).view(-1, 1, 1, 1)
    return target + strength * noise, target, reduce_picture(target, 4)


def test_lpips_equals_torchmetrics(tmp_path):
    state = _random_state()
    prediction, target, _ = _pictures(2, 68, 64)
    prediction = prediction.clamp(-1, 1)
    save_file(state, tmp_path / "lpips.safetensors")
    random_state = torch.get_rng_state()
    network = lpips_network(tmp_path / "lpips.safetensors")
    assert torch.equal(random_state, torch.get_rng_state())
    expected = _torchmetrics_lpips(state)(prediction, target).flatten()
    torch.testing.assert_close(network(prediction, target), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(network(target, target), torch.zeros(2))
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_bundled_lpips_has_the_published_heads():
    """Those of torchmetrics, which ships them; its AlexNet would have to be downloaded."""
    heads = Path(str(importlib.resources.files("torchmetrics")))
    published = read_tensors(heads / "functional" / "image" / "lpips_models" / "alex.pth")
    network = lpips_network()
    for name, value in published.items():
        own = network.get_parameter(name.replace("model.1.", ""))
        torch.testing.assert_close(own.data, value, rtol=1e-3, atol=1e-6)
    prediction, target, _ = _pictures(3, 64, 64)
    distance = network(prediction.clamp(-1, 1), target)
    assert (distance.diff() > 0).all()  # rising noise


def test_wrong_lpips_weights_give_one_sentence(tmp_path):
    path = tmp_path / "lpips.safetensors"
    with pytest.raises(OSError, match=path.name):
        lpips_network(path)
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="cannot be read"):
        lpips_network(path)
    state = _random_state()
    for change in ({"lin0.weight": torch.zeros(63)}, {"more": torch.zeros(1)}):
        save_file({**state, **change}, path)
        with pytest.raises(ValueError, match=next(iter(change))):
            lpips_network(path)
    del state["features.3.bias"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"features\.3\.bias"):
        lpips_network(path)


def test_every_measure_equals_its_definition(tmp_path):
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    save_file(_random_state(), tmp_path / "lpips.safetensors")
    network = lpips_network(tmp_path / "lpips.safetensors")
    prediction, target, low = _pictures(3)
    measured = PictureMetrics(network)
    for part, seconds, peak in ((slice(0, 2), 4.0, 2**20), (slice(2, 3), 5.0, 3 * 2**20)):
        measured.update(("PiD", 0.2), prediction[part], target[part], low[part], 4, seconds, peak)
    (row,) = measured.compute()
    clamped = prediction.clamp(-1, 1)

    def psnr(a, b):
        # [-1, 1] holds 2 units: 10 log10(2^2 / mse), averaged over pictures after the logarithm
        errors = (a - b).double().square().mean(dim=(1, 2, 3))
        return float((10 * torch.log10(4 / errors)).mean())

    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)((clamped + 1) / 2, (target + 1) / 2)
    assert row["psnr"] == pytest.approx(psnr(clamped, target), rel=1e-5)
    assert row["ssim"] == pytest.approx(float(ssim), rel=1e-5)
    assert row["lpips"] == pytest.approx(float(network(clamped, target).mean()), rel=1e-5)
    assert row["consistency"] == pytest.approx(psnr(reduce_picture(clamped, 4), low), rel=1e-5)
    assert row["seconds"] == pytest.approx(3.0)  # 9 seconds, 3 pictures
    assert row["peak_mebibytes"] == 3.0
    assert row["num_pictures"] == 3
    assert (row["method"], row["latent_sigma"]) == ("PiD", 0.2)


def test_rows_are_apart_and_in_order():
    prediction, target, low = _pictures(1)
    measured = PictureMetrics(lpips_network())
    for row in (("native + bicubic", 0.4), ("PiD", 0.4), ("PiD", torch.tensor(0.0))):
        measured.update(row, prediction, target, low, 4, 1.0, 0)
    measured.update(("PiD", 0.4), target, target, low, 4, 1.0, 0)
    rows = measured.compute()
    assert [(row["method"], row["latent_sigma"], row["num_pictures"]) for row in rows] == [
        ("PiD", 0.0, 1),
        ("PiD", 0.4, 2),
        ("native + bicubic", 0.4, 1),
    ]
    assert rows[0]["psnr"] == rows[2]["psnr"]
    assert rows[1]["psnr"] == math.inf  # one picture is identical
    assert [row["lpips"] for row in rows][::2] == [rows[0]["lpips"]] * 2
    assert PictureMetrics(lpips_network()).compute() == []


def test_measuring_leaves_the_random_state(tmp_path):
    save_file(_random_state(), tmp_path / "lpips.safetensors")
    measured = PictureMetrics(lpips_network(tmp_path / "lpips.safetensors"))
    prediction, target, low = _pictures(1)
    random_state = torch.get_rng_state()
    measured.update(("PiD", 0.0), prediction, target, low, 4, 1.0, 0)
    assert torch.equal(random_state, torch.get_rng_state())


def test_autocast_and_low_precision_pictures_do_not_coarsen_the_measures(tmp_path):
    save_file(_random_state(), tmp_path / "lpips.safetensors")
    network = lpips_network(tmp_path / "lpips.safetensors")
    prediction, target, low = _pictures(1)
    prediction = prediction.to(torch.bfloat16)
    plain, cast = PictureMetrics(network), PictureMetrics(network)
    plain.update(("PiD", 0.0), prediction.float(), target, low, 4, 1.0, 0)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        cast.update(("PiD", 0.0), prediction, target, low, 4, 1.0, 0)
        assert cast.compute() == plain.compute()


def test_pictures_that_cannot_be_measured_are_refused():
    prediction, target, low = _pictures(1)
    measured = PictureMetrics(lpips_network())
    with pytest.raises(Mistake, match="not finite"):
        measured.update(("PiD", 0.8), prediction / 0, target, low, 4, 1.0, 0)
    small = torch.zeros(1, 3, 30, 48)
    with pytest.raises(Mistake) as told:
        measured.update(("PiD", 0.0), small, small, small, 1, 1.0, 0)
    assert told.value.option == "data.image_size"


def test_lpips_works_down_to_its_smallest_side():
    pictures = torch.zeros(1, 3, SMALLEST_SIDE, SMALLEST_SIDE)
    assert alexnet_lpips()(pictures, pictures).shape == (1,)
    with pytest.raises(RuntimeError, match="too small"):
        alexnet_lpips()(pictures[..., 1:], pictures[..., 1:])


def _row(**changes) -> dict:
    row = {
        "method": "native + bicubic",
        "latent_sigma": 0.8,
        "psnr": 24.123456,
        "ssim": 0.7,
        "lpips": 0.123,
        "consistency": 40.0,
        "seconds": 1.5,
        "peak_mebibytes": 13312.4,
        "num_pictures": 100,
    }
    return {**row, **changes}


def test_the_table_is_aligned_plain_and_narrow():
    rows = [_row(), _row(method="PiD", latent_sigma=0.0, psnr=math.inf, peak_mebibytes=0.0)]
    heading, rule, native, pid = format_table(rows).split("\n")
    assert len(heading) == len(rule) == len(native) == len(pid) <= 100
    assert heading.split()[:2] == ["method", "sigma"]
    assert re.split(r"\s{2,}", native) == [
        "native + bicubic",
        "0.8",
        "24.12",
        "0.7000",
        "0.1230",
        "40.00",
        "1.500",
        "13312",
        "100",
    ]
    assert pid.split()[:3] == ["PiD", "0", "inf"]


def test_the_csv_file_holds_every_digit_and_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "run" / "metrics.csv"
    rows = [_row(), _row(method="PiD", lpips=0.5)]
    write_csv(rows, path)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{key: str(value) for key, value in row.items()} for row in rows]
    before = path.read_bytes()
    with pytest.raises(ValueError, match="unknown"):
        write_csv([_row(unknown=1)], path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["metrics.csv"]
