"""`pid decode`, `pid export` and `pid import`, from the command line to the files."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import tiny
import torch
from decoders import make
from PIL import Image
from plain import plain_velocity, published_arguments, published_shapes, random_published
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters

from pid_lightning.__main__ import main
from pid_lightning.checks import Mistake
from pid_lightning.commands import decode_files
from pid_lightning.commands.models import import_weights
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.diffusion.noising import add_latent_noise
from pid_lightning.diffusion.randomness import draw_noise, sample_generators
from pid_lightning.diffusion.sampling import STUDENT_TIMES, sample_few_steps
from pid_lightning.encoders.text_cache import cache_captions
from pid_lightning.files.hub import find_model
from pid_lightning.files.models import ModelInfo, load_model
from pid_lightning.files.published import (
    FAMILIES,
    VERSIONS,
    export_published,
    import_published,
    published_info,
)
from pid_lightning.files.published_layout import from_published, to_published
from pid_lightning.pictures.files import read_picture
from pid_lightning.pictures.inputs import output_stem

# ------------------------------------------------------------------- pid decode


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of random weights on TAEF2's latents."""
    folder = tmp_path / "model"
    make(latent_channels=128, latent_stride=16).save_pretrained(folder)
    return folder / "model.safetensors"


def draw(path: Path, width: int, height: int, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    Image.fromarray(pixels.astype(np.uint8)).resize((width, height), 2).save(path)
    return path


def pid(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The sentence that a mistake is told in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        pid(*arguments)
    assert status.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pid: ")]
    assert len(told) == 1
    return told[0]


def test_pictures_come_out_scale_times_as_large_with_a_json(tmp_path: Path, model: Path) -> None:
    draw(tmp_path / "a.png", 27, 21)
    pid("decode", tmp_path / "a.png", "--model", model, "--output", tmp_path / "out", "--seed", 3)
    assert Image.open(tmp_path / "out" / "a.png").size == (108, 84)
    told = json.loads((tmp_path / "out" / "a.json").read_text())
    assert told["size"] == [84, 108]
    assert told["settings"]["seed"] == 3
    assert (told["scale"], told["latent_space"], told["tile"]) == (4, "flux2", None)
    assert told["student_times"] == list(STUDENT_TIMES)
    assert told["fingerprint"]
    assert told["versions"]["torch"] == torch.__version__


def test_a_file_is_decoded_alike_whatever_its_company(tmp_path: Path, model: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    draw(both / "a.png", 32, 32)
    b = draw(both / "b.png", 32, 24, seed=1)
    pid("decode", both, "--model", model, "--output", tmp_path / "1", "--format", "webp")
    pid("decode", b, "--model", model, "--output", tmp_path / "2", "--format", "webp")
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == [
        *("a.json", "a.webp", "b.json", "b.webp")
    ]
    first, second = (read_picture(tmp_path / n / "b.webp") for n in "12")
    assert torch.equal(first, second)
    assert first.std() > 0.05


def test_latents_decode_to_what_their_picture_does(tmp_path: Path, model: Path) -> None:
    source = draw(tmp_path / "picture.png", 32, 16)
    latents = PiDDecoder.from_pretrained(model).encode(read_picture(source)[None])
    save_file({"latents": latents}, tmp_path / "z.safetensors")
    save_file({"latents": latents}, tmp_path / "LOUD.SAFETENSORS")
    files, out = (tmp_path / "z.safetensors", tmp_path / "LOUD.SAFETENSORS"), tmp_path / "out"
    pid("decode", source, *files, "--model", model, "--output", out)
    made, given, loud = (read_picture(out / f"{name}.png") for name in ("picture", "z", "LOUD"))
    assert given.shape == (3, 64, 128)
    assert torch.equal(given, made)
    assert torch.equal(loud, made)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--steps 9", "steps: 9 must lie between 1 and 4"),
        ("--steps 0", "steps: 0 must be at least 1"),
        ("--tile 100", "tile: 100 must be a multiple of 64"),
        ("--tile -64", "tile: -64 must be a multiple of 64"),
        ("--guidance_scale 2", "guidance_scale: 2.0 must be a finite number, and 1 where"),
        ("--prompt hi --text_model none", "prompt: this model was trained without text"),
        ("--prompt caf\udce9", "prompt: 'caf\\udce9' is not UTF-8 text"),
        ("--text_model none", "text_model: only used with a prompt"),
        ("--captions --text_model none", "prompt: this model was trained without text"),
        ("--captions --prompt hi", "captions: not together with a prompt"),
        ("--sigma 1.5", "sigma: 1.5 must lie between 0 and 1"),
        ("--sigma [0.2,-1]", "sigma: -1.0 must lie between 0 and 1"),
        ("--sigma []", "sigma: an empty list"),
        ("--sigma [0.2,0.2000000001]", "sigma: two results would have one name"),
        ("--device gpu", "device: 'gpu' is not available on this machine"),
        ("--device hpu", "device: 'hpu' is not available on this machine (No module named"),
        ("--device xpu", "device: 'xpu' is not available on this machine"),
        ("--device meta", "device: 'meta' is not available on this machine (Cannot copy"),
        ("--output /proc", "output: cannot write to folder /proc ("),
        ("--output a_file", "output: cannot write to folder a_file (File exists)"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_encoded(
    arguments: str,
    told: str,
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PiDDecoder, "encode", None)
    Path("a_file").write_text("something")
    source = draw(tmp_path / "a.png", 32, 32)
    assert told in refused(capsys, "decode", source, "--model", model, *arguments.split())


@pytest.mark.slow
def test_compiled_tiles_share_one_graph_whatever_the_pictures_sizes(
    tmp_path: Path, model: Path
) -> None:
    draw(tmp_path / "a.png", 32, 32)
    draw(tmp_path / "b.png", 40, 24, seed=1)
    given = ("decode", tmp_path / "a.png", tmp_path / "b.png", "--model", model, "--tile", 64)
    pid(*given, "--dtype", "fp32", "--output", tmp_path / "eager")
    torch.compiler.reset()
    counters.clear()
    pid(*given, "--dtype", "fp32", "--output", tmp_path / "compiled", "--compile")
    assert counters["stats"]["unique_graphs"] == 1
    for name in ("a.png", "b.png"):
        eager, compiled = (read_picture(tmp_path / n / name) for n in ("eager", "compiled"))
        assert (eager - compiled).abs().max() <= 2.01 / 255  # one step of 8 bits


@pytest.mark.parametrize(
    "student_times",
    [STUDENT_TIMES, pytest.param(None, marks=pytest.mark.slow)],
    ids=["student", "teacher"],
)
def test_options_reach_the_decoder(tmp_path: Path, student_times: tuple[float, ...] | None) -> None:
    sizes = {"text_width": 6, "text_length": 3}
    made = make(latent_channels=128, latent_stride=16, student_times=student_times, sizes=sizes)
    made.save_pretrained(tmp_path)
    source, out = draw(tmp_path / "picture.png", 48, 48), tmp_path / "out"
    decoder = PiDDecoder.from_pretrained(tmp_path).attend_in_windows(32)
    clean = decoder.encode(read_picture(source)[None])
    save_file({"latents": clean}, tmp_path / "z.safetensors")
    cache = tmp_path / "cache"
    cache_captions(tiny.Text(), ["fox"], cache)
    fox = decoder.encode_prompt("fox", cache)
    options = "--sigma .5 --seed 3 --steps 2 --window 32 --tile 128 --guidance_scale 2 --prompt fox"
    options = (*options.split(), "--text_cache", cache)
    for name in ("picture.png", "z.safetensors"):
        pid("decode", tmp_path / name, "--model", tmp_path, "--output", out, *options)
    eps = draw_noise(clean.shape, sample_generators(3, "latents", [0]), "cpu")
    noisy = add_latent_noise(clean, eps, torch.full((1,), 0.5))
    for name, latents in (("picture.png", noisy), ("z.png", clean)):
        same = {"seed": 3, "steps": 2, "tile": 128, "guidance_scale": 2.0, "progress": False}
        (expected,) = decoder.decode(latents, 0.5, fox, **same)
        assert (read_picture(out / name) - expected).abs().max() <= 1.01 / 255, name


def test_a_prompt_is_encoded_by_the_model_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(
        latent_channels=128, latent_stride=16, sizes={"text_width": 6, "text_length": 3}
    ).save_pretrained(tmp_path)
    built = []

    def language_model(*arguments: object, **options: object) -> tiny.Text:
        built.append((arguments, options))
        return tiny.Text()

    monkeypatch.setattr(decode_files, "LanguageModelText", language_model)
    source = draw(tmp_path / "a.png", 16, 16)
    words = ("--prompt", "a fox", "--text_model", "words", "--text_prefix", "so: ")
    pid("decode", source, "--model", tmp_path, "--output", tmp_path / "out", *words)
    assert built == [(("words", "so: "), {"length": 3, "text_width": 6})]
    decoder = PiDDecoder.from_pretrained(tmp_path)
    decoder.text_encoder = tiny.Text()
    latents = decoder.encode(read_picture(source)[None])
    (expected,) = decoder.decode(latents, prompt="a fox", seed=0, progress=False)
    assert (read_picture(tmp_path / "out" / "a.png") - expected).abs().max() <= 1.01 / 255


def test_captions_lie_beside_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is the one that its caption gives as a prompt, and the JSON states it."""
    make(
        latent_channels=128, latent_stride=16, sizes={"text_width": 6, "text_length": 3}
    ).save_pretrained(tmp_path / "model")
    text = tiny.Text()
    monkeypatch.setattr(decode_files, "LanguageModelText", lambda *given, **more: text)
    for name in "abc":
        draw(tmp_path / f"{name}.png", 16, 16)
    (tmp_path / "a.txt").write_text("a fox")
    (tmp_path / "b.txt").write_text("a lemur")
    options = ("--model", tmp_path / "model", "--text_model", "words")
    pid("decode", tmp_path, *options, "--captions", "--output", tmp_path / "all")
    assert sorted(text.asked) == ["", "a fox", "a lemur"]
    for name, caption in {"a": "a fox", "b": "a lemur", "c": ""}.items():
        one = tmp_path / f"one_{name}"
        given = (f"--prompt={caption}", "--output", one)
        pid("decode", tmp_path / f"{name}.png", *options, *given)
        both = [read_picture(folder / f"{name}.png") for folder in (one, tmp_path / "all")]
        assert torch.equal(*both)
        told = json.loads((tmp_path / "all" / f"{name}.json").read_text())["settings"]
        assert told == json.loads((one / f"{name}.json").read_text())["settings"]
    assert len({(tmp_path / "all" / f"{name}.png").read_bytes() for name in "abc"}) > 1


def test_several_noise_levels_in_one_call(tmp_path: Path, model: Path) -> None:
    """Each picture is that of a call of its own."""
    source, out = draw(tmp_path / "p.png", 16, 16), tmp_path / "out"
    options = ("--model", model, "--steps", 1)
    pid("decode", source, *options, "--output", out, "--sigma", "[0,0.2,0.4]")
    for sigma in (0, 0.2, 0.4):
        one = tmp_path / f"{sigma}"
        pid("decode", source, *options, "--output", one, "--sigma", sigma)
        expected = json.loads((one / "p.json").read_text())
        assert json.loads((out / f"p_sigma{sigma:g}.json").read_text()) == expected
        assert torch.equal(read_picture(out / f"p_sigma{sigma:g}.png"), read_picture(one / "p.png"))
    assert len(list(out.iterdir())) == 6


def test_the_deterministic_sampler(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture
) -> None:
    """It is the sampler's own, without fresh noise."""
    source, out = draw(tmp_path / "p.png", 16, 16), tmp_path / "out"
    pid("decode", source, "--model", model, "--output", out, "--deterministic")
    decoder = PiDDecoder.from_pretrained(model)
    latents = decoder.encode(read_picture(source)[None])
    condition = decoder.denoiser.condition(latents, torch.zeros(1))
    with torch.no_grad():
        expected = sample_few_steps(
            lambda x, t: decoder.denoiser(x, t, condition),
            draw_noise((1, 3, 64, 64), sample_generators(0, "decode", [0]), "cpu"),
            student_times=decoder.info.student_times,
            stochastic=False,
        ).clamp(-1, 1)
    assert (read_picture(out / "p.png") - expected[0]).abs().max() <= 1.01 / 255
    noisy = decoder.decode(latents, seed=0, progress=False)
    assert (noisy - expected).abs().mean() > 1e-3
    make(latent_channels=128, latent_stride=16, student_times=None).save_pretrained(tmp_path / "t")
    options = ("--model", tmp_path / "t", "--output", tmp_path / "other")
    assert "deterministic: a teacher" in refused(
        capsys, "decode", source, *options, "--deterministic"
    )


def test_comparison_and_colour(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture) -> None:
    source = draw(tmp_path / "p.png", 32, 32)
    pid("decode", source, "--model", model, "--output", tmp_path / "1", "--compare")
    plain = json.loads((tmp_path / "1" / "p.json").read_text())["colour_shift"]
    width, height = Image.open(tmp_path / "1" / "p_compare.png").size
    assert width > 2 * 128
    assert height > 128
    assert "colour shift: red" in capsys.readouterr().out
    pid("decode", source, "--model", model, "--output", tmp_path / "2", "--match_colour")
    pictures = [read_picture(tmp_path / n / "p.png") for n in "12"]
    decoder = PiDDecoder.from_pretrained(model)
    native = decoder.encoder.decode(decoder.encode(read_picture(source)[None]))[0].clamp(-1, 1)
    errors = [(p.mean((1, 2)) - native.mean((1, 2))).abs().max() for p in pictures]
    assert errors[1] < 0.3 * errors[0]
    assert max(map(abs, plain["mean"])) == pytest.approx(127.5 * errors[0].item(), abs=2)


def test_ctrl_c_leaves_complete_files(
    tmp_path: Path, model: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    for name in "ab":
        draw(tmp_path / f"{name}.png", 16, 16)
    decode_one = decode_files.FileDecoder.decode

    def interrupted(self: decode_files.FileDecoder, file: Path, path: Path) -> None:
        if file.stem == "b":
            raise KeyboardInterrupt
        decode_one(self, file, path)

    monkeypatch.setattr(decode_files.FileDecoder, "decode", interrupted)
    inputs = [tmp_path / "a.png", tmp_path / "b.png"]
    with pytest.raises(SystemExit) as status:
        pid("decode", *inputs, "--model", model, "--output", tmp_path / "out")
    assert status.value.code == 130
    assert "stopped; the files written so far are complete" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.json", "a.png"]
    read_picture(tmp_path / "out" / "a.png")


def test_mistakes_are_told_before_the_work(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture
) -> None:
    good, bad = draw(tmp_path / "a.png", 16, 16), tmp_path / "b.png"
    bad.write_bytes(good.read_bytes()[:100])
    out = tmp_path / "out"
    common = ("--model", model, "--output", out)
    assert "b.png cannot be read" in refused(capsys, "decode", good, bad, *common)
    assert "none.png" in refused(capsys, "decode", tmp_path / "none.png", *common)
    assert "was not found" in refused(capsys, "decode", good, "--model", "none.safetensors")
    assert "sigma: 2.0 must lie" in refused(capsys, "decode", good, *common, "--sigma", 2)
    save_file({"latents": torch.zeros(4, 2, 2)}, tmp_path / "z.safetensors")
    assert "z.safetensors holds" in refused(capsys, "decode", tmp_path / "z.safetensors", *common)
    assert not out.exists()
    pid("decode", good, *common)
    assert "exists already" in refused(capsys, "decode", good, *common)
    pid("decode", good, *common, "--overwrite")
    beside = ("--model", model, "--output", tmp_path, "--overwrite")
    assert "would overwrite an input" in refused(capsys, "decode", good, *beside)


def test_the_rest_of_a_folder_is_decoded_whatever_one_file_does(
    tmp_path: Path, model: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in "ace":
        draw(folder / f"{name}.png", 16, 16)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:100])
    (folder / "d.safetensors").write_bytes(b"no latents")
    os.mkfifo(folder / "f.png")
    decode_one = decode_files.FileDecoder.decode

    def decode(self: decode_files.FileDecoder, file: Path, path: Path) -> None:
        if file.stem == "c":
            raise torch.OutOfMemoryError("CUDA out of memory")
        decode_one(self, file, path)

    monkeypatch.setattr(decode_files.FileDecoder, "decode", decode)
    with pytest.raises(SystemExit) as status:
        pid("decode", folder, "--model", model, "--output", out)
    assert status.value.code == 2
    *told, last = capsys.readouterr().err.splitlines()
    assert all(f"{name}." in told[0] for name in "bd")  # before the work
    assert all(f"{name}." in last for name in "bcd")
    assert sorted(p.name for p in out.iterdir()) == ["a.json", "a.png", "e.json", "e.png"]
    for name in "ace":
        (folder / f"{name}.png").unlink()
    refused(capsys, "decode", folder, "--model", model, "--output", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_fault_with_one_file_is_shown_in_full_after_the_rest(
    tmp_path: Path, model: Path, monkeypatch
) -> None:
    for name in "ab":
        draw(tmp_path / f"{name}.png", 16, 16)
    decode_one = decode_files.FileDecoder.decode

    def decode(self: decode_files.FileDecoder, file: Path, path: Path) -> None:
        if file.stem == "a":
            raise ZeroDivisionError("a bug")
        decode_one(self, file, path)

    monkeypatch.setattr(decode_files.FileDecoder, "decode", decode)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        pid("decode", tmp_path, "--model", model, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "b.png").exists()


def test_names_too_long_for_outputs_are_shortened(tmp_path: Path, model: Path, monkeypatch) -> None:
    """Of 255 bytes each, of letters of 1, 2 and 4 bytes, and of none; and printed in ASCII."""
    source, folder = draw(tmp_path / "a.png", 16, 16), tmp_path / "ü"
    folder.mkdir()
    for name in (b"a" * 250 + b"1", b"a" * 250 + b"2", "ü".encode() * 125, "🦊".encode() * 62):
        shutil.copy(source, os.path.join(os.fsencode(folder), name + b".png"))
    shutil.copy(source, os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    pid("decode", folder, "--model", model, "--output", tmp_path / "öut", "--compare")
    console.flush()
    assert b"5 pictures in" in console.buffer.getvalue()
    assert len(list((tmp_path / "öut").iterdir())) == 5 * 4
    assert len({output_stem(file) for file in folder.iterdir()}) == 5


@pytest.mark.parametrize(
    "prompt",
    ["#1 fan art", "null", "~", "a #b", "", "1.5", "a: b", "'a'", "[a", "*a", "- a", "---"],
)
def test_a_prompt_is_taken_as_it_is(monkeypatch, prompt: str) -> None:
    taken = []
    monkeypatch.setattr(decode_files, "decode_files", lambda *given: taken.append(given[3]))
    pid("decode", "a.png", f"--prompt={prompt}")
    assert taken[0].prompt == prompt


def test_a_comparison_overwrites_nothing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture
) -> None:
    a, compared = draw(tmp_path / "a.bmp", 16, 16), draw(tmp_path / "a_compare.png", 16, 16)
    out = tmp_path / "out"

    def told(*arguments: object) -> str:
        return refused(capsys, "decode", "--model", model, "--compare", "--output", *arguments)

    assert "a_compare.png would be both a result and a comparison" in told(out, a, compared)
    assert "a_compare.png exists already" in told(tmp_path, a)
    assert not out.exists()


@pytest.mark.parametrize(("command", "told"), [("'decode', ", "--match_colour"), ("", "bench")])
def test_help_is_quick_and_brings_no_library(command: str, told: str) -> None:
    code = (
        "import sys; from pid_lightning.__main__ import main\n"
        f"try: main([{command}'--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


# ------------------------------------------------------------------- pid export


def test_a_run_is_exported_averaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fitted = tiny.fit(tmp_path / "run" / "version_0" / "checkpoints", 2)
    for dtype in ("bf16", "fp32"):
        out = tmp_path / f"{dtype}.safetensors"
        pid("export", tmp_path / "run", out, "--dtype", dtype)
        denoiser, info = load_model(out)
        assert info == fitted.info
        for ours, theirs in zip(
            denoiser.parameters(), fitted.denoiser_ema.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs.to(ours.dtype))
    assert denoiser.dtype == torch.float32
    assert "the teacher of" in capsys.readouterr().out
    newest = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    for folder in (tmp_path / "run", newest.parent.parent, newest.parent):
        assert find_model(folder) == newest
    (tmp_path / "empty").mkdir()
    new = tmp_path / "new.safetensors"
    assert str(tmp_path / "empty") in refused(capsys, "export", tmp_path / "empty", new)
    assert not new.exists()


# ------------------------------------------------------------------- pid import


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the published versions small."""
    sizes = {"width": 16, "num_heads": 2, "num_blocks": 3, "text_width": 6, "text_length": 5}
    sizes |= {"pixel_width": 4, "pixel_attention_width": 24, "pixel_num_heads": 3}
    for version, config in VERSIONS.items():
        adapter = dataclasses.replace(config.adapter, width=8, num_res_blocks=2)
        changed = dataclasses.replace(config, adapter=adapter, **sizes)
        monkeypatch.setitem(VERSIONS, version, changed)


def publish(
    path: Path, info: ModelInfo, prefix: str = "net.", **others: Tensor
) -> dict[str, Tensor]:
    """A published file of random weights; returns its tensors without prefix."""
    tensors = random_published(published_arguments(info), torch.Generator().manual_seed(0))
    torch.save({f"{prefix}{k}": v for k, v in tensors.items()} | others, path)
    return tensors


def test_the_published_numbers_are_these() -> None:
    """Those of the paper and the release that no tensor's shape shows, and the geometry."""
    told = {
        name: (*dataclasses.astuple(info.geometry), info.noise_frame)
        for name, info in FAMILIES.items()
    }
    assert told == {
        "flux": (16, 8, 4, "flow"),
        "sd3": (16, 8, 4, "flow"),
        "flux2": (128, 16, 4, "flow"),
        "sdxl": (4, 8, 4, "variance_preserving"),
        "qwen": (16, 8, 4, "flow"),
        "dinov2": (768, 16, 4, "flow"),
        "siglip": (1152, 16, 8, "flow"),
    }
    for info in FAMILIES.values():
        assert (info.latent_sigma_max, info.student_times, info.time_shift) == (
            0.8,
            (0.999, 0.866, 0.634, 0.342),
            None,
        )
    for version, reference in {"v1": 1024, "v1.5": 2048}.items():
        config = VERSIONS[version]
        assert config.rope_reference == (reference, reference)
        assert (config.num_heads, config.pixel_num_heads, config.adapter.interval) == (24, 16, 2)
        assert (config.prediction, config.text_length) == ("velocity", 300)
    for name in FAMILIES:
        for version in VERSIONS:
            unpack = 2 if (name, version) == ("flux2", "v1.5") else 1
            assert published_info(name, version, False).config.adapter.unpack == unpack
    paddings = {version: config.adapter.padding for version, config in VERSIONS.items()}
    assert paddings == {"v1": "zeros", "v1.5": "replicate"}


def some_slow(families: Iterable[str], quick: list[str]) -> list[Any]:
    """Every family in every version; all but those named as `FAMILY-VERSION` are slow."""
    return [
        pytest.param(family, version, marks=[] if name in quick else pytest.mark.slow, id=name)
        for family in families
        for version in VERSIONS
        for name in [f"{family}-{version}"]
    ]


@pytest.mark.parametrize(
    ("family", "version"), some_slow(FAMILIES, ["flux2-v1.5", "siglip-v1", "dinov2-v1.5"])
)
def test_full_size_shapes_convert(family: str, version: str) -> None:
    """456 tensors of v1 and 461 of v1.5, as published, on the meta device."""
    with torch.device("meta"):
        described = published_info(family, version, with_rgb_head=False)
        denoiser = described.build()
        shapes = published_shapes(published_arguments(described))
        published = {name: torch.empty(shape) for name, shape in shapes}
    assert len(published) == {"v1": 456, "v1.5": 461}[version]
    denoiser.load_state_dict(from_published(published, denoiser), assign=True)
    if family == "flux":
        # The published 98.8 million of v1.5 count the head that only training reads, too.
        parts = (denoiser.adapter, denoiser.gates)
        injected = sum(w.numel() for part in parts for w in part.parameters())
        assert injected == pytest.approx({"v1": 59.9e6, "v1.5": 97.7e6}[version], rel=1e-3)
        assert sum(w.numel() for w in denoiser.parameters()) == pytest.approx(1.36e9, rel=0.05)


@pytest.mark.parametrize(
    ("family", "version"),
    some_slow(["flux", "flux2", "sdxl", "siglip"], ["flux2-v1.5", "siglip-v1"]),
)
def test_published_weights_decode_as_the_plain_method_does(
    small: None, tmp_path: Path, family: str, version: str
) -> None:
    described = published_info(family, version, with_rgb_head=version == "v1.5")
    arguments = published_arguments(described)
    path, out = tmp_path / "published.pth", tmp_path / "ours.safetensors"
    ignored = {"fake_score.a": torch.zeros(1), "discriminator.b": torch.zeros(1)}
    tensors = publish(path, described, **ignored)
    info = import_published(path, out, family, version)
    decoder = PiDDecoder.from_pretrained(out)
    assert decoder.info == info
    assert info.student_times == (0.999, 0.866, 0.634, 0.342)
    assert info.latent_space == FAMILIES[family].latent_space

    cells = -(-32 // info.geometry.cell)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, info.geometry.latent_channels, cells, cells, generator=generator)
    latents = latents / latents.std()
    text = torch.randn(1, 5, 6, generator=generator)
    sigma = torch.tensor([0.3])
    seeds = [sample_generators(7, "decode", [0]) for _ in range(2)]
    ours = decoder.decode(latents, 0.3, text, generator=seeds[0], progress=False, tile="auto")

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return plain_velocity(tensors, arguments, x_t, t, text, latents, sigma)

    start = draw_noise(ours.shape, seeds[1], "cpu")
    theirs = sample_few_steps(velocity, start, 4, seeds[1]).clamp(-1, 1)
    assert (ours - theirs).abs().max() < 1e-3 * max(1, theirs.abs().max())


def test_the_average_is_taken_when_asked(small: None, tmp_path: Path) -> None:
    path, out = tmp_path / "published.pth", tmp_path / "ours.safetensors"
    publish(path, published_info("flux", "v1", False), "net_ema.")
    info = import_published(path, out, "flux", "v1", ema=True, student_times=None)
    assert info.student_times is None
    with pytest.raises(Mistake) as told:
        import_published(path, out, "flux", "v1")
    assert told.value.option == "published"
    assert "net_ema." in told.value.sentence


def test_what_is_not_exactly_the_published_network_is_refused(small: None, tmp_path: Path) -> None:
    path, out = tmp_path / "published.pth", tmp_path / "ours.safetensors"

    def told(option: str, family: str, version: str) -> str:
        with pytest.raises(Mistake) as error:
            import_published(path, out, family, version)
        assert error.value.option == option
        assert "\n" not in str(error.value)
        assert not out.exists()
        return error.value.sentence

    flux = published_info("flux", "v1", False)
    tensors = publish(path, flux)
    assert "flux or sd3 or qwen v1, not flux v1.5" in told("version", "flux", "v1.5")
    assert "flux or sd3 or qwen v1, not sdxl v1" in told("family", "sdxl", "v1")
    assert "flux or sd3 or qwen v1, not flux2 v1" in told("family", "flux2", "v1")
    torch.save({f"net.{k}": v for k, v in tensors.items() if k != "y_pos_embedding"}, path)
    assert "1 tensors missing (y_pos_embedding)" in told("published", "flux", "v1")
    for name, unknown in (("net.extra", "extra"), ("other.extra", "other.extra")):
        publish(path, flux, **{name: torch.zeros(1)})
        assert f"1 tensors unknown ({unknown})" in told("published", "flux", "v1")
    torch.save({"net.a": {"b": 1}}, path)
    told("published", "flux", "v1")
    publish(path, published_info("flux", "v1.5", False))
    told("version", "flux", "v1")
    path.write_bytes(path.read_bytes()[:1000])
    told("path", "flux", "v1.5")


def test_import_offers_what_was_published(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parameters = get_type_hints(import_weights)
    assert get_args(parameters["family"]) == tuple(FAMILIES)
    assert get_args(parameters["version"]) == tuple(VERSIONS)
    path, out = tmp_path / "published.pth", tmp_path / "out.safetensors"
    network = published_info("sdxl", "v1.5", with_rgb_head=True).build()
    torch.save({f"net.{k}": v for k, v in network.state_dict().items()}, path)
    options = ("--family", "sdxl", "--version", "v1.5")
    assert "tensors missing" in refused(capsys, "import", path, out, *options)
    assert not out.exists()


# ------------------------------------------------------------------- and back


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("family", "version"), [("flux", "v1"), ("flux2", "v1.5")])
def test_published_weights_go_there_and_back(
    small: None, tmp_path: Path, family: str, version: str, suffix: str
) -> None:
    """Equal bit for bit, under the same names, from both kinds of file."""
    described = published_info(family, version, with_rgb_head=version == "v1.5")
    tensors = publish(tmp_path / "published.pth", described)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / f"theirs.{suffix}"
    options = ("--family", family, "--version", version)
    pid("import", tmp_path / "published.pth", ours, *options)
    pid("export", ours, theirs, "--layout", "published", "--dtype", "fp32")
    held = load_file(theirs) if suffix == "safetensors" else torch.load(theirs, weights_only=True)
    assert held.keys() == {f"net.{name}" for name in tensors}
    assert all(torch.equal(held[f"net.{name}"], tensor) for name, tensor in tensors.items())
    pid("import", theirs, tmp_path / "again.safetensors", *options)
    assert (tmp_path / "again.safetensors").read_bytes() == ours.read_bytes()


def test_what_the_published_layout_cannot_hold_is_named(small: None, tmp_path: Path) -> None:
    known = published_info("flux", "v1", with_rgb_head=False)
    adapter = known.config.adapter
    changes = {
        "learned_null: False, here True": {"learned_null": True},
        "prediction: velocity, here x0": {"prediction": "x0"},
        "width: 16, here 32": {"width": 32},
        "adapter.padding: zeros, here replicate": {
            "adapter": dataclasses.replace(adapter, padding="replicate")
        },
    }
    others = {
        told: dataclasses.replace(known, config=dataclasses.replace(known.config, **change))
        for told, change in changes.items()
    }
    replace = partial(dataclasses.replace, known)
    others["student_times"] = replace(student_times=(0.9, 0.5))
    others["time_shift"] = replace(student_times=None, time_shift=3.0)
    others["scale: 4, here 8"] = replace(geometry=dataclasses.replace(known.geometry, scale=8))
    others["mine latents"] = replace(latent_space="mine")
    for told, info in others.items():
        with pytest.raises(Mistake) as error:
            export_published(info.build(), info, tmp_path / "out.pth", torch.float32)
        assert error.value.option == "layout"
        assert told in error.value.sentence
    assert not list(tmp_path.iterdir())
    export_published(known.build(), known, tmp_path / "out.pth", torch.float32)


def test_pixeldits_weights_begin_a_teacher(small: None, tmp_path: Path) -> None:
    """Its file wraps the network and holds a projection of its training; the adapter is new."""
    path = tmp_path / "pixeldit.pth"
    tensors = publish(path, published_info("flux", "v1", False))
    backbone = {k: v for k, v in tensors.items() if not k.startswith("lq_proj.")}
    held = {f"core.{k}": v for k, v in backbone.items()} | {"_repa_projector.0.bias": torch.ones(1)}
    torch.save({"state_dict": held}, path)
    for version in VERSIONS:
        out = tmp_path / f"{version}.safetensors"
        info = import_published(path, out, "flux", version)
        assert info.student_times is None
        denoiser, _ = load_model(out)
        back = to_published(denoiser)
        assert all(torch.equal(back[name], tensor) for name, tensor in backbone.items())
        assert denoiser.adapter.heads.weight.count_nonzero() == 0
