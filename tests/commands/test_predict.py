"""`pid predict`, from the data module to the picture files: the pictures of `pid decode`."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from pid_lightning.__main__ import main
from pid_lightning.checks import Mistake
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.encoders.text_cache import cache_captions
from pid_lightning.nn import AdapterConfig, PiDConfig
from pid_lightning.pictures.files import read_picture
from pid_lightning.training.data.image_data import ImageData
from pid_lightning.training.modules import Evaluation, Training, VAEPiD

DENOISER = PiDConfig(
    width=16,
    num_heads=2,
    num_blocks=1,
    patch_size=16,
    pixel_width=4,
    pixel_attention_width=16,
    pixel_num_heads=2,
    num_pixel_blocks=1,
    text_length=0,
    adapter=AdapterConfig(width=8, num_res_blocks=1),
)


def make_model(
    scale: int = 2, patch_size: int = 16, text: tiny.Text | None = None, **evaluation
) -> VAEPiD:
    """An untrained network whose output depends on all of its inputs."""
    sizes = {"patch_size": patch_size}
    if text is not None:
        sizes |= {"text_length": 3, "text_width": text.text_width, "learned_null": False}
    model = VAEPiD(
        scale=scale,
        denoiser=replace(DENOISER, **sizes),
        text=text,
        training=Training(seed=3, caption_dropout=0.0),
        evaluation=Evaluation(**({"steps": 2} | evaluation)),
    )
    tiny.randomise(model.denoiser, std=0.2)
    model.encoder.load()
    return model


def predict(model, folder, *inputs, **options) -> list:
    """The files that `pid predict` writes for `inputs`; the training source does not exist."""
    data = ImageData(
        "no/such/source", image_size=64, batch_size=4, inputs=[str(path) for path in inputs]
    )
    written = tiny.quiet_trainer(folder, **options).predict(model, data)
    return [path for paths in written for path in paths]


def draw(path, width: int, height: int, seed: int = 0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def metadata(path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    "kind", ["student", pytest.param("guided teacher", marks=pytest.mark.slow)]
)
def test_predict_and_decode_make_the_same_pictures(tmp_path, kind):
    """Of pictures and latents, whole and in tiles, alone and in company."""
    options = ["--seed", "3", "--steps", "2", "--sigma", "0.5"]
    if kind == "student":
        model = make_model(predict_sigma=0.5)
        model.student_times = STUDENT_TIMES
    else:
        model = make_model(text=tiny.Text(), predict_sigma=0.5, guidance_scale=3.0)
        cache_captions(tiny.Text(), ["", "a fox"], tmp_path / "cache")
        options += ["--prompt", "a fox", "--text_cache", str(tmp_path / "cache")]
        options += ["--guidance_scale", "3"]
    model.image_size = 64
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    small, large = draw(inputs / "b.png", 27, 21), draw(inputs / "a.png", 64, 48, seed=1)
    latents = inputs / "z.safetensors"
    save_file({"latents": model.encoder.encode(read_picture(large)[None])}, latents)
    for file in (small, large, latents):
        file.with_suffix(".txt").write_text("a fox\n")
    trainable = [weight.requires_grad for weight in model.denoiser.parameters()]
    in_company = predict(model, tmp_path / "company", inputs)
    assert trainable == [weight.requires_grad for weight in model.denoiser.parameters()]
    [alone] = predict(model, tmp_path / "alone", latents)

    PiDDecoder(model.denoiser, model.info).save_pretrained(tmp_path / "model")
    decoded = tmp_path / "decoded"
    main(
        ["decode", str(inputs), "--model", f"{tmp_path}/model", "--output", f"{decoded}", *options]
    )
    for written in in_company:
        ours, theirs = read_picture(written), read_picture(decoded / written.name)
        assert torch.equal(ours, theirs), written.name
        assert ours.std() > 0.01
        ours, theirs = metadata(written), metadata(decoded / written.name)
        assert all(ours[told] == theirs[told] for told in ("fingerprint", "tile", "size"))
        theirs["settings"]["text_cache"] = None  # predict takes the run's own text encoder
        assert ours["settings"] == theirs["settings"]
    assert torch.equal(read_picture(alone), read_picture(decoded / "z.png"))


def test_files_are_named_after_their_inputs_and_described(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    draw(photos / "b.png", 16, 16)
    draw(photos / "a.jpg", 24, 16)
    (photos / "a.txt").write_text("a caption\n")
    (photos / "notes.md").write_text("no input")
    single = draw(tmp_path / "c.png", 16, 16)
    written = predict(make_model(text=tiny.Text()), tmp_path, photos, single)

    folder = tmp_path / "predictions"
    assert sorted(written) == [folder / f"{name}.png" for name in "abc"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        name + suffix for name in "abc" for suffix in (".png", ".json")
    )
    assert Image.open(folder / "a.png").size == (48, 32)  # width, height
    description = metadata(folder / "a.png")
    assert description["input"] == str(photos / "a.jpg")
    assert description["settings"]["prompt"] == "a caption"
    assert (description["settings"]["steps"], description["settings"]["sigma"]) == (2, 0.0)
    assert description["size"] == [32, 48]
    assert description["model"] is None
    assert (description["family"], description["scale"]) == ("VAEPiD", 2)
    assert description["versions"]["torch"] == torch.__version__
    assert metadata(folder / "b.png")["settings"]["prompt"] == ""


def test_noise_is_added_to_pictures_but_not_to_latents(tmp_path):
    clean, noisy = make_model(), make_model(predict_sigma=0.6)
    source = draw(tmp_path / "picture.png", 16, 16)
    latents = tmp_path / "z.safetensors"
    save_file({"latents": clean.encoder.encode(read_picture(source)[None])}, latents)

    def decoded(model, path, folder):
        return read_picture(predict(model, tmp_path / folder, path)[0])

    of_picture, of_latents = (decoded(noisy, p, "noisy") for p in (source, latents))
    assert not torch.equal(of_picture, of_latents)
    assert not torch.equal(of_latents, decoded(clean, latents, "clean"))
    assert torch.equal(decoded(clean, latents, "clean"), decoded(clean, source, "clean"))


@pytest.mark.parametrize(
    ("scale", "patch_size", "step"), [(2, 16, 16), (1, 16, 16), (4, 32, 16), (1, 48, 48)]
)
def test_odd_sizes_are_padded_and_keep_their_shape(tmp_path, scale, patch_size, step):
    model = make_model(scale, patch_size)
    assert model.encoder.latent_stride == 16
    source = draw(tmp_path / "odd.png", 29, 19)
    [written] = predict(model, tmp_path / "odd", source)
    assert Image.open(written).size == (29 * scale, 19 * scale)
    assert metadata(written)["size"] == [19 * scale, 29 * scale]
    height, width = -(-19 // step) * step, -(-29 // step) * step
    border = ((0, height - 19), (0, width - 29), (0, 0))
    (tmp_path / "padded").mkdir()
    padded = np.pad(np.asarray(Image.open(source)), border, mode="edge")
    Image.fromarray(padded).save(tmp_path / "padded" / "odd.png")
    [whole] = predict(model, tmp_path / "whole", tmp_path / "padded")
    assert Image.open(whole).size == (width * scale, height * scale)
    part = read_picture(whole)[:, : 19 * scale, : 29 * scale]
    assert torch.equal(read_picture(written), part)


def test_bf16_mixed_stays_close_to_fp32(tmp_path):
    model = make_model()
    source = draw(tmp_path / "picture.png", 16, 16)
    [full] = predict(model, tmp_path / "fp32", source)
    [mixed] = predict(model, tmp_path / "bf16", source, precision="bf16-mixed")
    difference = read_picture(full) - read_picture(mixed)
    assert difference.abs().mean() < 0.05


def test_an_output_is_replaced_by_the_same_input_alone(tmp_path):
    model = make_model()
    source = draw(tmp_path / "same.png", 16, 16)
    [first] = predict(model, tmp_path, source)
    before = first.read_bytes()
    assert predict(model, tmp_path, source) == [first]
    (tmp_path / "other").mkdir()
    other = draw(tmp_path / "other" / "same.png", 16, 16, seed=1)
    weight = model.denoiser.out.weight.data

    def refuses(path) -> None:
        with pytest.raises(Mistake) as told:
            predict(model, tmp_path, path)
        assert told.value.option == "inputs"
        assert first.read_bytes() == before

    refuses(other)
    weight.add_(0.1)
    refuses(source)
    weight.sub_(0.1)
    usual, model.evaluation = model.evaluation, Evaluation(steps=1, predict_sigma=0.8)
    refuses(source)
    model.evaluation = usual
    first.with_suffix(".json").write_text("[]")
    refuses(source)


def test_mistakes_are_told_before_any_file_is_decoded(tmp_path):
    good = draw(tmp_path / "a.png", 16, 16)
    (tmp_path / "b.png").write_bytes(good.read_bytes()[:300])
    save_file({"latents": torch.zeros(99, 2, 2)}, tmp_path / "z.safetensors")
    model = make_model()
    for inputs, option in (
        ([], "data.inputs"),
        ([good, tmp_path / "b.png"], "inputs"),
        ([good, tmp_path / "z.safetensors"], "inputs"),
        ([good, tmp_path / "none.png"], "inputs"),
    ):
        with pytest.raises(ValueError, match=f"^{option}: ") as told:
            predict(model, tmp_path, *inputs)
        assert "\n" not in str(told.value)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt"):
        predict(model, tmp_path, good)
    assert not (tmp_path / "predictions").exists()


def test_the_rest_of_a_folder_is_predicted_whatever_one_file_does(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "c", "long" * 62):
        draw(folder / f"{name}.png", 16, 16)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:100])
    with pytest.raises(Mistake, match=r"b\.png"):
        predict(make_model(), tmp_path, folder)
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 3
