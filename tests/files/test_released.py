"""The published layout: every tensor is converted once, and anything else is rejected by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import random_released, released_shapes
from published import build_from_arguments
from torch import Tensor

from pid_lightning.files.published_layout import from_released
from pid_lightning.nn import PiD

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
V15 = {
    **V1,
    "lq_gate_type": "sigma_aware_per_token",
    "lq_conv_padding_mode": "replicate",
    "pit_lq_inject": True,
    "lq_aux_rgb_head": True,
}


def make(arguments: dict[str, Any]) -> tuple[dict[str, Tensor], PiD]:
    released = random_released(arguments, torch.Generator().manual_seed(0))
    return released, build_from_arguments(arguments)


@pytest.mark.parametrize("arguments", [V1, V15], ids=["v1", "v15"])
def test_every_number_arrives_exactly_once(arguments: dict[str, Any]) -> None:
    """Released values are made unique; the converted network must hold exactly the same values."""
    released, count = {}, 0
    for name, shape in released_shapes(arguments):
        size = torch.Size(shape).numel()
        released[name] = torch.arange(count, count + size, dtype=torch.float64).view(shape)
        count += size
    denoiser = build_from_arguments(arguments).double()
    state = from_released(released, denoiser)
    denoiser.load_state_dict(state, strict=True)
    numbers = torch.cat([v.flatten() for v in denoiser.state_dict().values()]).sort().values
    assert torch.equal(numbers, torch.arange(count, dtype=torch.float64))


@pytest.mark.parametrize("arguments", [V1, V15], ids=["v1", "v15"])
def test_the_way_in_is_linear(arguments: dict[str, Any]) -> None:
    """Conversion only moves values, so it is linear and keeps bf16."""
    released, denoiser = make(arguments)
    state = from_released(released, denoiser)
    doubled = from_released({k: 2 * v for k, v in released.items()}, denoiser)
    halves = from_released({k: v.bfloat16() for k, v in released.items()}, denoiser)
    for name, tensor in state.items():
        assert torch.equal(doubled[name], 2 * tensor)
        assert halves[name].dtype == torch.bfloat16
        assert torch.equal(halves[name], tensor.bfloat16())


def test_meta_networks_tell_the_shapes_as_well() -> None:
    released, denoiser = make(V15)
    with torch.device("meta"):
        meta = build_from_arguments(V15)
    state = from_released(released, meta)
    meta.load_state_dict(state, assign=True)
    expected = from_released(released, denoiser)
    assert all(torch.equal(meta.state_dict()[k], v) for k, v in expected.items())


def test_what_is_given_is_not_changed() -> None:
    released, denoiser = make(V1)
    before = {k: v.clone() for k, v in released.items()}
    fresh = {k: v.clone() for k, v in denoiser.state_dict().items()}
    from_released(released, denoiser)
    assert all(torch.equal(released[k], v) for k, v in before.items())
    assert all(torch.equal(denoiser.state_dict()[k], v) for k, v in fresh.items())


@pytest.mark.parametrize("arguments", [V1, V15], ids=["v1", "v15"])
def test_every_missing_tensor_is_named(arguments: dict[str, Any]) -> None:
    released, denoiser = make(arguments)
    for name in released:
        rest = {k: v for k, v in released.items() if k != name}
        with pytest.raises(ValueError, match=r"1 tensors? missing") as caught:
            from_released(rest, denoiser)
        assert name in str(caught.value)


def test_every_unknown_tensor_is_named() -> None:
    released, denoiser = make(V1)
    released["net.patch_blocks.0.attn.qkv_x.weight"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"1 unknown \(net\.patch_blocks\.0\.attn\.qkv_x\.weight\)"
    ):
        from_released(released, denoiser)


@pytest.mark.parametrize("arguments", [V1, V15], ids=["v1", "v15"])
def test_every_misshaped_tensor_is_named(arguments: dict[str, Any]) -> None:
    released, denoiser = make(arguments)
    for name, tensor in released.items():
        wrong = torch.cat((tensor, tensor)) if tensor.ndim else torch.zeros(2)
        with pytest.raises(ValueError, match="the weights do not match this network") as caught:
            from_released({**released, name: wrong}, denoiser)
        assert name in str(caught.value), caught.value
        assert str(tuple(wrong.shape)) in str(caught.value), caught.value


def test_a_tensor_of_another_width_is_named() -> None:
    released, denoiser = make(V1)
    name = "pixel_blocks.1.compress_to_attn.weight"
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        from_released({**released, name: released[name][:, :-1]}, denoiser)


def test_v1_offered_as_v15_is_refused() -> None:
    released, _ = make(V1)
    with pytest.raises(ValueError, match=r"missing \(lq_proj\.lq_aux_rgb_head\.0\.bias, "):
        from_released(released, build_from_arguments(V15))
    released, _ = make(V15)
    with pytest.raises(ValueError, match=r"unknown \(lq_proj\.lq_aux_rgb_head\.0\.bias, "):
        from_released(released, build_from_arguments(V1))


def test_other_sizes_are_refused() -> None:
    released, _ = make(V1)
    for change in ({"patch_depth": 4}, {"lq_num_res_blocks": 1}, {"hidden_size": 32}):
        with pytest.raises(ValueError, match="the weights do not match this network"):
            from_released(released, build_from_arguments({**V1, **change}))
