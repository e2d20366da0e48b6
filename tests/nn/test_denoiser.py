"""The network against the plain transcription of the method, and its invariants."""

from __future__ import annotations

import dataclasses
import json
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import VECTORS
from plain import (
    PlainPiD,
    plain_features,
    plain_rgb,
    plain_tokens,
    plain_velocity,
    random_published,
)
from published import V15, build_from_arguments
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pid_lightning.files.published_layout import from_published
from pid_lightning.nn import Geometry, PiD, PiDConfig
from pid_lightning.nn.positions import MAX_CACHED_SIZES

SMALL = {
    "num_groups": 2,
    "hidden_size": 16,
    "pixel_hidden_size": 4,
    "pixel_attn_hidden_size": 16,
    "pixel_num_groups": 2,
    "patch_depth": 2,
    "pixel_depth": 2,
    "patch_size": 8,
    "txt_embed_dim": 6,
    "txt_max_length": 5,
    "lq_hidden_dim": 8,
    "lq_num_res_blocks": 1,
    "lq_interval": 2,
    "rope_mode": "ntk_aware",
    "rope_ref_h": 64,
    "rope_ref_w": 48,
    "lq_gate_type": "sigma_aware_per_token_per_dim",
    "lq_latent_channels": 4,
    "sr_scale": 2,
    "latent_spatial_down_factor": 4,
}
FOLDED = {"sr_scale": 1, "latent_spatial_down_factor": 4}
PACKED = {
    "lq_latent_channels": 12,
    "lq_latent_unpatchify_factor": 2,
    "latent_spatial_down_factor": 8,
    "sr_scale": 4,
}

# name: (changes to SMALL, latent grid, batch size, text tokens)
CASES = {
    "v1": ({}, (3, 5), 2, 5),
    "v1_depth_1": ({"patch_depth": 1, "pixel_depth": 1, "lq_interval": 1}, (1, 2), 1, 3),
    "v1_depth_3_interval_1": ({"patch_depth": 3, "lq_interval": 1}, (3, 5), 3, 4),
    "v1_depth_3_interval_2": ({"patch_depth": 3, "rope_mode": "original"}, (5, 3), 2, 5),
    "v1_depth_4_interval_3": ({"patch_depth": 4, "lq_interval": 3}, (2, 2), 2, 5),
    "v1_long_text": ({}, (2, 3), 2, 9),
    "v1_no_text_tokens": ({}, (3, 2), 2, 0),
    "v1_head_12": (
        {"hidden_size": 24, "pixel_attn_hidden_size": 24, "patch_depth": 3},
        (3, 5),
        3,
        5,
    ),
    "v1_widths_differ": (
        {"pixel_attn_hidden_size": 40, "pixel_num_groups": 5, "pixel_hidden_size": 8},
        (3, 5),
        2,
        5,
    ),
    "v1_upsampled_4x": ({"sr_scale": 4}, (2, 1), 2, 5),
    "v1_upsampled_8x": ({"sr_scale": 8}, (1, 2), 2, 5),
    "v1_folded": (FOLDED, (6, 10), 2, 5),
    "v1_patch_16": (
        {"patch_size": 16, "sr_scale": 4, "latent_spatial_down_factor": 8},
        (2, 1),
        1,
        5,
    ),
    "v15": ({**V15, "patch_depth": 3}, (3, 5), 3, 5),
    "v15_packed": ({**V15, **PACKED}, (1, 2), 2, 5),
    "v15_packed_folded": ({**V15, **PACKED, "sr_scale": 1}, (3, 5), 2, 5),
    "v15_rgb_tap": (
        {**V15, "lq_num_res_blocks": 3, "lq_aux_rgb_head_latent_block_idx": 2},
        (3, 2),
        2,
        5,
    ),
}


@dataclasses.dataclass
class Case:
    """One configuration with random weights and inputs, in fp32."""

    arguments: dict[str, Any]
    published: dict[str, Tensor]
    inputs: dict[str, Tensor]

    def network(self, dtype: torch.dtype) -> PiD:
        network = build_from_arguments(self.arguments)
        network.load_state_dict(from_published(self.published, network))
        return network.to(dtype)

    def ours(self, dtype: torch.dtype, network: PiD | None = None) -> Tensor:
        network = self.network(dtype) if network is None else network
        x_t, t, text, latents, latent_sigma = self.typed(dtype)
        return network(x_t, t, network.condition(latents, latent_sigma, text))

    def plain(self, dtype: torch.dtype) -> Tensor:
        return plain_velocity(self.weights(dtype), self.arguments, *self.typed(dtype))

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {k: v.to(dtype) for k, v in self.published.items()}

    def typed(self, dtype: torch.dtype) -> list[Tensor]:
        """x_t, t, text, latents, latent_sigma: in fp64, else in fp32 as callers pass them."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [value.to(wide) for value in self.inputs.values()]

    def rounded(self) -> Case:
        """The same case with weights that bf16 represents exactly."""
        published = {k: v.bfloat16().float() for k, v in self.published.items()}
        return dataclasses.replace(self, published=published)


def make_case(name: str) -> Case:
    changes, (h, w), batch_size, text_length = CASES[name]
    arguments = {**SMALL, **changes}
    g = torch.Generator().manual_seed(sum(name.encode()))
    published = random_published(arguments, g)
    cell = arguments["sr_scale"] * arguments["latent_spatial_down_factor"]
    inputs = {
        "x_t": torch.randn(batch_size, 3, h * cell, w * cell, generator=g),
        "t": torch.rand(batch_size, generator=g),
        "text": torch.randn(batch_size, text_length, arguments["txt_embed_dim"], generator=g),
        "latents": torch.randn(batch_size, arguments["lq_latent_channels"], h, w, generator=g),
        "latent_sigma": torch.rand(batch_size, generator=g),
    }
    return Case(arguments, published, inputs)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def relative_error(computed: Tensor, expected: Tensor) -> float:
    computed, expected = computed.detach().double(), expected.detach().double()
    assert computed.shape == expected.shape
    return float((computed - expected).norm() / expected.norm())


# ------------------------------------------------- equality with the plain transcription


@pytest.mark.parametrize("name", ["denoiser_v1_vae_4x", "denoiser_v15_flux2_4x"])
def test_plain_transcription_is_the_published_network(name: str) -> None:
    tensors = load_file(VECTORS / f"{name}.safetensors")
    with safe_open(VECTORS / f"{name}.safetensors", "pt") as opened:
        arguments = json.loads(opened.metadata()["config"])
    published = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    inputs = [tensors[f"in.{k}"] for k in ("x", "t", "text", "latent", "sigma")]
    velocity = plain_velocity(published, arguments, *inputs)
    assert relative_error(velocity, tensors["out.velocity"]) < 1e-5
    if "out.aux_rgb" in tensors:
        rgb = plain_rgb(published, arguments, tensors["in.latent"])
        assert relative_error(rgb, tensors["out.aux_rgb"]) < 1e-5


@torch.no_grad()
def test_velocity_equals_plain_in_fp64(case: Case) -> None:
    velocity = case.ours(torch.float64)
    assert relative_error(velocity, case.plain(torch.float64)) < 1e-9


# Rounding differs by widths and versions; the structure of every case is compared in fp64.
ROUNDED_CASES = ["v1", "v1_widths_differ", "v1_head_12", "v15", "v15_packed"]


@torch.no_grad()
@pytest.mark.parametrize("name", ROUNDED_CASES)
def test_velocity_equals_plain_in_fp32(name: str) -> None:
    case = make_case(name)
    velocity = case.ours(torch.float32)
    assert velocity.dtype == torch.float32
    assert relative_error(velocity, case.plain(torch.float32)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ROUNDED_CASES)
def test_bf16_weights_lose_no_more_than_plain_bf16(name: str) -> None:
    case = make_case(name).rounded()
    exact = case.plain(torch.float64)
    velocity = case.ours(torch.bfloat16)
    assert velocity.dtype == torch.float32
    plain_loss = relative_error(case.plain(torch.bfloat16), exact)
    assert relative_error(velocity, exact) < 2 * plain_loss
    assert plain_loss < 0.1


def test_gradients_equal_plain_in_fp64(case: Case) -> None:
    g = torch.Generator().manual_seed(1)
    network, weights = case.network(torch.float64), case.weights(torch.float64)
    weights = {k: v.requires_grad_() for k, v in weights.items()}
    inputs = case.typed(torch.float64)
    along = torch.randn(inputs[0].shape, generator=g, dtype=torch.float64)

    x_t, t, text, latents, latent_sigma = (value.clone().requires_grad_() for value in inputs)
    condition = network.condition(latents, latent_sigma, text)
    (network(x_t, t, condition) * along).sum().backward()
    ours = [value.grad for value in (x_t, text, latents, latent_sigma)]

    x_t, t, text, latents, latent_sigma = (value.clone().requires_grad_() for value in inputs)
    velocity = plain_velocity(weights, case.arguments, x_t, t, text, latents, latent_sigma)
    (velocity * along).sum().backward()
    plain = [value.grad for value in (x_t, text, latents, latent_sigma)]
    for computed, expected in zip(ours, plain, strict=True):
        assert torch.allclose(computed, expected, rtol=1e-8, atol=1e-10 * float(along.norm()))

    # The conversion from published names only moves numbers, so it works for gradients too.
    published = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in weights.items()}
    expected = from_published(published, network)
    norm = torch.cat([v.flatten() for v in expected.values()]).norm()
    for name, parameter in network.named_parameters():
        computed = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (computed - expected[name]).norm() < 1e-9 * norm, name


@torch.no_grad()
def test_adapter_features_and_rgb_equal_plain(case: Case) -> None:
    network, weights = case.network(torch.float64), case.weights(torch.float64)
    _, _, text, latents, latent_sigma = case.typed(torch.float64)
    with_rgb = case.arguments.get("lq_aux_rgb_head", False)
    condition = network.condition(latents, latent_sigma, text, with_rgb=with_rgb)
    expected = plain_features(weights, case.arguments, latents)
    for feature, plain in zip(condition.features, expected, strict=True):
        assert relative_error(feature, plain) < 1e-12
    if with_rgb:
        rgb = plain_rgb(weights, case.arguments, latents)
        assert relative_error(condition.rgb, rgb) < 1e-12
        sides = [side // case.arguments["sr_scale"] for side in case.inputs["x_t"].shape[-2:]]
        assert list(condition.rgb.shape[-2:]) == sides
    else:
        assert condition.rgb is None


@torch.no_grad()
def test_features_equal_plain_tokens(case: Case) -> None:
    network, weights = case.network(torch.float64), case.weights(torch.float64)
    x_t, t, text, latents, latent_sigma = case.typed(torch.float64)
    condition = network.condition(latents, latent_sigma, text)
    depth = case.arguments["patch_depth"]
    tapped = network.features(x_t, t, condition, range(depth))
    features = plain_features(weights, case.arguments, latents)
    tokens = plain_tokens(weights, case.arguments, x_t, t, text, features, latent_sigma)
    for tap, plain in zip(tapped, tokens, strict=True):
        rows = x_t.shape[-2] // case.arguments["patch_size"]
        assert tap.shape[2] == rows
        assert relative_error(tap.flatten(2).mT, plain) < 1e-9


def test_plain_module_learns_and_keeps_fp32() -> None:
    case = make_case("v15")
    module = PlainPiD({k: v.bfloat16() for k, v in case.published.items()}, case.arguments)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    x_t, t, text, latents, latent_sigma = case.typed(torch.float32)
    velocity = module(x_t, t, module.condition(latents, latent_sigma, text))
    assert relative_error(velocity, case.rounded().plain(torch.float32)) < 1e-6
    velocity.square().mean().backward()
    no_gradient = {k.replace("/", ".") for k, p in module.params.items() if p.grad is None}
    last = f"patch_blocks.{case.arguments['patch_depth'] - 1}."
    dead = ("attn.proj_y", "norm_y2", "mlp_y")
    for name in no_gradient:
        assert name.startswith("lq_proj.lq_aux_rgb_head") or (name.startswith(last) and
            name.removeprefix(last).startswith(dead)), name  # fmt: skip


# ------------------------------------------------------------------ invariants


@torch.no_grad()
@pytest.mark.parametrize("name", ["v1", "v15"])
def test_chunk_size_does_not_change_the_result(name: str) -> None:
    case = make_case(name)
    network = case.network(torch.float64)
    whole = case.ours(torch.float64, network)
    for chunk_size in (1, 7, 15, 16):
        network.chunk_size = chunk_size
        assert relative_error(case.ours(torch.float64, network), whole) < 1e-12


def test_training_and_inference_agree() -> None:
    case = make_case("v15")
    network = case.network(torch.float64)
    network.chunk_size = 4
    trained = case.ours(torch.float64, network)
    with torch.inference_mode():
        assert relative_error(case.ours(torch.float64, network), trained) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", ["v1_depth_3_interval_1", "v15"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    case = make_case(name)
    network = case.network(torch.float64)
    together = case.ours(torch.float64, network)
    for i, expected in enumerate(together):
        alone = {k: v[i : i + 1] for k, v in case.inputs.items()}
        velocity = dataclasses.replace(case, inputs=alone).ours(torch.float64, network)
        assert relative_error(velocity[0], expected) < 1e-11


@torch.no_grad()
def test_condition_serves_every_step_with_one_adapter_pass() -> None:
    case = make_case("v1")
    network = case.network(torch.float64)
    passes = []
    network.adapter.register_forward_hook(lambda *_: passes.append(1))
    x_t, _, text, latents, latent_sigma = case.typed(torch.float64)
    condition = network.condition(latents, latent_sigma, text)
    steps = [network(x_t, x_t.new_full((len(x_t),), t), condition) for t in (0.9, 0.4)]
    assert len(passes) == 1
    for t, velocity in zip((0.9, 0.4), steps, strict=True):
        again = network.condition(latents, latent_sigma, text)
        assert torch.equal(network(x_t, x_t.new_full((len(x_t),), t), again), velocity)


@torch.no_grad()
@pytest.mark.parametrize("name", ["v1", "v15"])
def test_dropped_latents_inject_nothing(name: str) -> None:
    case = make_case(name)
    network = case.network(torch.float64)
    x_t, t, text, latents, latent_sigma = case.typed(torch.float64)
    keep = torch.arange(len(x_t)) % 2 == 0
    dropped = network(x_t, t, network.condition(latents, latent_sigma, text, keep_latents=keep))
    kept = case.ours(torch.float64, network)
    network.adapter.heads.weight.zero_()
    network.adapter.heads.bias.zero_()
    bare = case.ours(torch.float64, network)
    assert relative_error(dropped[keep], kept[keep]) < 1e-12
    assert relative_error(dropped[~keep], bare[~keep]) < 1e-12
    assert relative_error(kept, bare) > 1e-3


@torch.no_grad()
def test_dropped_text_is_the_learned_null() -> None:
    case = make_case("v1")  # its text has the full text_length
    network = with_null(case)
    x_t, t, text, latents, latent_sigma = case.typed(torch.float64)
    keep = torch.tensor([True, False])
    mixed = network(x_t, t, network.condition(latents, latent_sigma, text, keep_text=keep))
    null = network(x_t, t, network.condition(latents, latent_sigma))
    kept = network(x_t, t, network.condition(latents, latent_sigma, text))
    assert relative_error(mixed[0], kept[0]) < 1e-12
    assert relative_error(mixed[1], null[1]) < 1e-12
    assert relative_error(kept, null) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["v1_head_12", "v15"])
def test_a_network_without_text_is_one_that_reads_no_tokens(name: str) -> None:
    case = make_case(name)
    case.inputs["text"] = case.inputs["text"][:, :0]
    with_text = case.network(torch.float64)
    config = dataclasses.replace(with_text.config, text_length=0)
    network = PiD(config, with_text.geometry)
    network = network.double()
    state = with_text.state_dict()
    network.load_state_dict({k: state[k] for k in network.state_dict()})
    x_t, t, _, latents, latent_sigma = case.typed(torch.float64)
    velocity = network(x_t, t, network.condition(latents, latent_sigma))
    assert relative_error(velocity, case.plain(torch.float64)) < 1e-9
    unguided = network(x_t, t, network.without_text(network.condition(latents, latent_sigma)))
    assert torch.equal(unguided, velocity)


@torch.no_grad()
def test_without_text_swaps_the_text_only() -> None:
    case = make_case("v15")
    network = with_null(case)
    x_t, t, text, latents, latent_sigma = case.typed(torch.float64)
    condition = network.condition(latents, latent_sigma, text[:, :4])
    passes = []
    network.adapter.register_forward_hook(lambda *_: passes.append(1))
    for null in (text[:, 1:5], text[:, :2], None):
        swapped = network(x_t, t, network.without_text(condition, null))
        assert not passes
        expected = network(x_t, t, network.condition(latents, latent_sigma, null))
        assert relative_error(swapped, expected) < 1e-12
        passes.clear()


@torch.no_grad()
def test_a_network_that_predicts_x0_returns_its_velocity() -> None:
    case = make_case("v1_depth_3_interval_1")
    network = case.network(torch.float64)
    case.inputs["t"] = torch.tensor([0.7, 0.05, 0.01])
    x0 = case.ours(torch.float64, network)  # the output of the last layer
    network.config = dataclasses.replace(network.config, prediction="x0")
    velocity = case.ours(torch.float64, network)
    x_t, t = case.typed(torch.float64)[:2]
    divisor = t.clamp(min=0.05).view(-1, 1, 1, 1)
    assert relative_error(velocity, (x_t - x0) / divisor) < 1e-12


def test_a_fresh_network_predicts_nothing() -> None:
    network = PiD(tiny_config(), Geometry(4, 4, 2))
    condition = network.condition(torch.randn(2, 4, 2, 3), torch.tensor([0.0, 0.5]))
    velocity = network(torch.randn(2, 3, 16, 24), torch.tensor([0.3, 0.9]), condition)
    assert torch.equal(velocity, torch.zeros(2, 3, 16, 24))


def test_features_are_what_the_blocks_say() -> None:
    case = make_case("v1_depth_3_interval_1")
    network = case.network(torch.float64)
    x_t, t, text, latents, latent_sigma = case.typed(torch.float64)
    condition = network.condition(latents, latent_sigma, text)
    outputs = []
    for block in network.patch_blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    network(x_t, t, condition)
    whole = list(outputs)
    outputs.clear()
    tapped = network.features(x_t, t, condition, (1, 0))
    assert len(outputs) == 2  # stops after the last tap
    rows, columns = (side // case.arguments["patch_size"] for side in x_t.shape[-2:])
    for i, tap in zip((1, 0), tapped, strict=True):
        assert tap.shape[2:] == (rows, columns)
        assert torch.equal(tap.flatten(2).mT, whole[i])


@pytest.mark.parametrize("name", ["v1", "v15"])
def test_activation_checkpointing_keeps_the_gradients(name: str) -> None:
    case = make_case(name)
    gradients = []
    for checkpointing in (False, True):
        network = case.network(torch.float64)
        network.activation_checkpointing = checkpointing
        case.ours(torch.float64, network).square().mean().backward()
        gradients.append({k: p.grad for k, p in network.named_parameters()})
    for name, gradient in gradients[0].items():
        again = gradients[1][name]
        assert (gradient is None) == (again is None), name
        if gradient is not None:
            assert torch.allclose(again, gradient, rtol=1e-12, atol=0), name


def test_every_trainable_parameter_is_taught() -> None:
    """Otherwise DistributedDataParallel would wait for its gradient forever."""
    case = make_case("v15_rgb_tap")
    network = case.network(torch.float32)
    x_t, t, text, latents, latent_sigma = case.typed(torch.float32)
    condition = network.condition(latents, latent_sigma, text, with_rgb=True)
    (network(x_t, t, condition).square().mean() + condition.rgb.square().mean()).backward()
    for name, parameter in network.named_parameters():
        has_gradient = parameter.grad is not None
        assert has_gradient == parameter.requires_grad, name


@torch.no_grad()
def test_bf16_weights_stay_finite_at_the_ends() -> None:
    for name in ("v1", "v15"):
        case = make_case(name)
        network = case.network(torch.bfloat16)
        for t in (0.0, 1.0):
            for sigma in (0.0, 1.0):
                case.inputs["t"] = torch.full_like(case.inputs["t"], t)
                case.inputs["latent_sigma"] = torch.full_like(case.inputs["t"], sigma)
                assert case.ours(torch.bfloat16, network).isfinite().all()


@pytest.mark.parametrize("name", ["v1", "v15_packed"])
def test_bf16_autocast_is_close_to_fp32(name: str) -> None:
    case = make_case(name)
    network = case.network(torch.float32)
    exact = case.ours(torch.float32, network)
    module = PlainPiD(case.published, case.arguments)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = case.ours(torch.float32, network)
        x_t, t, text, latents, latent_sigma = case.typed(torch.float32)
        plain = module(x_t, t, module.condition(latents, latent_sigma, text))
    assert velocity.dtype == torch.float32
    assert relative_error(velocity, exact) < 2 * relative_error(plain, exact) < 0.2
    velocity.square().mean().backward()
    for parameter in network.parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


def tiny_config() -> PiDConfig:
    """A small config with a learned null, as this package trains."""
    config = build_from_arguments(SMALL).config
    return dataclasses.replace(config, learned_null=True)


def with_null(case: Case) -> PiD:
    """The network of a case plus a random learned null, in fp64."""
    published = case.network(torch.float64)
    config = dataclasses.replace(published.config, learned_null=True)
    network = PiD(config, published.geometry)
    network = network.double()
    null = torch.randn(1, config.text_length, config.text_width, dtype=torch.float64)
    network.load_state_dict({**published.state_dict(), "text_embedding.null": null})
    return network


@pytest.mark.parametrize(("num_queries", "scores"), [(256, 2**19), (64, 2**19), (64, 1), (1, 1)])
def test_attention_in_chunks_is_softmax_attention(num_queries, scores, monkeypatch) -> None:
    """The bf16 CPU path loses no more than bf16's own rounding of scores and weights, for any
    chunks: all at once, rows of all heads, rows of as many heads as threads, single rows."""
    from pid_lightning.nn import attention

    monkeypatch.setattr(attention, "MAX_QUERIES", num_queries)
    monkeypatch.setattr(attention, "SCORES_PER_THREAD", scores)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 150, 12, generator=generator).bfloat16() for _ in range(3))
    q = q[:, :, 20:]
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with torch.no_grad():
        attended = attention.softmax_attention(q, k, v)
    assert (attended - exact).norm() / exact.norm() < 2**-7
    scaled = q.double() * 12**-0.5
    in_full = attention.attend_in_chunks(scaled, k.double(), v.double())
    torch.testing.assert_close(in_full, exact, rtol=1e-12, atol=1e-12)


def test_tables_are_made_once_a_size_and_may_be_trained_with() -> None:
    network = PiD(tiny_config(), Geometry(16, 8, 4))
    latents, sigma = torch.zeros(1, 16, 2, 2), torch.zeros(1)
    with torch.inference_mode():
        first = network.condition(latents, sigma)
    again = network.condition(latents, sigma)
    assert again.rows is first.rows
    assert not again.rows.is_inference()
    x_t = torch.zeros(1, 3, 64, 64)
    network(x_t, torch.ones(1), again).sum().backward()
    assert network.out.bias.grad is not None
    assert network.condition(latents.repeat(1, 1, 2, 1), sigma).rows is not first.rows
    held = weakref.ref(first.rows)
    del first, again
    assert held() is not None
    torch.nn.Sequential(network).double()
    assert held() is None


def test_few_tables_are_kept_whatever_the_number_of_threads() -> None:
    network = PiD(tiny_config(), Geometry(16, 8, 4))

    def condition(side: int) -> int:
        return network.condition(torch.zeros(1, 16, 1, side), torch.zeros(1)).columns.shape[0]

    sides = [1 + i % 12 for i in range(120)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            widths = list(pool.map(condition, sides))
    finally:
        sys.setswitchinterval(before)
    assert widths == [32 * side for side in sides]
    assert len(network._positions.kept) <= MAX_CACHED_SIZES
