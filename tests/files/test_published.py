"""The published layout: every tensor is converted once and back, anything else is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import published_shapes, random_published
from published import V15 as V15_CHANGES
from published import build_from_arguments
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.files.published_layout import from_published, to_published
from pid_lightning.nn import PiD

VECTORS = Path(__file__).parents[1] / "vectors"
V1 = {
    "num_groups": 2,
    "hidden_size": 16,
    "pixel_hidden_size": 4,
    "pixel_attn_hidden_size": 24,
    "pixel_num_groups": 3,
    "patch_depth": 3,
    "pixel_depth": 2,
    "patch_size": 8,
    "txt_embed_dim": 6,
    "txt_max_length": 5,
    "lq_hidden_dim": 8,
    "lq_num_res_blocks": 2,
    "lq_interval": 2,
    "lq_gate_type": "sigma_aware_per_token_per_dim",
    "lq_latent_channels": 4,
    "sr_scale": 4,
    "latent_spatial_down_factor": 4,
}
V15 = V1 | V15_CHANGES
both = pytest.mark.parametrize("arguments", [V1, V15], ids=["v1", "v15"])


def make(arguments: dict[str, Any]) -> tuple[dict[str, Tensor], PiD]:
    published = random_published(arguments, torch.Generator().manual_seed(0))
    return published, build_from_arguments(arguments)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(ours[k].dtype == v.dtype and torch.equal(ours[k], v) for k, v in theirs.items())


@pytest.mark.parametrize("name", ["denoiser_v1_vae_4x", "denoiser_v15_flux2_4x"])
def test_the_authors_weights_go_there_and_back(name: str) -> None:
    """Published names, ours, published names: equal bit for bit; as are ours, theirs, ours."""
    file = VECTORS / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        arguments = json.loads(opened.metadata()["config"])
    given = load_file(file).items()
    published = {k.removeprefix("param."): v for k, v in given if k.startswith("param.")}
    denoiser = build_from_arguments(arguments)
    denoiser.load_state_dict(from_published(published, denoiser))
    back = to_published(denoiser)
    assert_same(back, published)
    assert_same(from_published(back, denoiser), denoiser.state_dict())


@both
def test_every_number_arrives_exactly_once(arguments: dict[str, Any]) -> None:
    """Released values are made unique; the converted network must hold exactly the same values."""
    published, count = {}, 0
    for name, shape in published_shapes(arguments):
        size = torch.Size(shape).numel()
        published[name] = torch.arange(count, count + size, dtype=torch.float64).view(shape)
        count += size
    denoiser = build_from_arguments(arguments).double()
    state = from_published(published, denoiser)
    denoiser.load_state_dict(state, strict=True)
    numbers = torch.cat([v.flatten() for v in denoiser.state_dict().values()]).sort().values
    assert torch.equal(numbers, torch.arange(count, dtype=torch.float64))
    assert_same(to_published(denoiser), published)


@both
def test_conversion_only_moves_values(arguments: dict[str, Any]) -> None:
    """So it is linear, keeps bf16, changes nothing it is given, and needs no more than shapes."""
    published, denoiser = make(arguments)
    before = {k: v.clone() for k, v in published.items()}
    fresh = {k: v.clone() for k, v in denoiser.state_dict().items()}
    state = from_published(published, denoiser)
    assert_same(published, before)
    assert_same(denoiser.state_dict(), fresh)
    doubled = from_published({k: 2 * v for k, v in published.items()}, denoiser)
    assert_same(doubled, {k: 2 * v for k, v in state.items()})
    halves = from_published({k: v.bfloat16() for k, v in published.items()}, denoiser)
    assert_same(halves, {k: v.bfloat16() for k, v in state.items()})
    assert_same(from_published(published, denoiser.to("meta")), state)


def told(published: dict[str, Tensor], denoiser: PiD) -> str:
    with pytest.raises(Mistake) as mistake:
        from_published(published, denoiser)
    assert mistake.value.option == "published"
    return mistake.value.sentence


def test_every_wrong_tensor_is_named() -> None:
    """One of each kind: tensors whose names differ in a number are of one kind."""
    one = {"patch_depth": 1, "pixel_depth": 1, "lq_num_res_blocks": 1}
    published, denoiser = make(V15 | one)
    for name in {re.sub(r"\d+", "", name): name for name in published}.values():
        tensor = published[name]
        renamed = {k if k != name else f"net.{name}": v for k, v in published.items()}
        sentence = told(renamed, denoiser)
        assert f"1 tensors missing ({name})" in sentence
        assert f"1 tensors unknown (net.{name})" in sentence
        longer = torch.cat((tensor, tensor)) if tensor.ndim else torch.zeros(2)
        assert f"({name} {tuple(longer.shape)} instead" in told(
            published | {name: longer}, denoiser
        )


def test_other_networks_are_refused() -> None:
    published, _ = make(V1)
    heads = "(lq_proj.lq_aux_rgb_head.0.bias, "
    assert f"missing {heads}" in told(published, build_from_arguments(V15))
    assert f"unknown {heads}" in told(make(V15)[0], build_from_arguments(V1))
    for change in ({"patch_depth": 4}, {"lq_num_res_blocks": 1}, {"hidden_size": 32}):
        told(published, build_from_arguments({**V1, **change}))


def test_a_network_with_more_than_the_published_ones_has_no_way_back() -> None:
    denoiser = make(V1)[1]
    denoiser.text_embedding.null = torch.nn.Parameter(torch.zeros(5, 16))
    with pytest.raises(Mistake) as mistake:
        to_published(denoiser)
    assert mistake.value.option == "denoiser"
    assert "text_embedding.null" in mistake.value.sentence
