"""Reading, writing, resizing and arranging pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pid_lightning.checks import Mistake
from pid_lightning.pictures import files as pictures
from pid_lightning.pictures.files import read_picture, write_picture
from pid_lightning.pictures.grids import picture_grid
from pid_lightning.pictures.inputs import find_inputs, read_latents
from pid_lightning.pictures.resizing import enlarge_picture, reduce_picture


def _random_bytes(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
def test_a_picture_survives_writing_and_reading_exactly(tmp_path, suffix):
    image = torch.from_numpy(_random_bytes(7, 5)).permute(2, 0, 1) / 127.5 - 1
    path = tmp_path / "new" / f"a.b{suffix}"
    write_picture(image, path, {"seed": 3, "sigma": 0.2})
    assert torch.equal(read_picture(path), image)
    told = json.loads((path.parent / "a.b.json").read_text())
    assert told.pop("versions")["torch"] == torch.__version__
    assert told == {"seed": 3, "sigma": 0.2}
    assert len(list(path.parent.iterdir())) == 2  # no temporary file left


def test_values_are_clamped_and_rounded_to_the_nearest_byte(tmp_path):
    image = torch.tensor([-3.0, -1.0, 0.0, 0.9961, 1.0, 7.0]).expand(3, 1, 6).to(torch.bfloat16)
    write_picture(image, tmp_path / "a.png", {})
    bytes_ = np.asarray(Image.open(tmp_path / "a.png"))[0, :, 0]
    assert bytes_.tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_orientation_is_applied(tmp_path, orientation):
    upright = _random_bytes(4, 6)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    read = (read_picture(tmp_path / "a.png") + 1) * 127.5
    assert np.array_equal(read.round().byte().permute(1, 2, 0).numpy(), upright)


def test_greys_palettes_transparency_and_16_bits_become_rgb(tmp_path):
    grey = _random_bytes(4, 4, 1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(_random_bytes(4, 4)).quantize(8).save(tmp_path / "palette.png")
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (10, 255)).save(tmp_path / "opaque.png")
    expected = torch.from_numpy(grey).expand(3, -1, -1) / 127.5 - 1
    assert torch.equal(read_picture(tmp_path / "grey.png"), expected)
    assert torch.equal(read_picture(tmp_path / "deep.png"), expected)
    assert read_picture(tmp_path / "palette.png").shape == (3, 4, 4)
    assert torch.equal(read_picture(tmp_path / "clear.png"), torch.ones(3, 4, 4))
    assert torch.equal(read_picture(tmp_path / "opaque.png"), torch.full((3, 4, 4), 10 / 127.5 - 1))


def test_unreadable_pictures_give_one_sentence(tmp_path):
    Image.fromarray(_random_bytes(64, 64)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    broken = {
        "text.jpg": b"not a picture\n",
        "empty.png": b"",
        "half.png": whole[: len(whole) // 2],
        "head.png": whole[:20],
        "spoilt.png": whole[:40] + b"????????" + whole[48:],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    for path in (*(tmp_path / name for name in broken), tmp_path / "missing.png", tmp_path):
        with pytest.raises(Mistake) as told:
            read_picture(path)
        assert told.value.option == "inputs"
        assert str(path) in str(told.value)
        assert "\n" not in str(told.value)


def test_wrong_pictures_are_refused_before_anything_is_written(tmp_path):
    image = torch.zeros(3, 4, 4)
    wrong = [
        (image, "a.jpg", "path"),
        (torch.zeros(3, 1, 16384), "a.webp", "format"),
    ]
    for picture, name, option in wrong:
        with pytest.raises(Mistake) as told:
            write_picture(picture, tmp_path / name, {})
        assert told.value.option == option
    with pytest.raises(TypeError):
        write_picture(image, tmp_path / "a.png", {"device": torch.device("cpu")})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    write_picture(torch.zeros(3, 4, 4), tmp_path / "a.png", {})
    before = (tmp_path / "a.png").read_bytes()

    def half_a_save(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures.Image.Image, "save", half_a_save)
    with pytest.raises(OSError, match="No space left"):
        write_picture(torch.ones(3, 4, 4), tmp_path / "a.png", {})
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.png"]


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_reduction_equals_pillows_antialiased_bicubic(factor):
    noise = torch.rand(2, 3, 48, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    size = (24 // factor, 48 // factor)
    reference = [
        [np.asarray(Image.fromarray(plane.numpy()).resize(size, Image.BICUBIC)) for plane in image]
        for image in noise
    ]
    expected = torch.from_numpy(np.array(reference)).clamp(-1, 1)
    torch.testing.assert_close(reduce_picture(noise, factor), expected, atol=2e-6, rtol=0)


def test_reduction_and_enlargement_are_clamped_and_computed_in_fp32():
    edges = torch.ones(1, 3, 32, 32)
    edges[..., :16] = -1  # bicubic overshoots here
    generator = torch.Generator().manual_seed(0)
    low = (torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1).to(torch.bfloat16)
    for resize in (reduce_picture, enlarge_picture):
        assert resize(edges, 4).abs().max() == 1
        assert resize(low, 4).dtype == torch.bfloat16
        assert torch.equal(resize(low, 4), resize(low.float(), 4).to(torch.bfloat16))
    assert torch.equal(enlarge_picture(edges, 1), edges)
    assert enlarge_picture(edges[..., :8], 3).shape == (1, 3, 96, 24)
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(reduce_picture(enlarge_picture(flat, 4), 4), flat)


def test_the_grid_holds_every_picture_where_it_belongs():
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.rand(3, 8, 12, generator=generator) * 2 - 1 for _ in range(3)] for _ in range(2)]
    grid = picture_grid(rows)
    assert grid.shape == (3, 8 * 2 + 2, 12 * 3 + 2 * 2)
    rest = grid.clone()
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            cell = (slice(None), slice(10 * i, 10 * i + 8), slice(14 * j, 14 * j + 12))
            torch.testing.assert_close(grid[cell], (picture + 1) / 2)
            rest[cell] = 1
    assert (rest == 1).all()  # white gaps


def test_labels_stand_above_their_columns():
    rows = [[torch.full((3, 64, 96), -1.0)] * 2]
    plain, labelled = picture_grid(rows), picture_grid(rows, ["input", ""])
    band = labelled[:, : labelled.shape[1] - plain.shape[1]]
    assert torch.equal(labelled[:, band.shape[1] :], plain)
    assert labelled.shape[2] == plain.shape[2]
    assert labelled.min() >= 0
    assert labelled.max() <= 1
    assert band[..., :96].min() < 0.5  # text
    assert (band[..., 96:] == 1).all()  # no text above the other column
    assert (band[:, 0] == 1).all()  # not cut off
    assert (band[..., -1, :] == 1).all()


def test_inputs_are_expanded_sorted_and_named_once(tmp_path):
    for name in ("b.png", "a.JPG", "c.safetensors", ".hidden.png", "notes.txt", "sub.png/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in ("a.JPG", "b.png", "c.safetensors")]
    assert find_inputs([tmp_path]) == expected
    assert find_inputs([str(tmp_path / "b.png"), tmp_path]) == expected
    assert find_inputs([tmp_path / "c.safetensors", tmp_path / "a.JPG"]) == expected[::2]


def test_wrong_inputs_give_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a.png").touch()
    (tmp_path / "a.jpg").touch()
    for name in ("missing.png", "empty", "notes.txt", ""):
        with pytest.raises(Mistake) as told:
            find_inputs([tmp_path / name])
        assert told.value.option == "inputs"
    with pytest.raises(Mistake):
        find_inputs([""])


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"latent": torch.zeros(4, 2, 2)},
        {"latents": torch.zeros(4, 2, 2), "more": torch.zeros(1)},
        {"latents": torch.zeros(2, 4, 2, 2)},
        {"latents": torch.zeros(3, 2, 2)},
        {"latents": torch.zeros(4, 0, 2)},
        {"latents": torch.full((4, 2, 2), torch.nan)},
    ],
    ids=["nothing", "name", "more", "batch", "channels", "empty", "nan"],
)
def test_files_of_other_latents_are_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "z.safetensors")
    with pytest.raises(Mistake) as told:
        read_latents(tmp_path / "z.safetensors", "sd3", 4)
    assert told.value.option == "inputs"
    assert "z.safetensors" in told.value.sentence
    for latents in (torch.ones(4, 2, 3), torch.ones(1, 4, 2, 3).half()):
        save_file({"latents": latents}, tmp_path / "z.safetensors")
        assert torch.equal(read_latents(tmp_path / "z.safetensors", "sd3", 4), torch.ones(4, 2, 3))
