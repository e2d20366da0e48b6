"""Trainings equal those recorded, and files saved by version 0.1.0 open as they did then."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import load_file

from pid_lightning import PiDDecoder
from pid_lightning.__main__ import main

OLD_RUN = golden.DATA / "old_run"
OLD_MODEL = golden.DATA / "old_model.safetensors"


def test_quickstart_and_its_distillation_train_as_recorded(tmp_path: Path) -> None:
    golden.assert_as_recorded("quickstart", golden.quickstart(tmp_path))
    golden.assert_as_recorded("distillation", golden.distillation(tmp_path))


def test_an_old_run_resumes_as_recorded(tmp_path: Path) -> None:
    golden.assert_as_recorded("resumed", golden.resumed(tmp_path))


@pytest.mark.parametrize("model", [OLD_RUN, OLD_MODEL], ids=lambda path: path.stem)
def test_an_old_model_decodes_as_then(model: Path) -> None:
    then = load_file(golden.DATA / "old_decode.safetensors")
    decoder = PiDDecoder.from_pretrained(model)
    picture = decoder.decode(then["latents"], latent_sigma=0.2, steps=4, seed=0, progress=False)
    torch.testing.assert_close(picture, then["picture"], rtol=0, atol=1e-5)


def test_an_old_run_exports_the_old_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    main(["export", str(OLD_RUN), str(path), "--dtype=fp32"])
    now, then = load_file(path), load_file(OLD_MODEL)
    assert now.keys() == then.keys()
    assert all(torch.equal(now[name], then[name]) for name in then)
    assert PiDDecoder.from_pretrained(path).info == PiDDecoder.from_pretrained(OLD_MODEL).info
