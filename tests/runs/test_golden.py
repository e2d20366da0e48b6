"""Trainings equal those recorded, and files saved then open as they did."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import load_file

from pid_lightning import PiDDecoder
from pid_lightning.__main__ import main

SAVED_RUN = golden.DATA / "saved_run"
SAVED_MODEL = golden.DATA / "saved_model.safetensors"


def test_quickstart_teacher_and_distillation_train_as_recorded(tmp_path: Path) -> None:
    golden.assert_as_recorded("quickstart", golden.quickstart(tmp_path))
    golden.assert_as_recorded("teacher", golden.teacher(tmp_path))
    golden.assert_as_recorded("distillation", golden.distillation(tmp_path))


def test_a_saved_run_resumes_as_recorded(tmp_path: Path) -> None:
    golden.assert_as_recorded("resumed", golden.resumed(tmp_path))


@pytest.mark.parametrize("model", [SAVED_RUN, SAVED_MODEL], ids=lambda path: path.stem)
def test_a_saved_model_decodes_as_then(model: Path) -> None:
    then = load_file(golden.DATA / "saved_decode.safetensors")
    decoder = PiDDecoder.from_pretrained(model)
    picture = decoder.decode(then["latents"], latent_sigma=0.2, steps=4, seed=0, progress=False)
    torch.testing.assert_close(picture[..., :32, :32], then["picture"], rtol=0, atol=1e-5)


def test_a_saved_run_exports_the_saved_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    main(["export", str(SAVED_RUN), str(path), "--dtype=fp32"])
    now, then = load_file(path), load_file(SAVED_MODEL)
    assert now.keys() == then.keys()
    assert all(torch.equal(now[name], then[name]) for name in then)
    assert PiDDecoder.from_pretrained(path).info == PiDDecoder.from_pretrained(SAVED_MODEL).info
