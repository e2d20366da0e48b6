"""Frozen encoders against the reference libraries, with small random networks."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import randomise
from tiny_towers import DEPTH, GRID, HEADS, PATCH, WIDTH

from pid_lightning.checks import Mistake
from pid_lightning.encoders.base import Encoder, NoNativeDecoder
from pid_lightning.encoders.dinov2 import DINOv2Encoder
from pid_lightning.encoders.families import ENCODERS, build_encoder
from pid_lightning.encoders.siglip import SigLIPEncoder
from pid_lightning.encoders.vae import VAEEncoder, build_vae_encoder
from pid_lightning.encoders.vae_sources import KNOWN_VAES
from pid_lightning.files.published import FLUX

SIZES = [(80, 80), (112, 112), (48, 96), (160, 64)]  # native, larger, non-square both ways


def pictures(height, width, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


def random_encoder(build):
    with pytest.warns(UserWarning, match="random weights"):
        encoder = build(pretrained=False)
    randomise(encoder.network, std=0.2)  # LayerScale starts at 1e-5
    return encoder


def block_weights(state, index, attention, norms):
    """One block's weights under transformers' names, whose attention has separate q, k and v."""
    prefix = f"blocks.{index}."
    weights = {}
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", state[f"{prefix}attn.qkv.{kind}"].chunk(3), strict=True):
            weights[attention[name] + f".{kind}"] = part
        weights[attention["out"] + f".{kind}"] = state[f"{prefix}attn.proj.{kind}"]
        for name in ("fc1", "fc2"):
            weights[f"mlp.{name}.{kind}"] = state[f"{prefix}mlp.{name}.{kind}"]
        for number, name in enumerate(norms, start=1):
            weights[f"{name}.{kind}"] = state[f"{prefix}norm{number}.{kind}"]
    return weights


def fill(model, weights, unused=()):
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= set(unused)
    return model.eval()


def transformers_dinov2(network):
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    state = network.state_dict()
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    sizes |= {"image_size": PATCH * GRID, "patch_size": PATCH}
    weights = {
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "embeddings.cls_token": state["cls_token"],
        "layernorm.weight": torch.ones(WIDTH),  # RAE removes the final norm's affine
        "layernorm.bias": torch.zeros(WIDTH),
    }
    if "reg_token" in state:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=4))
        weights["embeddings.register_tokens"] = state["reg_token"]
        # timm folds the class token's position into the token
        positions = torch.cat([torch.zeros(1, 1, WIDTH), state["pos_embed"]], dim=1)
    else:
        model = Dinov2Model(Dinov2Config(**sizes))
        positions = state["pos_embed"]
    weights["embeddings.position_embeddings"] = positions
    if "encoder.layer.0.attention.q_proj.weight" in model.state_dict():  # transformers 5
        attention = {k: f"attention.{k}_proj" for k in ("q", "k", "v")}
        attention["out"] = "attention.o_proj"
    else:
        long = {"q": "query", "k": "key", "v": "value"}
        attention = {k: f"attention.attention.{v}" for k, v in long.items()}
        attention["out"] = "attention.output.dense"
    for index in range(DEPTH):
        block = block_weights(state, index, attention, ("norm1", "norm2"))
        for number in (1, 2):
            block[f"layer_scale{number}.lambda1"] = state[f"blocks.{index}.ls{number}.gamma"]
        weights |= {f"encoder.layer.{index}.{k}": v for k, v in block.items()}
    return fill(model, weights, unused=("embeddings.mask_token",))


def transformers_siglip(state):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            image_size=PATCH * GRID,
            patch_size=PATCH,
            vision_use_head=False,
        )
    )
    root = next(n for n in model.state_dict() if n.endswith("patch_embedding.weight"))
    root = root.removesuffix("embeddings.patch_embedding.weight")  # differs between versions
    weights = {
        f"{root}embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        f"{root}embeddings.patch_embedding.bias": state["patch_embed.proj.bias"],
        f"{root}embeddings.position_embedding.weight": state["pos_embed"][0],
        f"{root}post_layernorm.weight": state["norm.weight"],
        f"{root}post_layernorm.bias": state["norm.bias"],
    }
    attention = {k: f"self_attn.{k}_proj" for k in ("q", "k", "v", "out")}
    for index in range(DEPTH):
        block = block_weights(state, index, attention, ("layer_norm1", "layer_norm2"))
        weights |= {f"{root}encoder.layers.{index}.{k}": v for k, v in block.items()}
    unused = [n for n in model.state_dict() if n.endswith("position_ids")]
    return fill(model, weights, unused)


def siglip_reference(model, images):
    """Scale-RAE: antialiased bicubic 14/16, 0.5/0.5, hidden state before the post-norm, norm."""
    height, width = images.shape[-2:]
    size = (height * 14 // 16, width * 14 // 16)
    pixels = F.interpolate((images + 1) / 2, size=size, mode="bicubic", antialias=True)
    with torch.no_grad():
        output = model(
            (pixels - 0.5) / 0.5, output_hidden_states=True, interpolate_pos_encoding=True
        )
    hidden = F.layer_norm(output.hidden_states[-1], (WIDTH,), eps=1e-6)
    return hidden.transpose(1, 2).reshape(len(images), WIDTH, height // 16, width // 16)


def dinov2_reference(model, images, num_prefix):
    """RAE: bicubic 14/16, ImageNet statistics, last hidden state without class and registers."""
    height, width = images.shape[-2:]
    size = (height * 14 // 16, width * 14 // 16)
    pixels = F.interpolate((images + 1) / 2, size=size, mode="bicubic")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        hidden = model((pixels - mean) / std).last_hidden_state[:, num_prefix:]
    return hidden.transpose(1, 2).reshape(len(images), WIDTH, height // 16, width // 16)


def dinov2(**kwargs):
    return DINOv2Encoder("vit_mini_patch14_reg4_dinov2", **kwargs)


def siglip(**kwargs):
    return SigLIPEncoder("vit_mini_patch14_siglip", **kwargs)


# ------------------------------------------------------------------ DINOv2


@pytest.mark.parametrize(
    ("name", "num_prefix"), [("vit_mini_patch14_reg4_dinov2", 5), ("vit_mini_patch14_dinov2", 1)]
)
def test_dinov2_equals_transformers(name, num_prefix):
    encoder = random_encoder(lambda **kwargs: DINOv2Encoder(name, **kwargs))
    reference = transformers_dinov2(encoder.network)
    for height, width in SIZES:
        images = pictures(height, width)
        latents = encoder.encode(images)
        assert latents.shape == (2, encoder.latent_channels, height // 16, width // 16)
        expected = dinov2_reference(reference, images, num_prefix)
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def test_dinov2_equals_timms_own_forward():
    encoder = random_encoder(dinov2)
    images = pictures(80, 80)
    with torch.no_grad():
        encoder.network.norm = torch.nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        tokens = encoder.network.forward_features(encoder.preprocess(images))[:, 5:]
    latents = encoder.encode(images)
    torch.testing.assert_close(latents.flatten(2).transpose(1, 2), tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_dinov2_statistics_per_element(tmp_path, suffix):
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(WIDTH, 5, 7, generator=generator)
    var = torch.rand(WIDTH, 5, 7, generator=generator)
    path = tmp_path / f"statistics{suffix}"
    tensors = {"mean": mean, "var": var}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    plain = random_encoder(dinov2)
    encoder = random_encoder(lambda **kwargs: dinov2(statistics=str(path), **kwargs))
    images = pictures(80, 112)
    expected = (plain.encode(images) - mean) / torch.sqrt(var + 1e-5)
    torch.testing.assert_close(encoder.encode(images), expected)
    assert (plain.latent_space, encoder.latent_space) == ("dinov2", "dinov2-normalised")
    with pytest.raises(Mistake) as told:
        encoder.encode(pictures(80, 80))
    assert told.value.option == "statistics"
    with torch.device("meta"):
        assert dinov2(statistics=str(path)).latent_channels == WIDTH


def test_dinov2_statistics_per_channel_survive_bfloat16(tmp_path):
    path = tmp_path / "statistics.safetensors"
    save_file({"mean": torch.full((WIDTH,), 0.123456), "var": torch.ones(WIDTH)}, path)
    encoder = random_encoder(lambda **kwargs: dinov2(statistics=str(path), **kwargs))
    encoder.to(torch.bfloat16)
    assert encoder.statistics[0][0].item() == pytest.approx(0.123456, abs=1e-7)


def test_dinov2_loads_timms_and_the_original_releases_files(tmp_path):
    donor = random_encoder(dinov2)
    images = pictures(112, 80)
    state = {k: v.clone() for k, v in donor.network.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    original = {k: v for k, v in state.items() if k not in ("reg_token", "pos_embed", "cls_token")}
    position = torch.randn(1, 1, WIDTH)
    original["register_tokens"] = state["reg_token"]
    original["mask_token"] = torch.zeros(1, WIDTH)
    original["cls_token"] = state["cls_token"] - position
    original["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    torch.save(original, tmp_path / "release.pth")
    for checkpoint in (tmp_path, tmp_path / "release.pth"):
        encoder = dinov2(checkpoint=str(checkpoint))
        with pytest.raises(RuntimeError, match="load"):
            encoder.encode(images)
        encoder.load()
        encoder.load()
        assert not any(p.requires_grad or p.is_meta for p in encoder.parameters())
        torch.testing.assert_close(encoder.encode(images), donor.encode(images))


@pytest.mark.parametrize("break_it", ["missing", "geometry", "truncated", "other grid"])
def test_wrong_checkpoints_are_refused_whole(tmp_path, break_it):
    state = {k: v.clone() for k, v in random_encoder(dinov2).network.state_dict().items()}
    if break_it == "missing":
        del state["blocks.1.mlp.fc1.bias"]
    if break_it == "geometry":
        state["patch_embed.proj.weight"] = torch.zeros(WIDTH, 3, 16, 16)
    if break_it == "other grid":
        state["pos_embed"] = torch.zeros(1, 49, WIDTH)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    if break_it == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    encoder = dinov2(checkpoint=str(path))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        encoder.load()
    assert not encoder.loaded


# ------------------------------------------------------------------ SigLIP


def test_siglip_equals_transformers():
    encoder = random_encoder(siglip)
    reference = transformers_siglip(encoder.network.state_dict())
    for height, width in SIZES:
        images = pictures(height, width)
        latents = encoder.encode(images)
        assert latents.shape == (2, encoder.latent_channels, height // 16, width // 16)
        expected = siglip_reference(reference, images)
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


@pytest.fixture
def open_clip_siglip(tmp_path, monkeypatch):
    """A registered open_clip model with the tiny image tower."""
    vision = {"image_size": PATCH * GRID, "timm_model_name": "vit_mini_patch14_siglip"}
    vision |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    text = {"context_length": 4, "vocab_size": 16, "width": WIDTH, "heads": 2, "layers": 1}
    config = {"embed_dim": WIDTH, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    config["init_logit_bias"] = -10
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "ViT-Mini-14-SigLIP2.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [folder])
    open_clip.add_model_config(folder)
    yield "ViT-Mini-14-SigLIP2"
    monkeypatch.undo()
    open_clip.factory._rescan_model_configs()


def test_siglip_reads_open_clips_checkpoint(tmp_path, open_clip_siglip):
    whole = randomise(open_clip.create_model(open_clip_siglip), std=0.2).eval()
    path = tmp_path / "open_clip_model.safetensors"
    save_file({k: v.clone() for k, v in whole.state_dict().items()}, path)
    encoder = SigLIPEncoder(open_clip_siglip, checkpoint=str(tmp_path))
    encoder.load()
    assert encoder.latent_space == "siglip2"
    assert not any("text" in name or "attn_pool" in name for name, _ in encoder.named_parameters())
    images = pictures(112, 48)
    expected = siglip_reference(transformers_siglip(whole.visual.trunk.state_dict()), images)
    torch.testing.assert_close(encoder.encode(images), expected, rtol=0, atol=1e-5)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    again = SigLIPEncoder(open_clip_siglip, checkpoint=str(tmp_path / "whole.pt"))
    again.load()
    assert torch.equal(again.encode(images), encoder.encode(images))


@pytest.mark.parametrize(
    ("model", "space"),
    [
        ("ViT-B-16-SigLIP2", "siglip2"),
        ("ViT-B-16-SigLIP-384", "siglip"),
        ("vit_base_patch16_siglip_224.v2_webli", "siglip2"),
        ("vit_base_patch16_siglip_384.webli", "siglip"),
    ],
)
def test_the_name_tells_the_version_of_siglip(model, space):
    encoder = SigLIPEncoder(model)
    assert encoder.latent_space == space
    assert not encoder.loaded


@pytest.mark.parametrize(
    ("build", "channels", "positions", "space"),
    [
        pytest.param(SigLIPEncoder, 1152, 16, "siglip2", marks=pytest.mark.slow),
        (DINOv2Encoder, 768, 37, "dinov2"),
    ],
)
def test_the_published_towers_on_the_meta_device(build, channels, positions, space):
    encoder = build()
    assert encoder.latent_space == space
    assert (encoder.latent_channels, encoder.latent_stride) == (channels, 16)
    assert encoder.network.pos_embed.shape == (1, positions**2, channels)
    with torch.device("meta"):
        assert encoder.encode(torch.zeros(1, 3, 256, 128)).shape == (1, channels, 16, 8)


# ------------------------------------------------------------------ autoencoders


def assert_decoded(images, expected):
    """Equal but for the rounding of normalising the latents and back, which a decoder amplifies."""
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def tiny_kl(scaling=1.5305, shift=0.0609, channels=16):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=scaling,
        shift_factor=shift,
    ).eval()


def tiny_flux2():
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=[8] * 4, latent_channels=8, layers_per_block=1, norm_num_groups=4
    ).eval()
    generator = torch.Generator().manual_seed(5)
    vae.bn.running_mean.copy_(torch.randn(32, generator=generator) * 0.2)
    vae.bn.running_var.copy_(torch.rand(32, generator=generator) * 4 + 0.1)
    return vae


def tiny_qwen():
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.5, 2.5, 3.5, 0.5],
    ).eval()


def from_folder(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    encoder = VAEEncoder(str(tmp_path))
    encoder.load()
    assert not any(p.requires_grad or p.is_meta for p in encoder.parameters())
    assert not encoder.network.training
    return encoder


@pytest.mark.parametrize(
    ("name", "scaling", "shift", "channels"),
    [("sd3", 1.5305, 0.0609, 16), ("flux", 0.3611, 0.1159, 16), ("sdxl", 0.13025, None, 4)],
)
@torch.no_grad()
def test_autoencoder_kl_from_a_folder(tmp_path, name, scaling, shift, channels):
    vae = tiny_kl(scaling, shift, channels)
    encoder = from_folder(vae, tmp_path)
    assert (encoder.latent_space, encoder.latent_channels) == (name, channels)
    assert (encoder.latent_stride, encoder.has_decoder) == (8, True)
    images = pictures(32, 48)
    raw = vae.encode(images).latent_dist.mode()
    latents = encoder.encode(images)
    assert latents.shape == (2, channels, 4, 6)
    torch.testing.assert_close(latents, (raw - (shift or 0.0)) * scaling)
    assert_decoded(encoder.decode(latents), vae.decode(raw).sample)


@torch.no_grad()
def test_flux2_equals_the_diffusers_pipeline(tmp_path):
    from diffusers import Flux2Pipeline

    vae = tiny_flux2()
    encoder = from_folder(vae, tmp_path)
    assert (encoder.latent_channels, encoder.latent_stride) == (32, 16)
    images = pictures(32, 64)
    pipeline = types.SimpleNamespace(vae=vae, _patchify_latents=Flux2Pipeline._patchify_latents)
    expected = Flux2Pipeline._encode_vae_image(pipeline, images, generator=None)
    latents = encoder.encode(images)
    assert latents.shape == (2, 32, 2, 4)
    torch.testing.assert_close(latents, expected)
    raw = vae.encode(images).latent_dist.mode()
    assert_decoded(encoder.decode(latents), vae.decode(raw).sample)


@torch.no_grad()
def test_qwen_image(tmp_path):
    vae = tiny_qwen()
    encoder = from_folder(vae, tmp_path)
    assert (encoder.latent_channels, encoder.latent_stride) == (4, 8)
    images = pictures(32, 48, batch=1)
    raw = vae.encode(images[:, :, None]).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_mean).view(1, 4, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 4, 1, 1, 1)
    latents = encoder.encode(images)
    torch.testing.assert_close(latents, ((raw - mean) / std)[:, :, 0])
    torch.testing.assert_close(encoder.space.normalise(raw), latents)
    assert_decoded(encoder.decode(latents), vae.decode(raw).sample[:, :, 0])


def test_a_pipelines_folder_whose_weights_are_whole(tmp_path):
    pipeline = tmp_path / "pipeline"
    tiny_kl().save_pretrained(pipeline / "vae")
    encoder = VAEEncoder(str(pipeline))
    encoder.load()
    assert encoder.encode(pictures(16, 16)).shape == (2, 16, 2, 2)

    config = pipeline / "vae" / "config.json"
    kept = config.read_text(encoding="utf-8")
    config.write_text(json.dumps(json.loads(kept) | {"layers_per_block": 2}), encoding="utf-8")
    with pytest.raises(Mistake) as told:
        VAEEncoder(str(pipeline)).load()
    assert told.value.option == "weights"
    config.write_text(kept, encoding="utf-8")
    weights = next((pipeline / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OSError, match="pipeline"):
        VAEEncoder(str(pipeline)).load()
    weights.unlink()
    with pytest.raises(OSError, match="pipeline"):
        VAEEncoder(str(pipeline)).load()


@pytest.mark.parametrize("name", KNOWN_VAES)
def test_known_autoencoders_need_no_network_to_be_built(name, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("a known name must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    expected = {"sdxl": (4, 8), "flux2": (128, 16)}.get(name, (16, 8))
    encoder = VAEEncoder(name)
    assert not encoder.loaded
    assert (encoder.latent_channels, encoder.latent_stride) == expected
    assert encoder.latent_space == name
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    published = {"sd3": 83.8, "flux": 83.8, "sdxl": 83.7, "flux2": 84.0, "qwen": 126.9}
    assert millions == pytest.approx(published[name], abs=0.1)


@pytest.mark.parametrize("vae", ["bundled", "runs/autoencoder/autoencoder.safetensors"])
def test_the_autoencoder_that_is_gone_is_told(vae):
    with pytest.raises(Mistake) as told:
        build_vae_encoder(vae)
    assert told.value.option == "vae"
    assert "taef2" in told.value.sentence


# ------------------------------------------------------------------ all families


@pytest.mark.parametrize("family", ["vae", "dinov2", "siglip"])
def test_bfloat16_weights_give_the_images_dtype(tmp_path, family):
    if family == "vae":
        encoder = from_folder(tiny_kl(), tmp_path)
    else:
        encoder = random_encoder({"dinov2": dinov2, "siglip": siglip}[family])
    images = pictures(80, 80)
    exact = encoder.encode(images)
    encoder.to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        latents = encoder.encode(images.to(dtype))
        assert latents.dtype == dtype
        assert (latents.float() - exact).square().mean() < 0.01 * exact.square().mean()
    if family == "vae":
        assert encoder.decode(exact).dtype == torch.float32


@pytest.mark.parametrize("family", [dinov2, siglip])
def test_vision_towers_stay_frozen_and_have_no_decoder(family):
    encoder = random_encoder(family)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    images = pictures(32, 32).requires_grad_()
    assert not encoder.encode(images).requires_grad
    assert not encoder.has_decoder
    with pytest.raises(NoNativeDecoder, match=encoder.latent_space):
        encoder.decode(torch.zeros(1, WIDTH, 2, 2))


@pytest.mark.parametrize("family", ["dinov2", "siglip", "vae"])
def test_random_weights_are_the_same_in_every_process(tmp_path, family):
    """No checkpoint holds an encoder: a run's random one is built again to decode."""
    tiny_kl().save_config(tmp_path)
    build = {
        "dinov2": dinov2,
        "siglip": siglip,
        "vae": lambda pretrained: VAEEncoder(str(tmp_path), pretrained),
    }[family]

    def weights():
        with pytest.warns(UserWarning, match="random weights"):
            return build(pretrained=False).state_dict()

    drawn = torch.random.get_rng_state()
    one = weights()
    assert torch.equal(drawn, torch.random.get_rng_state())
    torch.rand(3)
    assert all(torch.equal(one[name], tensor) for name, tensor in weights().items())


class Folded(Encoder):
    """Squares of pixels as latents: a family of its own."""

    def __init__(self, stride):
        super().__init__()
        self.latent_channels, self.latent_stride = 3 * stride**2, stride
        self.latent_space = "folded"

    def load(self): ...

    def encode(self, images):
        self.check_images(images)
        return F.pixel_unshuffle(images, self.latent_stride)


def test_a_model_file_finds_the_encoder_of_a_family_of_ones_own(monkeypatch):
    monkeypatch.setitem(ENCODERS, "FoldedPiD", Folded)
    encoder = build_encoder(replace(FLUX, family="FoldedPiD", encoder={"stride": 4}))
    assert encoder.encode(pictures(8, 16)).shape == (2, 48, 2, 4)
    assert not encoder.has_decoder
    assert build_encoder(FLUX).latent_space == "flux"
