"""What the room refuses: a `Mistake` names the option; what this machine lacks is an OSError."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_towers  # noqa: F401 (timm's registry)
import torch
from safetensors.torch import save_file
from tiny import Text, config

from pid_lightning.checks import Mistake
from pid_lightning.encoders.dinov2 import DINOv2Encoder
from pid_lightning.encoders.families import build_encoder
from pid_lightning.encoders.latent_spaces import KNOWN_SPACES, LatentSpace, space_of
from pid_lightning.encoders.pretrained import find_weights
from pid_lightning.encoders.siglip import SigLIPEncoder
from pid_lightning.encoders.text import LanguageModelText, NoText, check_text
from pid_lightning.encoders.text_cache import CachedText, cache_captions, cache_file, encode_prompts
from pid_lightning.encoders.vae import VAEEncoder, build_vae_encoder
from pid_lightning.files.published import FLUX


def refuse(call) -> Mistake:
    with pytest.raises(Mistake) as told:
        call()
    assert "\n" not in str(told.value)
    return told.value


class Narrow(Text):
    """Captions of two tokens."""

    length = 2


class Other(Text):
    """Tiny features of another encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.description = "other"


def folder(path: Path, name: object, **sizes: object) -> str:
    """A folder with the configuration of one of diffusers' classes."""
    config = json.dumps({"_class_name": name, **sizes})
    (path / "config.json").write_text(config, encoding="utf-8")
    return str(path)


def deep(path: Path) -> str:
    (path / "config.json").write_text("[" * 100_000, encoding="utf-8")
    return str(path)


def features(path: Path, value: torch.Tensor) -> torch.Tensor:
    save_file({"features": value}, cache_file(path, "a fox"))
    return CachedText(str(path), 6).encode(["a fox"])


def statistics(path: Path, **tensors: torch.Tensor) -> str:
    save_file(tensors, path / "statistics.safetensors")
    return str(path / "statistics.safetensors")


def dinov2(**options) -> DINOv2Encoder:
    return DINOv2Encoder("vit_mini_patch14_reg4_dinov2", **options)


def taef2(images: torch.Tensor) -> torch.Tensor:
    encoder = build_vae_encoder("taef2")
    encoder.load()
    return encoder.encode(images)


def check(text, dropout: float = 0.1, **changes) -> None:
    check_text(text, config(**{"text_width": 6, "text_length": 3} | changes), dropout)


def cached(path: Path, text_width: int = 6) -> CachedText:
    cache_captions(Text(), ["a fox"], path)
    return CachedText(str(path), text_width)


zeros = torch.zeros
MISTAKES = {
    "unknown name": ("vae", lambda path: VAEEncoder("sd4")),
    "no folder": ("vae", lambda path: VAEEncoder("./no/such")),
    "empty folder": ("vae", lambda path: VAEEncoder(str(path))),
    "another network": ("vae", lambda path: VAEEncoder(folder(path, "VQModel"))),
    "endless layers": (
        "vae",
        lambda path: VAEEncoder(folder(path, "AutoencoderKL", layers_per_block=10**8)),
    ),
    "endless widths": (
        "vae",
        lambda path: VAEEncoder(folder(path, "AutoencoderKL", block_out_channels=[2**15])),
    ),
    "channels in words": (
        "vae",
        lambda path: VAEEncoder(folder(path, "AutoencoderKL", latent_channels="four")),
    ),
    "no scale": ("vae", lambda path: VAEEncoder(folder(path, "AutoencoderKL", scaling_factor=0))),
    "no name": ("vae", lambda path: VAEEncoder(folder(path, ["AutoencoderKL"]))),
    "brackets": ("vae", lambda path: VAEEncoder(deep(path))),
    "another type": (
        "vae",
        lambda path: build_encoder(replace(FLUX, encoder={"vae": 7})),
    ),
    "another argument": (
        "arguments",
        lambda path: build_encoder(replace(FLUX, encoder={"name": "flux"})),
    ),
    "flat features": ("text_width", lambda path: features(path, zeros(6))),
    "no features": ("text_width", lambda path: features(path, zeros(0, 6))),
    "whole features": ("weights", lambda path: features(path, zeros(3, 6).int())),
    "endless features": ("weights", lambda path: features(path, zeros(3, 6) / 0)),
    "negative variance": (
        "weights",
        lambda path: dinov2(statistics=statistics(path, mean=zeros(32), var=zeros(32) - 1)),
    ),
    "unknown space": ("vae", lambda path: space_of(torch.nn.Identity())),
    "never random": ("vae", lambda path: build_vae_encoder("taef2", pretrained=False)),
    "unknown tower": ("model", lambda path: DINOv2Encoder("vit_base_dinov9")),
    "no transformer": ("model", lambda path: DINOv2Encoder("resnet18")),
    "no SigLIP": ("model", lambda path: SigLIPEncoder("ViT-B-32")),
    "misspelt": ("model", lambda path: SigLIPEncoder("ViT-SO400M-14-SigLIP3")),
    "no variance": (
        "statistics",
        lambda path: dinov2(statistics=statistics(path, mean=zeros(32))),
    ),
    "channels of statistics": (
        "statistics",
        lambda path: dinov2(statistics=statistics(path, mean=zeros(3), var=zeros(3))),
    ),
    "sides of pictures": ("images", lambda path: taef2(zeros(1, 3, 40, 32))),
    "channels of pictures": ("images", lambda path: taef2(zeros(1, 1, 32, 32))),
    "no batch": ("images", lambda path: taef2(zeros(3, 32, 32))),
    "raw channels": ("latents", lambda path: KNOWN_SPACES["sd3"].normalise(zeros(1, 4, 2, 2))),
    "no batch of latents": (
        "latents",
        lambda path: KNOWN_SPACES["sdxl"].denormalise(zeros(4, 2, 2)),
    ),
    "several frames": (
        "latents",
        lambda path: KNOWN_SPACES["qwen"].normalise(zeros(1, 16, 3, 2, 2)),
    ),
    "odd sides": ("latents", lambda path: KNOWN_SPACES["flux2"].normalise(zeros(1, 32, 5, 4))),
    "numbers of a space": ("shift", lambda path: LatentSpace("odd", 4, 8, shift=(1.0, 2.0))),
    "short captions": ("length", lambda path: LanguageModelText("model", length=1)),
    "dtype of text": ("dtype", lambda path: LanguageModelText("model", dtype="int8")),
    "width of text": ("text", lambda path: check(Text(), text_width=8)),
    "shorter than the null": ("text", lambda path: check(Narrow())),
    "neither text nor null": ("text", lambda path: check(NoText(), learned_null=False)),
    "two encoders, one cache": (
        "path",
        lambda path: cache_captions(Other(), ["snow"], cached(path).path),
    ),
    "width of a cache": ("text_width", lambda path: cached(path, 64).encode(["a fox"])),
    "no language model": ("prompt", lambda path: encode_prompts(None, ["a fox"], 6)),
    "unknown family": ("family", lambda path: build_encoder(replace(FLUX, family="os.system"))),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_names_its_option(tmp_path: Path, case: str) -> None:
    option, call = MISTAKES[case]
    assert refuse(lambda: call(tmp_path)).option == option


def test_captions_as_long_as_the_null_or_without_it_are_fine() -> None:
    check(Text())
    check(Narrow(), dropout=0.0)
    check(NoText())
    check(NoText(), text_length=0, learned_null=False)


ABSENT = {
    "checkpoint": ("no.pth", lambda: dinov2(checkpoint="no.pth")),
    "statistics": ("no.pt", lambda: dinov2(statistics="no.pt")),
    "folder without weights": (
        str(Path(__file__).parent),
        lambda: find_weights("option", str(Path(__file__).parent)),
    ),
    "cache": ("no/cache", lambda: CachedText("no/cache").load()),
    "caption": ("'a cat'", lambda: CachedText("no/cache").encode(["a cat"])),
    "language model": ("no/model", lambda: LanguageModelText("./no/model").load()),
    "autoencoder": ("black-forest-labs/FLUX.2-klein-4B", lambda: VAEEncoder("flux2").load()),
    "DINOv2": (
        "timm/vit_small_patch14_dinov2.lvd142m",
        lambda: DINOv2Encoder("vit_small_patch14_dinov2").load(),
    ),
    "open_clip's SigLIP": (
        "timm/ViT-B-16-SigLIP2",
        lambda: SigLIPEncoder("ViT-B-16-SigLIP2").load(),
    ),
    "timm's SigLIP": (
        "timm/vit_base_patch16_siglip_224.v2_webli",
        lambda: SigLIPEncoder("vit_base_patch16_siglip_224.v2_webli").load(),
    ),
    "no repository": ("no hub repository", lambda: dinov2().load()),
}


@pytest.mark.parametrize("case", ABSENT)
def test_what_is_absent_is_named(case: str, offline: None) -> None:
    value, call = ABSENT[case]
    with pytest.raises(OSError, match=re.escape(value)) as told:
        call()
    assert "\n" not in str(told.value)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No hub access and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_OFFLINE", True, raising=False)
