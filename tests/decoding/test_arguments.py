"""What a decoder refuses: each mistake names its option, in one sentence, before any work."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from decoders import make, make_info
from torch import Tensor

from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.nn import Geometry, PiD

TEXT = {"text_length": 5, "text_width": 8}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def refused(option: str) -> AbstractContextManager:
    return pytest.raises(ValueError, match=f"^{option}: [^\\n]*$")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 5),
        ("steps", 0),
        ("steps", 1.5),
        ("latent_sigma", 1.2),
        ("latent_sigma", [0.1, 0.2]),
        ("latent_sigma", float("nan")),
        ("latent_sigma", None),
        ("latent_sigma", "high"),
        ("tile", 100),
        ("tile", "big"),
        ("tile", 64.0),
        ("prompt", "a cat"),
        ("guidance_scale", 5.0),
        ("guidance_scale", float("nan")),
        ("seed", 3.0),
        ("generator", 5),
        ("generator", torch.Generator()),  # beside the seed
        ("latents", noise(1, 16, 4, 4)),
        ("latents", noise(4, 4, 4)),
        ("latents", torch.full((1, 4, 4, 4), torch.nan)),
        ("latents", [0.0]),
    ],
)
def test_arguments_of_decode(option: str, value: object) -> None:
    arguments = {"latents": noise(1, 4, 6, 6), "seed": 0, "progress": False} | {option: value}
    with refused(option):
        make(image_size=None).decode(**arguments)


@pytest.mark.parametrize(
    "prompt",
    [torch.full((1, 5, 8), torch.nan), torch.zeros(3, 5, 8), torch.zeros(5, 7), [], 3, ["a", 3]],
    ids=["nan", "batch", "width", "none", "number", "mixed"],
)
def test_prompts(prompt: object) -> None:
    with refused("prompt"):
        make(sizes=TEXT).decode(noise(2, 4, 4, 4), prompt=prompt, progress=False)


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
    with refused("images"):
        decoder.encode(images)
    decoder.encode(torch.full((1, 3, 16, 16), 1.2))  # as a native decoder may overshoot


def test_a_network_of_another_scale() -> None:
    info = make_info()
    with refused("denoiser"):
        PiDDecoder(PiD(info.config, Geometry(4, 8, 8)), info)


def test_names_that_are_no_folder_or_dtype(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((OSError, ValueError), match=r"^folder: cannot write to folder"):
        make().save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match=r"^folder: cannot write to folder"):
        make().save_pretrained("")
    with refused("dtype"):
        PiDDecoder.from_pretrained(dtype="bf16")
