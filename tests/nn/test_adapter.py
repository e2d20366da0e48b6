"""The latent adapter and the sigma gate: geometry, initial values, error messages."""

from __future__ import annotations

import dataclasses
import math

import networks
import pytest
import torch

from pid_lightning.nn import AdapterConfig, Geometry, LatentAdapter, PiD, PiDConfig, SigmaGate

CLEAN = torch.zeros(1)
V1 = AdapterConfig(width=8, num_res_blocks=2)
V15 = AdapterConfig(
    width=8,
    num_res_blocks=2,
    gate="token",
    padding="replicate",
    inject_pixels=True,
    rgb_head=True,
)


def random_adapter(
    config: AdapterConfig, channels: int, stride: int, scale: int, seed: int = 0
) -> LatentAdapter:
    """An adapter of patch size 16 and 3 injections, in fp64, with no zero weights."""
    torch.manual_seed(seed)
    adapter = LatentAdapter(config, 12, 3, 16, Geometry(channels, stride, scale)).double()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def features_of(
    adapter: LatentAdapter, latents: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return adapter.features(adapter(latents, sigma)[0])


def same_weights(adapter: LatentAdapter, other: LatentAdapter) -> LatentAdapter:
    other.load_state_dict(adapter.state_dict())
    return other


# --------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("channels", "stride", "scale", "grid", "patches"),
    [
        (4, 8, 1, (6, 4), (3, 2)),  # folded 2 x 2
        (4, 4, 1, (8, 4), (2, 1)),  # folded 4 x 4
        (4, 8, 2, (3, 5), (3, 5)),
        (4, 8, 4, (3, 5), (6, 10)),
        (4, 8, 8, (3, 1), (12, 4)),
        (4, 16, 4, (1, 2), (4, 8)),
        (4, 16, 3, (1, 2), (3, 6)),
    ],
)
def test_features_lie_on_the_patch_grid(
    channels: int, stride: int, scale: int, grid: tuple[int, int], patches: tuple[int, int]
) -> None:
    adapter = random_adapter(V1, channels, stride, scale)
    tokens, rgb, _ = adapter(torch.randn(2, channels, *grid, dtype=torch.float64), torch.zeros(2))
    assert rgb is None
    assert tokens.shape == (2, *patches, V1.width)
    assert [tuple(f.shape) for f in adapter.features(tokens)] == [(2, math.prod(patches), 12)] * 3


def test_upsampling_repeats_cells() -> None:
    latents = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    twice = random_adapter(V1, 4, 8, 4)
    once = same_weights(twice, random_adapter(V1, 4, 8, 2))
    repeated = latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    pair = features_of(twice, latents, CLEAN), features_of(once, repeated, CLEAN)
    for a, b in zip(*pair, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_folding_orders_channel_row_column() -> None:
    latents = torch.randn(1, 4, 6, 4, dtype=torch.float64)
    folded = random_adapter(V1, 4, 8, 1)
    equal = same_weights(folded, random_adapter(V1, 16, 8, 2))
    cells = latents.view(1, 4, 3, 2, 2, 2).permute(0, 1, 3, 5, 2, 4)  # (1, c, p, q, h, w)
    cells = cells.reshape(1, 16, 3, 2)
    pair = features_of(folded, latents, CLEAN), features_of(equal, cells, CLEAN)
    for a, b in zip(*pair, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_unpacking_is_the_inverse_of_flux2s_packing() -> None:
    latents = torch.randn(1, 4, 4, 6, dtype=torch.float64)
    packed = torch.nn.functional.pixel_unshuffle(latents, 2)  # channels c*4 + row*2 + col
    plain = random_adapter(V1, 4, 8, 4)
    unpacking = dataclasses.replace(V1, unpack=2)
    unpacking = same_weights(plain, random_adapter(unpacking, 16, 16, 4))
    pair = features_of(unpacking, packed, CLEAN), features_of(plain, latents, CLEAN)
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_replicate_padding_sees_no_edge() -> None:
    """A constant latent stays constant with replicate padding; zeros show at its border."""
    latents = torch.full((1, 4, 5, 5), 0.7, dtype=torch.float64)
    spread = {}
    for padding in ("zeros", "replicate"):
        config = dataclasses.replace(V1, padding=padding)
        feature = features_of(random_adapter(config, 4, 8, 2), latents, CLEAN)[0]
        spread[padding] = float((feature - feature[:, 12:13]).abs().max())  # the middle of 25
    assert spread["replicate"] < 1e-10
    assert spread["zeros"] > 1e-3


def test_flat_latents_lose_no_digits_in_fp32() -> None:
    """Their groups' means outweigh their spread, which a norm by E[x^2] - E[x]^2 cancels."""
    adapter = random_adapter(V15, 4, 8, 4)
    with torch.no_grad():
        for block in adapter.res_blocks:
            for layer in (block.layers[2], block.layers[5]):
                layer.bias.add_(30)
        latents = torch.randn(1, 4, 1, 1, dtype=torch.float64).expand(1, 4, 8, 8)
        latents = latents + 1e-3 * torch.randn(1, 4, 8, 8, dtype=torch.float64)
        exact = torch.stack(features_of(adapter, latents, CLEAN))
        rounded = torch.stack(features_of(adapter.float(), latents.float(), CLEAN))
    assert (rounded - exact).norm() / exact.norm() < 2e-5


def test_rgb_head_reads_the_named_block() -> None:
    latents = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    end = random_adapter(V15, 4, 8, 4)
    expected = end(latents, CLEAN, with_rgb=True)[1]
    assert expected.shape == (2, 3, 16, 24)  # the encoder's input: latents x stride
    for block, same in ((2, True), (1, False)):
        config = dataclasses.replace(V15, rgb_head_block=block)
        rgb = same_weights(end, random_adapter(config, 4, 8, 4))(latents, CLEAN, with_rgb=True)[1]
        assert torch.equal(rgb, expected) == same
    assert end(latents, CLEAN)[1] is None


# ------------------------------------------------------------------ the sigma gate


@pytest.mark.parametrize("gate", ["channel", "token"])
def test_gate_is_its_formula_on_the_concatenation(gate: str) -> None:
    module = SigmaGate(6, gate).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    tokens, feature = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.7, 1.0], dtype=torch.float64)
    weight = torch.cat((module.tokens.weight, module.feature.weight), dim=1)
    inside = torch.cat((tokens, feature), dim=-1) @ weight.T + module.feature.bias
    inside = inside - module.log_alpha.exp() * sigma.view(3, 1, 1)
    expected = tokens + inside.sigmoid() * feature
    assert inside.shape[-1] == (6 if gate == "channel" else 1)
    assert torch.allclose(module(tokens, feature, module.shared_logit(feature, sigma)), expected)


@pytest.mark.parametrize("gate", ["channel", "token"])
def test_gate_value_at_the_start(gate: str) -> None:
    torch.manual_seed(0)
    module = SigmaGate(64, gate)
    module.reset_parameters()
    tokens, feature = torch.randn(2, 3, 200, 64)
    sigma = torch.tensor([0.0, 0.4, 1.0])
    value = module.value(tokens, module.shared_logit(feature, sigma)).mean(dim=(1, 2))
    assert torch.allclose(value, torch.tensor([0.88, 0.5, 0.05]), atol=0.01)
    assert float(module.tokens.weight.detach().std()) == pytest.approx(0.01, rel=0.2)


def test_a_noisier_latent_never_opens_the_gate() -> None:
    torch.manual_seed(0)
    module = SigmaGate(8, "channel")
    tokens, feature = torch.randn(2, 1, 4, 8).expand(2, 11, 4, 8)
    value = module.value(tokens, module.shared_logit(feature, torch.linspace(0, 1, 11)))
    assert (value.diff(dim=0) < 0).all()


def test_without_a_gate_the_whole_feature_comes_in_at_every_noise_level() -> None:
    adapter = dataclasses.replace(V15, gate="none", rgb_head=False)
    config = dataclasses.replace(networks.config(), adapter=adapter)
    torch.manual_seed(0)
    pid = PiD(config, Geometry(4, 8, 4))
    gated = PiD(dataclasses.replace(config, adapter=V15), Geometry(4, 8, 4))
    for network in (pid, gated):
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    for gate in gated.gates:  # fully open
        torch.nn.init.zeros_(gate.tokens.weight)
        torch.nn.init.zeros_(gate.feature.weight)
        torch.nn.init.constant_(gate.feature.bias, 60.0)
    pid.load_state_dict(gated.state_dict(), strict=False)
    x_t, latents = torch.randn(2, 3, 64, 64), torch.randn(2, 4, 2, 2)
    t, sigma = torch.full((2,), 0.5), torch.tensor([0.0, 0.9])
    ours, theirs = (n(x_t, t, n.condition(latents, sigma)) for n in (pid, gated))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not any("gates" in name for name in pid.state_dict())


def test_alpha_is_exact_under_autocast_and_in_bf16() -> None:
    """log_alpha is a bare parameter: only the result is rounded, not alpha or sigma before it."""
    torch.manual_seed(0)
    module = SigmaGate(8, "token")
    torch.nn.init.zeros_(module.feature.weight)
    torch.nn.init.zeros_(module.feature.bias)
    feature, sigma = torch.zeros(3, 2, 8), torch.tensor([0.137, 0.4242, 0.871])
    exact = -(module.log_alpha.exp() * sigma).view(3, 1, 1).expand(3, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.shared_logit(feature, sigma).bfloat16(), exact.bfloat16())
    module.to(torch.bfloat16)
    exact = -(module.log_alpha.float().exp() * sigma).view(3, 1, 1).expand(3, 2, 1)
    shared = module.shared_logit(feature.bfloat16(), sigma)
    assert torch.equal(shared.bfloat16(), exact.bfloat16())


# ------------------------------------------------------- beyond the published adapters


@torch.no_grad()
def test_only_learned_upsampling_tells_the_patches_of_a_cell_apart() -> None:
    """Where latents are constant, a repeated cell looks the same to all its patches."""
    latents = torch.full((1, 4, 7, 7), 0.7, dtype=torch.float64)
    for upsampling, differ in (("nearest", False), ("shuffle", True)):
        config = dataclasses.replace(V1, padding="replicate", upsampling=upsampling)
        features = features_of(random_adapter(config, 4, 8, 4), latents, CLEAN)
        cell = features[0].view(14, 14, 12)[6:8, 6:8]  # the four patches of the middle cell
        assert bool((cell - cell[:1, :1]).abs().max() > 1e-3) == differ


@torch.no_grad()
def test_learned_upsampling_moves_with_the_latents() -> None:
    """Shifting the latents by one cell shifts the features by one cell."""
    config = dataclasses.replace(V1, num_res_blocks=0, upsampling="shuffle")
    adapter = random_adapter(config, 4, 8, 4)
    latents = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    here, there = (
        features_of(adapter, z, CLEAN)[0].view(18, 18, 12)
        for z in (latents, latents.roll((1, 1), dims=(2, 3)))
    )
    assert torch.allclose(here[6:10, 6:10], there[8:12, 8:12], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("upsampling", ["nearest", "shuffle"])
def test_only_a_sigma_plane_tells_the_adapter_the_noise_level(upsampling: str) -> None:
    latents, sigma = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.tensor([0.0, 0.6])
    for sigma_plane in (False, True):
        config = dataclasses.replace(V1, upsampling=upsampling, sigma_plane=sigma_plane)
        adapter = random_adapter(config, 4, 8, 4)
        noisy, clean = (features_of(adapter, latents, s)[0] for s in (sigma, torch.zeros(2)))
        assert torch.equal(noisy[0], clean[0])
        assert torch.equal(noisy[1], clean[1]) != sigma_plane


def test_a_head_norm_keeps_features_in_bounds_whatever_the_convolutions_grow_to() -> None:
    config = dataclasses.replace(V1, num_res_blocks=0, head_norm=True)
    latents = torch.randn(1, 4, 2, 2, dtype=torch.float64)

    def grown(config: AdapterConfig) -> tuple[torch.Tensor, torch.Tensor]:
        adapter = random_adapter(config, 4, 8, 4)
        features = features_of(adapter, latents, CLEAN)[0]
        for parameter in adapter.stem[-1].parameters():
            parameter.data.mul_(100)
        return features, features_of(adapter, latents, CLEAN)[0]

    assert torch.allclose(*grown(config), rtol=1e-2)
    before, after = grown(dataclasses.replace(config, head_norm=False))
    assert after.abs().mean() > 50 * before.abs().mean()


def test_a_fresh_adapter_injects_nothing() -> None:
    network = PiD(
        PiDConfig(
            width=16,
            num_heads=1,
            num_blocks=3,
            pixel_width=4,
            pixel_attention_width=16,
            pixel_num_heads=1,
            text_length=0,
            adapter=V15,
        ),
        Geometry(4, 8, 4),
    )
    adapted = network.adapt(torch.randn(1, 4, 2, 2), torch.zeros(1), with_rgb=True)
    features = network.adapter.features(adapted.tokens)
    assert len(features) == len(network.gates) == 3  # before blocks 0 and 2, and the pixel blocks
    assert not any(feature.any() for feature in features)
    assert adapted.rgb.any()
