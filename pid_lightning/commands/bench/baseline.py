"""The benchmark baseline: the plain transcription in tests/plain.py in place of the denoiser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from pid_lightning.files.models import ModelInfo
from pid_lightning.files.published_layout import from_released
from pid_lightning.nn import PiD, PiDConfig

PLAIN = Path(__file__).parents[3] / "tests" / "support" / "plain.py"


def load_plain(path: Path = PLAIN) -> ModuleType:
    """Import the plain transcription.

    Raises:
        FileNotFoundError: the package was installed without the repository's tests.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--baseline: {path} does not exist, since an installed package has no tests; run from "
            "a clone of the repository (pip install -e .)."
        )
    spec = importlib.util.spec_from_file_location("pid_lightning_plain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_published(config: PiDConfig) -> None:
    """Raise ValueError for a network that the plain transcription does not cover."""
    adapter = config.adapter
    unsupported = {
        "text_length: 0": config.text_length == 0,
        "prediction: x0": config.prediction != "velocity",
        "adapter.upsampling: shuffle": adapter.upsampling != "nearest",
        "adapter.sigma_plane: true": adapter.sigma_plane,
        "adapter.head_norm: true": adapter.head_norm,
        "adapter.native: taef2": adapter.native != "none",
        "adapter.gate: none": adapter.gate == "none",
    }
    if any(unsupported.values()):
        names = ", ".join(name for name, is_present in unsupported.items() if is_present)
        raise ValueError(
            "--baseline: the plain transcription covers the published network and does not support "
            f"{names}; use --network full or small."
        )


def build_pair(
    denoiser: PiD, info: ModelInfo, generator: torch.Generator
) -> tuple[PiD, torch.nn.Module]:
    """`denoiser` and its transcription with the same random weights in fp32.

    Raises:
        FileNotFoundError, ValueError: see `load_plain` and `check_published`.
    """
    check_published(info.config)
    plain = load_plain()
    arguments = plain.published_arguments(info)
    released = plain.random_released(arguments, generator)
    denoiser.load_state_dict(denoiser.state_dict() | from_released(released, denoiser))
    return denoiser, plain.PlainPiD(released, arguments, info.config)
