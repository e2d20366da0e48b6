"""Networks to measure: sizes by name, random weights, the plain transcription, random samples."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pid_lightning.checks import Mistake
from pid_lightning.files.models import ModelInfo
from pid_lightning.files.published import FLUX, VERSIONS
from pid_lightning.files.published_layout import from_published
from pid_lightning.nn import AdapterConfig, PiD, PiDConfig
from pid_lightning.training.sample import Sample

PLAIN = Path(__file__).parents[3] / "tests" / "support" / "plain.py"
V15 = VERSIONS["v1.5"]
CONFIGS = {
    "full": PiDConfig(),
    "full_v15": replace(V15, learned_null=True, adapter=replace(V15.adapter, rgb_head=True)),
    "small": PiDConfig(
        width=384,
        num_heads=6,
        num_blocks=6,
        pixel_width=16,
        pixel_attention_width=384,
        pixel_num_heads=6,
        text_width=256,
        text_length=77,
        adapter=AdapterConfig(width=128, num_res_blocks=2),
    ),
}


# On FLUX.1's latents, as teachers.
NETWORKS = {
    name: replace(FLUX, image_size=None, student_times=None, config=config)
    for name, config in CONFIGS.items()
}


def build_meta(info: ModelInfo) -> PiD:
    """The network on the meta device."""
    with torch.device("meta"):
        return info.build()


def build_random(info: ModelInfo, generator: torch.Generator) -> PiD:
    """The network with random fp32 weights, none of them zero, so that checks see every layer."""
    denoiser = build_meta(info).to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            is_factor = weight.ndim < 2 and name.endswith(
                ("weight", "log_alpha")
            )  # of a norm, gate
            deviation = 0.2 if weight.ndim < 2 else weight[0].numel() ** -0.5
            weight.normal_(float(is_factor), deviation, generator=generator)
    return denoiser


def build(info: ModelInfo, with_plain: bool) -> dict[str, nn.Module]:
    """A network with random weights in fp32 as ``"eager"``, and perhaps its plain transcription as
    ``"plain"``.

    Raises:
        Mistake: the package was installed without the repository's tests.
    """
    generator = torch.Generator().manual_seed(0)
    denoiser = build_random(info, generator)
    if not with_plain:
        return {"eager": denoiser}
    if not PLAIN.is_file():
        raise Mistake("baseline", f"needs {PLAIN}; run from a clone of the repository.")
    spec = importlib.util.spec_from_file_location("pid_lightning_plain", PLAIN)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    arguments = plain.published_arguments(info)
    published = plain.random_published(arguments, generator)
    denoiser.load_state_dict(denoiser.state_dict() | from_published(published, denoiser))
    return {"eager": denoiser, "plain": plain.PlainPiD(published, arguments, info.config)}


def random_sample(info: ModelInfo, size: int, batch_size: int, device: torch.device) -> Sample:
    """A batch of noise, drawn in fp32 on the CPU from a fixed seed; nothing is dropped.

    Args:
        info: the network.
        size: side of x0 in pixels.
        batch_size: B.
        device: where to move the tensors.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator).to(device)

    config, geometry = info.config, info.geometry
    seen, cells = size // geometry.scale, size // geometry.cell
    kept = torch.ones(batch_size, dtype=torch.bool, device=device)
    return Sample(
        x0=normal(3, size, size),
        low_resolution=normal(3, seen, seen),
        latents=normal(geometry.latent_channels, cells, cells),
        latent_sigma=0.8 * torch.rand(batch_size, generator=generator).to(device),
        text=normal(config.text_length, config.text_width) if config.text_length else None,
        keep_latents=kept,
        keep_text=kept if config.text_length else None,
        numbers=list(range(batch_size)),
    )
