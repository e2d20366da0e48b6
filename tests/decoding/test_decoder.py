"""PiDDecoder: reproducibility, error messages, memory estimates, files and the hub."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from decoders import decode, make, make_info
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.decoding import tile_choice
from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.latents import decode_latents
from pid_lightning.decoding.memory import free_memory
from pid_lightning.diffusion.flow import resolution_shift
from pid_lightning.diffusion.randomness import sample_generators
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.families import build_encoder
from pid_lightning.encoders.text import TextEncoder
from pid_lightning.files import hub
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import Geometry, PiD
from pid_lightning.pictures.colour import colour_shift, match_colour

ROOT = Path(__file__).parents[2]


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


def test_auto_takes_tiles_of_the_trained_size_where_the_picture_is_larger(capsys) -> None:
    decoder, latents = make(), noise(1, 4, 6, 5)
    assert torch.equal(decode(decoder, latents, tile="auto"), decode(decoder, latents, tile=128))
    small = noise(1, 4, 4, 4)
    assert torch.equal(decode(decoder, small, tile="auto"), decode(decoder, small))
    decoder.decode(latents, seed=0, tile="auto", progress=True)
    assert "160 x 192 in 4 tiles of 128" in capsys.readouterr().err


def test_auto_takes_smaller_tiles_where_memory_is_short(monkeypatch) -> None:
    decoder = make(image_size=512)
    enough = decoder.estimate_memory(512, 512, 256)
    monkeypatch.setattr(tile_choice, "free_memory", lambda device: enough)
    with pytest.warns(UserWarning, match=r"Memory is short .* tiles of 256 pixels"):
        assert decoder.choose_tile(512, 512, "auto") == 256


def test_steps_are_the_trained_ones_or_fewer() -> None:
    decoder, latents = make(), noise(1, 4, 4, 4)
    assert torch.equal(decode(decoder, latents), decode(decoder, latents, steps=4))
    assert not torch.equal(decode(decoder, latents), decode(decoder, latents, steps=2))
    teacher = make(student_times=None)
    assert decode(teacher, latents, steps=2).isfinite().all()


# ------------------------------------------------------------------- error messages


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 5}, r"^steps: 5 must lie between 1 and 4"),
        ({"steps": 0}, r"^steps: 0 "),
        ({"steps": 1.5}, r"^steps: 1\.5 must be a whole number"),
        ({"latent_sigma": 1.2}, r"^latent_sigma: 1\.2 must be one number between 0"),
        ({"latent_sigma": [0.1, 0.2]}, r"^latent_sigma: .* or 1 of them"),
        ({"latent_sigma": float("nan")}, r"^latent_sigma: nan"),
        ({"tile": 100}, r"^tile: 100 must be a multiple of 32"),
        ({"tile": "big"}, r"^tile: 'big' must be a number of pixels, 'auto' or None"),
        ({"prompt": "a cat"}, r"^prompt and guidance_scale: this model was trained without text"),
        ({"guidance_scale": 5.0}, r"^prompt and guidance_scale: this model was trained without"),
        ({"guidance_scale": float("nan")}, r"^guidance_scale: nan must be a finite number"),
        ({"latent_sigma": None}, r"^latent_sigma: None must be one number between 0"),
        ({"latent_sigma": "high"}, r"^latent_sigma: 'high' must be one number between 0"),
        ({"tile": 64.0}, r"^tile: 64\.0 must be a number of pixels"),
        ({"generator": 5, "seed": None}, r"^generator: 5 is none; give a torch.Generator"),
        ({"seed": 3.0}, r"^seed: 3\.0 must be a whole number"),
        ({"latents": noise(1, 16, 4, 4)}, r"^latents: shape \(1, 16, 4, 4\) is not \(B, 4, h, w\)"),
        ({"latents": noise(4, 4, 4)}, r"^latents: shape \(4, 4, 4\)"),
        ({"latents": torch.full((1, 4, 4, 4), torch.nan)}, r"^latents: some values are not finite"),
        ({"generator": torch.Generator()}, r"^seed and generator were both given"),
    ],
)
def test_mistakes_are_one_sentence(arguments: dict, sentence: str) -> None:
    arguments = {"latents": noise(1, 4, 6, 6), "seed": 0, "progress": False} | arguments
    with pytest.raises(ValueError, match=sentence) as raised:
        make(image_size=None).decode(**arguments)
    assert "\n" not in str(raised.value)


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
        decode(make(), latents, **options)
    assert {warning.filename for warning in told} == {__file__}  # the user's own call
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(make(), noise(1, 4, 4, 4), 0.8)


def test_a_network_of_another_scale_is_refused() -> None:
    info = make_info()
    with pytest.raises(Mistake) as told:
        PiDDecoder(PiD(info.config, Geometry(4, 8, 8)), info)
    assert told.value.option == "denoiser"


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


def test_prompts_are_encoded_once_and_kept_in_a_file(tmp_path: Path) -> None:
    decoder, latents = make(sizes=TEXT), noise(2, 4, 4, 4)
    decoder.text_encoder = encoder = CountedText()
    features = decoder.encode_prompt(["a", "bb"], tmp_path)
    assert encoder.asked == ["a", "bb"]
    decoder.text_encoder = None
    by_words = decode(decoder, latents, prompt=["a", "bb"])
    assert torch.equal(by_words, decode(decoder, latents, prompt=features))
    assert not torch.equal(by_words, decode(decoder, latents, prompt="a"))
    other = make(sizes=TEXT)
    assert torch.equal(other.encode_prompt("bb", tmp_path), features[1:])
    with pytest.raises(ValueError, match=r"^prompt: 'ccc' needs a language model"):
        other.encode_prompt("ccc", tmp_path)
    with pytest.raises(ValueError, match=r"^prompt: .* one prompt or one per sample"):
        decode(other, latents, prompt=noise(3, 5, 8))


def test_another_text_encoder_is_asked_anew_and_a_cache_gets_what_is_remembered(
    tmp_path: Path,
) -> None:
    decoder = make(sizes=TEXT)
    for name in ("first", "second"):
        decoder.text_encoder = encoder = CountedText()
        encoder.description = name
        decoder.encode_prompt("a")
        assert encoder.asked == ["a"]
    decoder.encode_prompt("a")
    assert encoder.asked == ["a"]
    features = decoder.encode_prompt("a", tmp_path)
    assert torch.equal(make(sizes=TEXT).encode_prompt("a", tmp_path), features)
    decoder.text_encoder = None
    assert torch.equal(decoder.encode_prompt("a", tmp_path / "other"), features)
    stranger = make(sizes=TEXT)
    stranger.text_encoder = CountedText()
    stranger.text_encoder.description = "third"
    with pytest.raises(ValueError, match="holds caption features of second, not of third"):
        stranger.encode_prompt("a", tmp_path)
    with pytest.raises(ValueError, match=r"^prompt: 'b' needs a language model"):
        make(sizes=TEXT).encode_prompt(["a", "b"], tmp_path)


def test_guidance_takes_the_learned_null_or_an_empty_prompt() -> None:
    latents = noise(1, 4, 4, 4)
    for learned_null in (True, False):
        decoder = make(sizes={**TEXT, "learned_null": learned_null}, student_times=None)
        decoder.text_encoder = encoder = CountedText()
        guided = decode(decoder, latents, prompt="a", steps=1, guidance_scale=3.0)
        assert not torch.equal(guided, decode(decoder, latents, prompt="a", steps=1))
        assert ("" in encoder.asked) != learned_null


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


def test_a_home_folder_is_meant_where_it_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make().save_pretrained("~/model")
    assert (tmp_path / "model" / hub.MODEL_FILE).is_file()
    PiDDecoder.from_pretrained("~/model")


def test_names_that_are_no_folder_or_dtype_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^folder: cannot write to folder"):
        make().save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"^folder: an empty name"):
        make().save_pretrained("")
    with pytest.raises(ValueError, match=r"^dtype: 'bf16' is no torch\.dtype"):
        PiDDecoder.from_pretrained("pid-small-vae-4x", "bf16")


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
    assert decoder.encode(noise(1, 3, 16, 16).clamp(-1, 1)).shape == (1, 16, 2, 2)
    decoder.release()
    assert decoder._encoder is None
    assert torch.equal(decode(decoder.to("cpu", torch.float32), latents), before)
    assert decoder.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert decoder.to(torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(1, 3, 16, 16, dtype=torch.complex64),
        torch.zeros(0, 3, 16, 16),
        torch.full((1, 3, 16, 16), 200.0),
        torch.full((1, 3, 16, 16), torch.nan),
        [0.0],
    ],
    ids=["bytes", "complex", "none", "0_to_255", "nan", "list"],
)
def test_only_pictures_are_encoded(images: object) -> None:
    decoder = make(latent_channels=16)
    with pytest.raises(ValueError, match=r"^images: .* in \[-1, 1\]"):
        decoder.encode(images)
    decoder.encode(torch.full((1, 3, 16, 16), 1.2))  # as a native decoder may overshoot


def test_weights_that_overflow_are_told() -> None:
    decoder = make()
    with torch.no_grad():
        decoder.denoiser.out.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"^The picture is not finite in torch.float16; it"):
        decode(decoder.to(torch.float16), noise(1, 4, 4, 4))


def test_guidance_needs_a_prompt_and_features_that_are_finite() -> None:
    decoder = make(sizes=TEXT)
    with pytest.raises(ValueError, match=r"^guidance_scale: only used with a prompt"):
        decode(decoder, noise(1, 4, 4, 4), guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"^prompt: some features are not finite"):
        decode(decoder, noise(1, 4, 4, 4), prompt=torch.full((1, 5, 8), torch.nan))


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
        expected = decode_latents(
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

MEASURE = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, "tests/support")
from decoders import decode, make
from pid_lightning.decoding.memory import PeakMemory
torch.set_num_threads(1)
sizes = {"width": 64, "num_heads": 4, "pixel_width": 8}
figures = []
for changes in ({}, {"student_times": None}):
    decoder = make(sizes=sizes, image_size=None, **changes)
    weights = sum(w.numel() * 4 for w in decoder.denoiser.parameters())
    decode(decoder, torch.randn(1, 4, 8, 8), steps=2)
    for side, tile in ((384, None), (768, 256)):
        latents = torch.randn(1, 4, side // 32, side // 32)
        with PeakMemory(torch.device("cpu")) as measured:
            decode(decoder, latents, tile=tile, steps=3)
        figures.append((decoder.estimate_memory(side, side, tile) - weights, measured.peak_bytes))
print(json.dumps(figures))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a resettable high-water mark")
def test_memory_is_what_was_estimated() -> None:
    # Return freed blocks to the system at once, so that resident memory is what tensors hold.
    settings = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE],
        env={**os.environ, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for estimated, measured in json.loads(done.stdout.splitlines()[-1]):
        assert estimated == pytest.approx(measured, rel=0.15)


def test_estimates_grow_as_they_must() -> None:
    decoder = make()
    whole, tiled = (decoder.estimate_memory(1024, 1024, tile) for tile in (None, 128))
    assert tiled < whole
    assert decoder.estimate_memory(128, 128, batch_size=4) > decoder.estimate_memory(128, 128)
    six = decoder.estimate_memory(6144, 6144, 128)
    assert six < 9 * 3 * 4 * 6144**2  # a few pictures in fp32, whatever the number of tiles
    assert decoder.to(dtype=torch.bfloat16).estimate_memory(512, 512) < decoder.to(
        dtype=torch.float32
    ).estimate_memory(512, 512)


def test_colour_is_matched_and_detail_kept() -> None:
    native = 0.4 * noise(3, 48, 64).clamp(-1, 1)
    picture = torch.nn.functional.interpolate(native[None], scale_factor=4)[0]
    assert colour_shift(picture, native).largest < 1e-3
    cast = torch.tensor([0.1, 0.0, -0.2]).view(3, 1, 1)
    shift = colour_shift(picture + cast, native)
    assert shift.mean == pytest.approx((12.75, 0.0, -25.5), abs=1e-3)
    assert "red +12.8, green +0.0, blue -25.5" in str(shift).replace("-0.0", "+0.0")
    assert torch.allclose(match_colour(picture + cast, native), picture, atol=1e-5)
    checks = 0.1 * (-1.0) ** (torch.arange(192).view(-1, 1) + torch.arange(256))
    assert torch.allclose(
        match_colour(picture + checks + cast, native), picture + checks, atol=1e-5
    )
    with pytest.raises(ValueError, match="cannot be matched"):
        match_colour(picture, native[:, :40])


@pytest.mark.parametrize("size", [(88, 104), (7, 25)])
def test_an_enlargement_has_the_colours_of_its_native_decode(size: tuple[int, int]) -> None:
    native = noise(3, *size).clamp(-1, 1)
    picture = torch.nn.functional.interpolate(native[None], scale_factor=4)[0]
    assert colour_shift(picture, native).largest < 1e-3


def test_a_cast_of_half_a_picture_is_seen_and_matched() -> None:
    native = torch.zeros(3, 64, 128)
    sides = torch.where(torch.arange(512) < 256, 0.2, -0.2).expand(3, 256, -1)
    shift = colour_shift(sides, native)
    assert shift.mean == pytest.approx((0, 0, 0), abs=1e-3)
    assert shift.largest == pytest.approx(25.5, abs=1e-3)
    matched = match_colour(sides, native)
    away = torch.cat((matched[..., :192], matched[..., 320:]), dim=-1)
    assert away.abs().max() < 1e-4
    fine = 0.2 * (-1.0) ** (torch.arange(512) // 32).expand(3, 256, -1)  # 8 native pixels: detail
    assert torch.allclose(match_colour(fine, native), fine, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_is_part_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(torch.device("cpu")) <= physical
    monkeypatch.setattr(tile_choice, "free_memory", lambda device: 0)
    with pytest.warns(UserWarning, match="Memory is short"):
        assert make().choose_tile(512, 512, "auto") == 64  # two cells: tiles get no smaller
