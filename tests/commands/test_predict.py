"""`pid predict`, from the data module to the picture files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from pid_lightning.nn import AdapterConfig, PiDConfig
from pid_lightning.pictures.files import read_picture
from pid_lightning.training.data.image_data import ImageData
from pid_lightning.training.modules import Evaluation, VAEPiD

DENOISER = PiDConfig(
    width=32,
    num_heads=2,
    num_blocks=2,
    patch_size=16,
    pixel_width=4,
    pixel_attention_width=32,
    pixel_num_heads=2,
    num_pixel_blocks=1,
    text_length=0,
    adapter=AdapterConfig(width=16, num_res_blocks=1),
)


def make_model(scale: int = 2, patch_size: int = 16, **evaluation) -> VAEPiD:
    """An untrained network whose output depends on all of its inputs."""
    torch.manual_seed(0)
    model = VAEPiD(
        scale=scale,
        denoiser=replace(DENOISER, patch_size=patch_size),
        evaluation=Evaluation(steps=2, **evaluation),
    )
    for parameter in model.denoiser.parameters():  # the last layer is zero-initialised
        torch.nn.init.normal_(parameter, std=0.1)
    model.encoder.load()
    return model


def predict(model, folder, *inputs, num_workers: int = 0, **options) -> list:
    """The files that `pid predict` writes for `inputs`; the training source does not exist."""
    data = ImageData(
        "no/such/source",
        image_size=64,
        batch_size=4,
        num_workers=num_workers,
        inputs=[str(path) for path in inputs],
    )
    written = tiny.quiet_trainer(folder, **options).predict(model, data)
    return [path for paths in written for path in paths]


def draw(path, width: int, height: int, seed: int = 0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def metadata(path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def encode(model, image) -> torch.Tensor:
    return model.encoder.encode(image[None])


def test_files_are_named_after_their_inputs_and_described(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    draw(photos / "b.png", 16, 16)
    draw(photos / "a.jpg", 24, 16)
    (photos / "a.txt").write_text("a caption\n")
    (photos / "notes.md").write_text("no input")
    single = draw(tmp_path / "c.png", 16, 16)
    model = make_model()
    written = predict(model, tmp_path, photos, single)

    folder = tmp_path / "predictions"
    assert sorted(written) == [folder / f"{name}.png" for name in "abc"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        name + suffix for name in "abc" for suffix in (".png", ".json")
    )
    assert Image.open(folder / "a.png").size == (48, 32)  # width, height
    description = metadata(folder / "a.png")
    assert description["input"] == str(photos / "a.jpg")
    assert description["caption"] == "a caption"
    assert description["size"] == [32, 48]
    assert description["weights"] is None
    assert description["family"] == "VAEPiD"
    assert description["scale"] == 2
    assert (description["steps"], description["latent_sigma"]) == (2, 0.0)
    assert description["versions"]["torch"] == torch.__version__
    assert metadata(folder / "b.png")["caption"] == ""
    assert {metadata(folder / f"{name}.png")["number"] for name in "abc"} == {0, 1, 2}


@pytest.mark.parametrize("leading", [True, False])
def test_latents_of_a_picture_decode_to_what_the_picture_does(tmp_path, leading):
    model = make_model()
    source = draw(tmp_path / "picture.png", 32, 16)
    latents = encode(model, read_picture(source))
    assert latents.shape[-2:] == (2, 4)
    save_file({"latents": latents if leading else latents[0]}, tmp_path / "z.safetensors")
    (tmp_path / "z.txt").write_text("of z")
    [from_picture] = predict(model, tmp_path, source)
    [from_latents] = predict(model, tmp_path, tmp_path / "z.safetensors")
    assert from_latents.name == "z.png"
    assert metadata(from_latents)["caption"] == "of z"
    assert torch.equal(read_picture(from_latents), read_picture(from_picture))
    assert read_picture(from_picture).std() > 0.01


def test_noise_is_added_to_pictures_but_not_to_latents(tmp_path):
    clean, noisy = make_model(), make_model(predict_sigma=0.6)
    source = draw(tmp_path / "picture.png", 16, 16)
    latents = tmp_path / "z.safetensors"
    save_file({"latents": encode(clean, read_picture(source))}, latents)

    def decoded(model, path, folder):
        return read_picture(predict(model, tmp_path / folder, path)[0])

    of_picture, of_latents = (decoded(noisy, p, "noisy") for p in (source, latents))
    assert not torch.equal(of_picture, of_latents)
    assert not torch.equal(of_latents, decoded(clean, latents, "clean"))
    assert torch.equal(of_picture, decoded(noisy, source, "again"))


@pytest.mark.parametrize(
    ("scale", "patch_size", "step"), [(2, 16, 8), (1, 16, 16), (4, 16, 8), (1, 24, 24)]
)
def test_odd_sizes_are_padded_and_keep_their_shape(tmp_path, scale, patch_size, step):
    model = make_model(scale, patch_size)
    assert model.encoder.latent_stride == 8
    source = draw(tmp_path / "odd.png", 61, 51)
    [written] = predict(model, tmp_path / "odd", source)
    assert Image.open(written).size == (61 * scale, 51 * scale)
    assert metadata(written)["size"] == [51 * scale, 61 * scale]
    height, width = -(-51 // step) * step, -(-61 // step) * step
    border = ((0, height - 51), (0, width - 61), (0, 0))
    (tmp_path / "padded").mkdir()
    padded = np.pad(np.asarray(Image.open(source)), border, mode="edge")
    Image.fromarray(padded).save(tmp_path / "padded" / "odd.png")
    [whole] = predict(model, tmp_path / "whole", tmp_path / "padded")
    assert Image.open(whole).size == (width * scale, height * scale)
    part = read_picture(whole)[:, : 51 * scale, : 61 * scale]
    assert torch.equal(read_picture(written), part)


def test_bf16_mixed_stays_close_to_fp32(tmp_path):
    model = make_model()
    source = draw(tmp_path / "picture.png", 16, 16)
    [full] = predict(model, tmp_path / "fp32", source)
    [mixed] = predict(model, tmp_path / "bf16", source, precision="bf16-mixed")
    difference = read_picture(full) - read_picture(mixed)
    assert difference.abs().mean() < 0.05


def test_workers_change_nothing(tmp_path):
    sources = [draw(tmp_path / f"{i}.png", 16, 16, seed=i) for i in range(2)]
    model = make_model()
    alone = predict(model, tmp_path / "alone", *sources)
    helped = predict(model, tmp_path / "helped", *sources, num_workers=1)
    assert all(
        torch.equal(read_picture(a), read_picture(b)) for a, b in zip(alone, helped, strict=True)
    )


def test_an_output_is_replaced_by_the_same_input_alone(tmp_path):
    model = make_model()
    source = draw(tmp_path / "same.png", 16, 16)
    [first] = predict(model, tmp_path, source)
    before = first.read_bytes()
    assert predict(model, tmp_path, source) == [first]
    (tmp_path / "other").mkdir()
    other = draw(tmp_path / "other" / "same.png", 16, 16, seed=1)
    with pytest.raises(FileExistsError, match=r"same\.png .* was not made of .*other"):
        predict(model, tmp_path, other)
    model.init_from = "other.safetensors"
    model.setup = lambda stage: None
    with pytest.raises(FileExistsError, match=r"was not made of .* by other\.safetensors"):
        predict(model, tmp_path, source)
    model.init_from = None
    usual, model.evaluation = model.evaluation, Evaluation(steps=1, predict_sigma=0.8)
    with pytest.raises(FileExistsError, match="with the same settings: move it away"):
        predict(model, tmp_path, source)
    model.evaluation = usual
    assert first.read_bytes() == before
    first.with_suffix(".json").write_text("[]")
    model.init_from = None
    with pytest.raises(FileExistsError, match="move it away"):
        predict(model, tmp_path, source)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda d: [], ValueError, r"data\.inputs: nothing to decode.*--data\.inputs"),
        (lambda d: [d / "none.png"], FileNotFoundError, r"none\.png does not exist"),
        (lambda d: [d], ValueError, "holds no picture"),
        (lambda d: [write(d / "a.png", b"text")], ValueError, "cannot be read as a picture"),
        (lambda d: [write(d / "a.gif", b"text")], ValueError, "neither a picture"),
        (
            lambda d: [write(d / "z.safetensors", b"text")],
            ValueError,
            "z.safetensors cannot be read: it is truncated",
        ),
        (
            lambda d: [tensors(d, latent=torch.zeros(4, 2, 2))],
            ValueError,
            r"holds 1 tensor\(s\), the first named 'latent'",
        ),
        (
            lambda d: [tensors(d, latents=torch.zeros(2, 4, 2, 2))],
            ValueError,
            r"latents of shape \(2, 4, 2, 2\) must be \(C, h, w\)",
        ),
        (
            lambda d: [tensors(d, latents=torch.full((4, 2, 2), torch.nan))],
            ValueError,
            "not all finite",
        ),
        (
            lambda d: [tensors(d, latents=torch.zeros(99, 2, 2))],
            ValueError,
            "have 99 channels, but pid-small latents have",
        ),
        (
            lambda d: [draw(d / "a.png", 16, 16), write(d / "a.txt", b"\xff\xfe")][:1],
            ValueError,
            r"a\.txt is not UTF-8",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, make, error, message):
    with pytest.raises(error, match=message) as caught:
        predict(make_model(), tmp_path / "out", *make(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "predictions").exists()


def test_a_damaged_input_is_found_before_any_is_decoded(tmp_path):
    good = draw(tmp_path / "a.png", 16, 16)
    bad = write(tmp_path / "b.png", good.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        predict(make_model(), tmp_path, good, bad)
    assert not (tmp_path / "predictions").exists()
    other = tensors(tmp_path, latents=torch.zeros(99, 2, 2))
    with pytest.raises(ValueError, match="have 99 channels"):
        predict(make_model(), tmp_path, good, other)
    assert not (tmp_path / "predictions").exists()


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def tensors(folder, **named: torch.Tensor):
    save_file(named, folder / "z.safetensors")
    return folder / "z.safetensors"
