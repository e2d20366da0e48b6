"""PiDDecoder: reproducibility, error messages, memory estimates, files and the hub."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from decoders import decode, decode_by, make, make_info
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.decoding import tile_choice
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.memory import free_memory
from pid_lightning.diffusion.flow import resolution_shift
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.families import build_encoder
from pid_lightning.encoders.text import TextEncoder
from pid_lightning.files import hub
from pid_lightning.files.models import ModelInfo

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests/data/saved_run"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * math.log10(4 / max((a - b).square().mean().item(), 1e-20))


# ------------------------------------------------------------------- same seed, same picture


def test_a_picture_does_not_depend_on_its_batch() -> None:
    decoder, latents = make(image_size=None), noise(3, 4, 4, 5)
    sigma = [0.0, 0.3, 0.7]
    together = decode(decoder, latents, sigma)
    assert together.shape == (3, 3, 128, 160)
    assert together.dtype == torch.float32
    assert together.abs().max() <= 1
    two = decode(decoder, latents[:2], torch.tensor(sigma[:2]))
    assert psnr(together[:2], two) > 100
    assert psnr(together[:1], decode(decoder, latents[:1], 0.0)) > 100
    assert psnr(together[2:], decode(decoder, latents[2:], 0.7)) < 60  # another index, other noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [None, 64])
def test_pictures_are_in_fp32_whatever_the_network(dtype: torch.dtype, tile: int | None) -> None:
    decoder, latents = make().to(dtype=dtype), noise(1, 4, 4, 4)
    for times in ((0.999, 0.5), None):
        decoder.info = dataclasses.replace(decoder.info, student_times=times)
        assert decode(decoder, latents, steps=2, tile=tile).dtype == torch.float32


def test_the_seed_is_the_only_randomness() -> None:
    decoder, latents = make(), noise(1, 4, 4, 4)
    state = torch.get_rng_state()
    first = decode(decoder, latents)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(decode(decoder, latents), first)
    assert not torch.equal(decode(decoder, latents, seed=1), first)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    given = [decode(decoder, latents, seed=None, generator=g) for g in generators]
    assert torch.equal(*given)


def test_chunks_and_tiles_of_any_number_agree() -> None:
    decoder, latents = make(), noise(1, 4, 6, 6)
    whole = decode(decoder, latents, tile=192)
    decoder.denoiser.chunk_size = 7
    assert psnr(decode(decoder, latents, tile=192), whole) > 60
    with pytest.warns(UserWarning, match="trained on 128"):
        assert torch.equal(decode(decoder, latents), decode(decoder, latents, tile=192))


def test_auto_takes_tiles_of_the_trained_size_where_the_picture_is_larger(
    capsys, monkeypatch
) -> None:
    monkeypatch.setattr(tile_choice, "free_memory", lambda device: None)  # enough
    decoder, latents = make(), noise(1, 4, 6, 5)
    assert torch.equal(decode(decoder, latents, tile="auto"), decode(decoder, latents, tile=128))
    small = noise(1, 4, 4, 4)
    assert torch.equal(decode(decoder, small, tile="auto"), decode(decoder, small))
    decoder.decode(latents, seed=0, tile="auto", progress=True)
    assert "160 x 192 in 4 tiles of 128" in capsys.readouterr().err


def test_auto_takes_smaller_tiles_where_memory_is_short(monkeypatch) -> None:
    decoder = make(image_size=256)
    enough = decoder.estimate_memory(256, 256, 128)
    monkeypatch.setattr(tile_choice, "free_memory", lambda device: enough)
    with pytest.warns(UserWarning, match=r"Memory is short .* tiles of 128 pixels"):
        assert decoder.choose_tile(256, 256, "auto") == 128


def test_steps_are_the_trained_ones_or_fewer() -> None:
    decoder, latents = make(), noise(1, 4, 4, 4)
    assert torch.equal(decode(decoder, latents), decode(decoder, latents, steps=4))
    assert not torch.equal(decode(decoder, latents), decode(decoder, latents, steps=2))
    teacher = make(student_times=None)
    assert decode(teacher, latents, steps=2).isfinite().all()


# ------------------------------------------------------------------- outside the training


@pytest.mark.parametrize(
    ("latents", "options", "sentence"),
    [
        (noise(1, 4, 4, 4), {"latent_sigma": 0.9}, r"latent_sigma: 0\.9 is above 0\.8"),
        (3 * noise(1, 4, 4, 4), {}, "standard deviation of .* LatentSpace.normalise"),
        (noise(1, 4, 5, 4), {}, "sees 160 pixels a side but was trained on 128"),
        (noise(1, 4, 1, 1, seed=2), {}, "sees 32 pixels a side but was trained on 128"),
    ],
)
def test_what_is_outside_the_training_warns(latents: Tensor, options: dict, sentence: str) -> None:
    with pytest.warns(UserWarning, match=sentence) as told:
        make().decode(latents, seed=0, progress=False, **options)
    assert {warning.filename for warning in told} == {__file__}  # the user's own call
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(make(), noise(1, 4, 4, 4), 0.8)


# ------------------------------------------------------------------- text


class CountedText(TextEncoder):
    """Features that depend on the caption; records the captions it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.text_width, self.description, self.asked = 8, "counted", []

    def load(self) -> None:
        pass

    def encode(self, captions: list[str]) -> Tensor:
        self.asked += captions
        return torch.stack([noise(5, 8, seed=len(caption)) for caption in captions])


TEXT = {"text_length": 5, "text_width": 8}


def test_prompts_are_encoded_to_features_and_kept_in_a_file(tmp_path: Path) -> None:
    decoder, latents = make(sizes=TEXT), noise(2, 4, 4, 4)
    decoder.text_encoder = encoder = CountedText()
    by_words = decode(decoder, latents, prompt=["a", "bb"])
    assert not torch.equal(by_words, decode(decoder, latents, prompt="a"))
    encoder.asked.clear()
    features = decoder.encode_prompt(["a", "bb"], tmp_path)
    assert encoder.asked == ["a", "bb"]
    decoder.text_encoder = None
    assert torch.equal(by_words, decode(decoder, latents, prompt=features))
    with pytest.raises(ValueError, match=r"^prompt: 'a' needs a language model"):
        decode(decoder, latents, prompt="a")
    assert torch.equal(decoder.encode_prompt("bb", tmp_path), features[1:])
    with pytest.raises(ValueError, match=r"^prompt: 'ccc' needs a language model"):
        decoder.encode_prompt("ccc", tmp_path)


def test_guidance_takes_the_learned_null_or_an_empty_prompt() -> None:
    latents = noise(1, 4, 4, 4)
    for learned_null in (True, False):
        decoder = make(sizes={**TEXT, "learned_null": learned_null}, student_times=None)
        decoder.text_encoder = encoder = CountedText()
        guided = decode(decoder, latents, prompt="a", steps=1, guidance_scale=3.0)
        assert not torch.equal(guided, decode(decoder, latents, prompt="a", steps=1))
        assert ("" in encoder.asked) != learned_null
        away = {"prompt": "a", "steps": 1, "guidance_scale": 3.0, "negative_prompt": "bb"}
        features = decoder.encode_prompt("bb")
        told = decode(decoder, latents, **away)
        assert torch.equal(told, decode(decoder, latents, **away | {"negative_prompt": features}))
        assert not torch.equal(told, guided)


# ------------------------------------------------------------------- files and the hub


def test_saved_models_come_back_by_every_name(tmp_path: Path, monkeypatch) -> None:
    decoder, latents = make(), noise(1, 4, 4, 4)
    expected = decode(decoder, latents)
    decoder.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / hub.MODEL_FILE
    monkeypatch.setitem(hub.BUNDLED_MODELS, "small", file)
    for name in (tmp_path / "folder", file, str(file), "small"):
        found = PiDDecoder.from_pretrained(name)
        assert found.info == decoder.info
        # Not bit for bit: weights mapped from a file are aligned differently, so sums round so too.
        torch.testing.assert_close(decode(found, latents), expected, rtol=0, atol=1e-5)
    assert PiDDecoder.from_pretrained(file, torch.bfloat16).dtype == torch.bfloat16
    saved = json.loads((tmp_path / "folder" / hub.CONFIG_FILE).read_text())
    assert ModelInfo.from_plain(saved) == decoder.info
    card = (tmp_path / "folder" / hub.CARD_FILE).read_text()
    assert card.startswith("---\nlibrary_name: pid_lightning\n")
    assert "a student of 4 steps" in card
    fields = yaml.safe_load(card.split("---")[1])
    assert fields["base_model"] == "black-forest-labs/FLUX.2-klein-4B"
    assert (fields["license"], fields["pipeline_tag"]) == ("other", "image-to-image")


def test_a_runs_card_tells_of_its_data_and_its_test(tmp_path: Path) -> None:
    """Of the newest test; folders of this machine are named by their last part only."""
    run = shutil.copytree(RUN, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["path"] = "/home/somebody/photographs"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for i, psnr in enumerate((20.0, 24.123456)):
        table = run / f"test_metrics_{i}.csv"
        table.write_text(f"method,latent_sigma,psnr\nPiD,0.2,{psnr}\n")
        os.utime(table, (i, i))
    decoder = PiDDecoder.from_pretrained(run)
    decoder.save_pretrained(tmp_path / "model", license="cc-by-4.0")
    card = (tmp_path / "model" / hub.CARD_FILE).read_text()
    assert "license: cc-by-4.0\n" in card
    assert "| data | photographs |" in card
    assert "somebody" not in card
    assert f"| steps | {config['trainer']['max_steps']} |" in card
    assert "| PiD | 0.2 | 24.12 |" in card
    file = tmp_path / "model" / hub.MODEL_FILE
    PiDDecoder.from_pretrained(file).save_pretrained(tmp_path / "again")
    assert "## Test" not in (tmp_path / "again" / hub.CARD_FILE).read_text()


def test_a_home_folder_is_meant_where_it_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make().save_pretrained("~/model")
    assert (tmp_path / "model" / hub.MODEL_FILE).is_file()
    PiDDecoder.from_pretrained("~/model")


def test_unknown_models_are_one_sentence(tmp_path: Path, monkeypatch) -> None:
    for name in ("no-such-bundled", "folder/none.safetensors", "./a/b", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"name a model|was not found") as raised:
            PiDDecoder.from_pretrained(name)
        assert "\n" not in str(raised.value)
    with pytest.raises(OSError, match=r"'owner/none' is no local .* the hub does not") as raised:
        PiDDecoder.from_pretrained("owner/none", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(raised.value)


def test_release_gives_everything_back_and_to_brings_it_again() -> None:
    decoder, latents = make(), noise(1, 4, 4, 4)
    before = decode(decoder, latents)
    assert isinstance(decoder.encoder, Encoder)
    assert decoder.encode(noise(1, 3, 16, 16).clamp(-1, 1)).shape == (1, 128, 1, 1)
    decoder.release()
    assert decoder._encoder is None
    assert torch.equal(decode(decoder.to("cpu", torch.float32), latents), before)
    assert decoder.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert decoder.to(torch.float32).dtype == torch.float32


def test_weights_that_overflow_are_told() -> None:
    decoder = make()
    with torch.no_grad():
        decoder.denoiser.out.weight.fill_(6e4)
    with pytest.raises(Mistake) as told:
        decode(decoder.to(torch.float16), noise(1, 4, 4, 4))
    assert told.value.option == "dtype"


def test_families_that_are_not_ours_have_no_encoder() -> None:
    with pytest.raises(ValueError, match="family: OwnPiD is not one of"):
        build_encoder(make_info(family="OwnPiD"))


@pytest.mark.parametrize("tile", [None, 64])
def test_a_teacher_is_sampled_with_its_own_shift(tile: int | None) -> None:
    """That of its training, or that of the size which the network sees."""
    for time_shift in (6.0, None):
        decoder = make(student_times=None, time_shift=time_shift)
        latents, sigma = noise(1, 4, 4, 4), torch.zeros(1)
        ours = decode(decoder, latents, steps=3, tile=tile)
        seen = resolution_shift(tile or 128, tile or 128)
        expected = decode_by(
            decoder.denoiser,
            latents,
            sigma,
            student_times=None,
            steps=3,
            time_shift=time_shift or seen,
            generator=sample_generators(0, "decode", [0]),
            tile=tile,
        )
        assert torch.equal(ours, expected)
        assert not torch.equal(
            ours, decode(make(student_times=None, time_shift=2.0), latents, steps=3, tile=tile)
        )


# ------------------------------------------------------------------- memory and colour


def test_estimates_grow_as_they_must() -> None:
    decoder = make()
    whole, tiled = (decoder.estimate_memory(256, 256, tile) for tile in (None, 128))
    assert tiled < whole < decoder.estimate_memory(256, 256, batch_size=4)
    large = decoder.estimate_memory(2048, 2048, 128)
    assert large < 9 * 3 * 4 * 2048**2  # a few pictures in fp32, whatever the number of tiles
    assert decoder.to(dtype=torch.bfloat16).estimate_memory(256, 256) < whole


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_is_part_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(torch.device("cpu")) <= physical
    monkeypatch.setattr(tile_choice, "free_memory", lambda device: 0)
    with pytest.warns(UserWarning, match="Memory is short"):
        assert make().choose_tile(256, 256, "auto") == 64  # two cells: tiles get no smaller
