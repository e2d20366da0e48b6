"""The method in the simplest correct code: no fusing, no caching, one formula per line.

The reference for tests of the fast paths and the baseline of the benchmark. It takes tensors with
the published key names and shares no formula with `pid_lightning.nn`. Everything is computed at
every call in the dtype of the weights, except in fp32 at least: time and norm statistics, as the
method requires, rotations and the gate's alpha, as in the published network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pid_lightning.nn import Geometry

Params = Mapping[str, Tensor]
Arguments = Mapping[str, Any]


GATES = {"channel": "sigma_aware_per_token_per_dim", "token": "sigma_aware_per_token"}


def published_arguments(info: Any) -> dict[str, Any]:
    """The published constructor's arguments for a network's `ModelInfo`."""
    config, adapter = info.config, info.config.adapter
    rope_height, rope_width = config.rope_reference or (1024, 1024)
    return {
        "hidden_size": config.width,
        "num_groups": config.num_heads,
        "patch_depth": config.num_blocks,
        "patch_size": config.patch_size,
        "pixel_hidden_size": config.pixel_width,
        "pixel_attn_hidden_size": config.pixel_attention_width,
        "pixel_num_groups": config.pixel_num_heads,
        "pixel_depth": config.num_pixel_blocks,
        "txt_embed_dim": config.text_width,
        "txt_max_length": config.text_length,
        "rope_mode": "original" if config.rope_reference is None else "ntk_aware",
        "rope_ref_h": rope_height,
        "rope_ref_w": rope_width,
        "lq_hidden_dim": adapter.width,
        "lq_num_res_blocks": adapter.num_res_blocks,
        "lq_interval": adapter.interval,
        "lq_gate_type": GATES[adapter.gate],
        "lq_conv_padding_mode": adapter.padding,
        "pit_lq_inject": adapter.inject_pixels,
        "lq_aux_rgb_head": adapter.rgb_head,
        "lq_aux_rgb_head_latent_block_idx": adapter.rgb_head_block or -1,
        "lq_latent_unpatchify_factor": adapter.unpack,
        "lq_latent_channels": info.geometry.latent_channels,
        "latent_spatial_down_factor": info.geometry.latent_stride,
        "sr_scale": info.geometry.scale,
    }


def plain_velocity(
    params: Params,
    arguments: Arguments,
    x_t: Tensor,
    t: Tensor,
    text: Tensor,
    latents: Tensor,
    latent_sigma: Tensor,
) -> Tensor:
    """The velocity (B, 3, H, W), in fp32 at least.

    Args:
        params: tensors under the published key names.
        arguments: the published constructor's arguments.
        x_t: noisy images (B, 3, H, W).
        t: pixel times (B,), 1 is noise.
        text: caption features (B, L, D_text); L may be 0.
        latents: (B, C, h, w), normalised.
        latent_sigma: noise level (B,) of the latents.
    """
    dtype = params["s_embedder.proj.weight"].dtype
    features = plain_features(params, arguments, latents)
    tokens = plain_tokens(params, arguments, x_t, t, text, features, latent_sigma)[-1]
    s = F.silu(_time(params, t).to(dtype) + tokens)
    if arguments.get("pit_lq_inject", False):
        s = _gate(params, "pit_lq_gate", s, features[-1], latent_sigma)
    return _wide(_pixels(params, arguments, x_t.to(dtype), s))


def plain_features(params: Params, arguments: Arguments, latents: Tensor) -> list[Tensor]:
    """Adapter features (B, N, D), one per injection point, that of the pixel blocks last."""
    x = rearrange(_latent_maps(params, arguments, latents)[-1], "b c h w -> b (h w) c")
    heads = [f"lq_proj.output_heads.{i}" for i in range(_num_injections(arguments))]
    if arguments.get("pit_lq_inject", False):
        heads.append("lq_proj.pit_head")
    return [_linear(params, head, x) for head in heads]


def plain_rgb(params: Params, arguments: Arguments, latents: Tensor) -> Tensor:
    """The low-resolution image (B, 3, H/scale, W/scale) of v1.5's RGB head."""
    block = arguments.get("lq_aux_rgb_head_latent_block_idx", -1)
    x = _latent_maps(params, arguments, latents)[block if block > 0 else -1]
    x = rearrange(x, "b c h w -> b h w c")
    norm, name = "lq_proj.lq_aux_rgb_head.0", "lq_proj.lq_aux_rgb_head"
    x = F.layer_norm(x, x.shape[-1:], params[f"{norm}.weight"], params[f"{norm}.bias"])
    x = _linear(params, f"{name}.3", F.silu(_linear(params, f"{name}.1", x)))
    side = arguments["patch_size"] // arguments["sr_scale"]
    return rearrange(x, "b h w (c p q) -> b c (h p) (w q)", p=side, q=side)


class PlainCondition(NamedTuple):
    """The inputs that sampling steps share: nothing is computed before a call."""

    latents: Tensor
    latent_sigma: Tensor
    text: Tensor
    rgb: Tensor | None


class PlainPiD(nn.Module):
    """`plain_velocity` behind the methods of `nn.PiD` by which networks are trained and sampled.

    Args:
        params: tensors under the published key names; parameters are fp32.
        arguments: the published constructor's arguments.
        config: the sizes that `nn.PiD` has, for code that asks for them.
    """

    def __init__(self, params: Params, arguments: Arguments, config: Any = None) -> None:
        super().__init__()
        self.arguments, self.config = dict(arguments), config
        self.geometry = Geometry(
            arguments["lq_latent_channels"],
            arguments["latent_spatial_down_factor"],
            arguments["sr_scale"],
        )
        # Parameter names must not contain a dot.
        self.params = nn.ParameterDict({k.replace(".", "/"): v.float() for k, v in params.items()})

    def check_size(self, height: int, width: int) -> None:
        """Do nothing."""

    def condition(
        self,
        latents: Tensor,
        latent_sigma: Tensor,
        text: Tensor,
        keep_latents: Tensor | None = None,
        keep_text: Tensor | None = None,
        with_rgb: bool = False,
    ) -> PlainCondition:
        """Bundle the inputs; none are dropped."""
        rgb = None
        if with_rgb and self.arguments.get("lq_aux_rgb_head", False):
            rgb = plain_rgb(self._params(), self.arguments, latents)
        return PlainCondition(latents, latent_sigma, text, rgb)

    def without_text(
        self, condition: PlainCondition, null_text: Tensor | None = None
    ) -> PlainCondition:
        """The condition with `null_text`, or zeros by default."""
        null = torch.zeros_like(condition.text) if null_text is None else null_text
        return condition._replace(text=null)

    def forward(self, x_t: Tensor, t: Tensor, condition: PlainCondition) -> Tensor:
        """See `plain_velocity`."""
        latents, latent_sigma, text, _ = condition
        return plain_velocity(self._params(), self.arguments, x_t, t, text, latents, latent_sigma)

    def features(
        self, x_t: Tensor, t: Tensor, condition: PlainCondition, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Patch tokens after the given blocks, each (B, D, H/P, W/P)."""
        latents, latent_sigma, text, _ = condition
        params, arguments = self._params(), self.arguments
        features = plain_features(params, arguments, latents)
        after = plain_tokens(params, arguments, x_t, t, text, features, latent_sigma)
        rows = x_t.shape[-2] // arguments["patch_size"]
        return [rearrange(after[i], "b (h w) d -> b d h w", h=rows) for i in blocks]

    def _params(self) -> dict[str, Tensor]:
        return {k.replace("/", "."): v for k, v in self.params.items()}


# ------------------------------------------------------------------- patches


def plain_tokens(
    params: Params,
    arguments: Arguments,
    x_t: Tensor,
    t: Tensor,
    text: Tensor,
    features: list[Tensor],
    latent_sigma: Tensor,
) -> list[Tensor]:
    """Patch tokens (B, N, D) after each patch block."""
    dtype = params["s_embedder.proj.weight"].dtype
    side, heads = arguments["patch_size"], arguments["num_groups"]
    rows, columns = x_t.shape[-2] // side, x_t.shape[-1] // side
    patches = rearrange(x_t.to(dtype), "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
    tokens = _linear(params, "s_embedder.proj", patches)  # (B, N, D)

    text = text[:, : arguments["txt_max_length"]].to(dtype)
    y = _norm(params, "y_embedder.norm", _linear(params, "y_embedder.proj", text))
    y = (y + params["y_pos_embedding"][:, : y.shape[1]]).to(y.dtype)  # (B, L, D)

    head_dim = arguments["hidden_size"] // heads
    patch_angles = _patch_angles(arguments, rows, columns, head_dim, x_t.device)
    text_angles = _text_angles(y.shape[1], head_dim, x_t.device)
    condition = F.silu(_time(params, t).to(dtype))
    interval, after = arguments["lq_interval"], []
    for i in range(arguments["patch_depth"]):
        if i % interval == 0:
            gate = f"lq_proj.gate_modules.{i // interval}"
            tokens = _gate(params, gate, tokens, features[i // interval], latent_sigma)
        block = f"patch_blocks.{i}"
        tokens, y = _patch_block(
            params, block, heads, tokens, y, condition, patch_angles, text_angles
        )
        after.append(tokens)
    return after


def _patch_block(
    params: Params,
    block: str,
    heads: int,
    tokens: Tensor,
    text: Tensor,
    condition: Tensor,
    patch_angles: Tensor,
    text_angles: Tensor,
) -> tuple[Tensor, Tensor]:
    image_six = _linear(params, f"{block}.adaLN_modulation_img.0", condition).chunk(6, -1)
    text_six = _linear(params, f"{block}.adaLN_modulation_txt.0", condition).chunk(6, -1)

    x = _norm(params, f"{block}.norm_x1", tokens) * (1 + image_six[1]) + image_six[0]
    y = _norm(params, f"{block}.norm_y1", text) * (1 + text_six[1]) + text_six[0]
    q_x, k_x, v_x = _qkv(params, f"{block}.attn", "_x", x, heads, patch_angles)
    q_y, k_y, v_y = _qkv(params, f"{block}.attn", "_y", y, heads, text_angles)
    q, k, v = torch.cat((q_y, q_x), 2), torch.cat((k_y, k_x), 2), torch.cat((v_y, v_x), 2)
    attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
    y, x = attended[:, : text.shape[1]], attended[:, text.shape[1] :]
    tokens = tokens + image_six[2] * _linear(params, f"{block}.attn.proj_x", x)
    text = text + text_six[2] * _linear(params, f"{block}.attn.proj_y", y)

    x = _norm(params, f"{block}.norm_x2", tokens) * (1 + image_six[4]) + image_six[3]
    y = _norm(params, f"{block}.norm_y2", text) * (1 + text_six[4]) + text_six[3]
    tokens = tokens + image_six[5] * _swiglu(params, f"{block}.mlp_x", x)
    text = text + text_six[5] * _swiglu(params, f"{block}.mlp_y", y)
    return tokens, text


def _qkv(
    params: Params, name: str, suffix: str, x: Tensor, heads: int, angles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = F.linear(x, params[f"{name}.qkv{suffix}.weight"]).chunk(3, dim=-1)
    q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=heads) for part in (q, k, v))
    q = _rotate(_norm(params, f"{name}.q_norm{suffix}", q), angles)
    k = _rotate(_norm(params, f"{name}.k_norm{suffix}", k), angles)
    return q, k, v


def _swiglu(params: Params, name: str, x: Tensor) -> Tensor:
    gate, up = F.linear(x, params[f"{name}.w1.weight"]), F.linear(x, params[f"{name}.w3.weight"])
    return F.linear(F.silu(gate) * up, params[f"{name}.w2.weight"])


# -------------------------------------------------------------------- pixels


def _pixels(params: Params, arguments: Arguments, x_t: Tensor, s: Tensor) -> Tensor:
    side, width = arguments["patch_size"], arguments["pixel_hidden_size"]
    heads = arguments.get("pixel_num_groups") or arguments["num_groups"]
    attention_width = arguments.get("pixel_attn_hidden_size") or arguments["hidden_size"]
    height, length = x_t.shape[-2:]
    pixels = _linear(params, "pixel_embedder.proj", rearrange(x_t, "b c h w -> b h w c"))
    pixels = pixels + _pixel_positions(height, length, width, x_t.device).to(pixels.dtype)
    pixels = rearrange(pixels, "b (h p) (w q) c -> b (h w) (p q) c", p=side, q=side)

    grid = (height // side, length // side)
    angles = _patch_angles(arguments, *grid, attention_width // heads, x_t.device)
    for i in range(arguments["pixel_depth"]):
        pixels = _pixel_block(params, f"pixel_blocks.{i}", heads, pixels, s, angles)

    rgb = _linear(params, "final_layer.linear", _norm(params, "final_layer.norm", pixels))
    return rearrange(rgb, "b (h w) (p q) c -> b c (h p) (w q)", h=grid[0], p=side, q=side)


def _pixel_block(
    params: Params, block: str, heads: int, pixels: Tensor, s: Tensor, angles: Tensor
) -> Tensor:
    modulation = _linear(params, f"{block}.adaLN_modulation.0", s)  # (B, N, P*P*6*C)
    six = rearrange(modulation, "b n (p r) -> b n p r", p=pixels.shape[2]).chunk(6, -1)

    x = _norm(params, f"{block}.norm1", pixels) * (1 + six[1]) + six[0]
    x = _linear(params, f"{block}.compress_to_attn", x.flatten(2))
    q, k, v = _qkv(params, f"{block}.attn", "", x, heads, angles)
    x = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
    x = _linear(params, f"{block}.expand_from_attn", _linear(params, f"{block}.attn.proj", x))
    pixels = pixels + six[2] * x.view(pixels.shape)

    x = _norm(params, f"{block}.norm2", pixels) * (1 + six[4]) + six[3]
    x = _linear(params, f"{block}.mlp.fc2", F.gelu(_linear(params, f"{block}.mlp.fc1", x)))
    return pixels + six[5] * x


# ------------------------------------------------------------------- latents


def _latent_maps(params: Params, arguments: Arguments, latents: Tensor) -> list[Tensor]:
    """Output (B, width, H/P, W/P) of the first convolutions and of each residual block."""
    x = latents.to(params["lq_proj.latent_proj.0.weight"].dtype)
    unpack = arguments.get("lq_latent_unpatchify_factor", 1)
    x = rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=unpack, q=unpack)
    cell = arguments["sr_scale"] * arguments["latent_spatial_down_factor"] // unpack
    patch = arguments["patch_size"]
    if cell > patch:
        x = x.repeat_interleave(cell // patch, dim=2).repeat_interleave(cell // patch, dim=3)
    elif cell < patch:
        fold = patch // cell
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=fold, q=fold)

    padding, name = arguments.get("lq_conv_padding_mode", "zeros"), "lq_proj.latent_proj"
    x = F.silu(_conv(params, f"{name}.0", x, padding))
    maps = [_conv(params, f"{name}.2", x, padding)]
    for i in range(arguments["lq_num_res_blocks"]):
        block, x = f"{name}.{i + 3}.block", maps[-1]
        for norm, conv in ((0, 2), (3, 5)):
            weight, bias = params[f"{block}.{norm}.weight"], params[f"{block}.{norm}.bias"]
            x = F.silu(F.group_norm(x, 4, weight, bias))
            x = _conv(params, f"{block}.{conv}", x, padding)
        maps.append(maps[-1] + x)
    return maps


def _conv(params: Params, name: str, x: Tensor, padding: str) -> Tensor:
    x = F.pad(x, (1, 1, 1, 1), mode="constant" if padding == "zeros" else padding)
    return F.conv2d(x, params[f"{name}.weight"], params[f"{name}.bias"])


def _gate(params: Params, name: str, tokens: Tensor, feature: Tensor, sigma: Tensor) -> Tensor:
    both = _linear(params, f"{name}.content_proj", torch.cat((tokens, feature), dim=-1))
    closing = _wide(params[f"{name}.log_alpha"]).exp() * sigma.view(-1, 1, 1)
    return tokens + torch.sigmoid(_wide(both) - closing).to(tokens.dtype) * feature


def _num_injections(arguments: Arguments) -> int:
    return math.ceil(arguments["patch_depth"] / arguments["lq_interval"])


# ------------------------------------------------------------- basic layers


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _linear(params: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def _norm(params: Params, name: str, x: Tensor) -> Tensor:
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (normed * params[f"{name}.weight"]).to(x.dtype)


def _time(params: Params, t: Tensor) -> Tensor:
    name = "t_embedder.mlp"
    wide = {k: _wide(v) for k, v in params.items() if k.startswith(name)}
    dtype = wide[f"{name}.0.weight"].dtype
    frequencies = torch.exp(-math.log(10) * torch.arange(128, device=t.device, dtype=dtype) / 128)
    angles = 1000 * t.to(dtype)[:, None, None] * frequencies
    with torch.autocast(t.device.type, enabled=False):
        hidden = _linear(wide, f"{name}.0", torch.cat((angles.cos(), angles.sin()), dim=-1))
        return _linear(wide, f"{name}.2", F.silu(hidden))  # (B, 1, D)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of (B, heads, N, d) by angles (N, d/2)."""
    even, odd = _wide(x)[..., 0::2], _wide(x)[..., 1::2]
    cos, sin = angles.cos().to(even.dtype), angles.sin().to(even.dtype)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _text_angles(length: int, d: int, device: torch.device) -> Tensor:
    exponents = torch.arange(0, d, 2, dtype=torch.float64, device=device) / d
    positions = torch.arange(length, dtype=torch.float64, device=device)
    return positions[:, None] * 10000.0**-exponents


def _patch_angles(
    arguments: Arguments, rows: int, columns: int, d: int, device: torch.device
) -> Tensor:
    """(N, d/2): column and row angles, interleaved."""
    theta_x = theta_y = 10000.0
    if arguments.get("rope_mode", "ntk_aware") == "ntk_aware":
        a, patch = d // 2, arguments["patch_size"]
        theta_x *= (columns / (arguments.get("rope_ref_w", 1024) / patch)) ** (a / (a - 2))
        theta_y *= (rows / (arguments.get("rope_ref_h", 1024) / patch)) ** (a / (a - 2))
    exponents = torch.arange(0, d, 4, dtype=torch.float64, device=device) / d
    x = torch.linspace(0, 16, columns, dtype=torch.float64, device=device)
    y = torch.linspace(0, 16, rows, dtype=torch.float64, device=device)
    y, x = torch.meshgrid(y, x, indexing="ij")
    angles_x = x.reshape(-1, 1) * theta_x**-exponents
    angles_y = y.reshape(-1, 1) * theta_y**-exponents
    return torch.stack((angles_x, angles_y), dim=-1).flatten(1)


def _pixel_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """(H, W, C): sines and cosines of the column, then those of the row."""
    steps = torch.arange(channels // 4, dtype=torch.float64, device=device)
    frequencies = 10000.0 ** (-steps / (channels / 4))
    x = torch.arange(width, dtype=torch.float64, device=device)[:, None] * frequencies
    y = torch.arange(height, dtype=torch.float64, device=device)[:, None] * frequencies
    x = torch.cat((x.sin(), x.cos()), -1)[None].expand(height, -1, -1)
    y = torch.cat((y.sin(), y.cos()), -1)[:, None].expand(-1, width, -1)
    return torch.cat((x, y), dim=-1)


# ------------------------------------------------------------ random weights


def random_published(arguments: Arguments, generator: torch.Generator) -> dict[str, Tensor]:
    """Random fp32 weights, none of them zero, under the published names."""
    made = {}
    for name, shape in published_shapes(arguments):
        values = torch.randn(shape, generator=generator)
        if name.endswith("log_alpha"):
            values = math.log(5) + 0.3 * values
        elif len(shape) == 1 and name.endswith("weight"):  # of a norm
            values = 1 + 0.2 * values
        elif len(shape) == 1 or name == "y_pos_embedding":
            values = 0.2 * values
        else:
            values = values / math.sqrt(math.prod(shape[1:]))
        made[name] = values
    return made


def published_shapes(arguments: Arguments) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every published name and its shape."""
    d, patch, c = (arguments[k] for k in ("hidden_size", "patch_size", "pixel_hidden_size"))
    heads, text_length = arguments["num_groups"], arguments["txt_max_length"]
    yield from _affine("s_embedder.proj", d, 3 * patch**2)
    yield from _affine("t_embedder.mlp.0", d, 256)
    yield from _affine("t_embedder.mlp.2", d, d)
    yield from _affine("y_embedder.proj", d, arguments["txt_embed_dim"])
    yield "y_embedder.norm.weight", (d,)
    yield "y_pos_embedding", (1, text_length, d)
    for i in range(arguments["patch_depth"]):
        for stream, letter in (("img", "x"), ("txt", "y")):
            block, hidden = f"patch_blocks.{i}", int(2 * 4 * d / 3)
            yield from _affine(f"{block}.adaLN_modulation_{stream}.0", 6 * d, d)
            yield from _attention_shapes(f"{block}.attn", f"_{letter}", d, heads)
            yield from ((f"{block}.norm_{letter}{k}.weight", (d,)) for k in (1, 2))
            for part, shape in (("w1", (hidden, d)), ("w2", (d, hidden)), ("w3", (hidden, d))):
                yield f"{block}.mlp_{letter}.{part}.weight", shape
    yield from _affine("pixel_embedder.proj", c, 3)
    for i in range(arguments["pixel_depth"]):
        block, attention = f"pixel_blocks.{i}", arguments.get("pixel_attn_hidden_size") or d
        pixel_heads = arguments.get("pixel_num_groups") or heads
        yield from _affine(f"{block}.adaLN_modulation.0", 6 * c * patch**2, d)
        yield from _affine(f"{block}.compress_to_attn", attention, c * patch**2)
        yield from _affine(f"{block}.expand_from_attn", c * patch**2, attention)
        yield from _attention_shapes(f"{block}.attn", "", attention, pixel_heads)
        yield from ((f"{block}.norm{k}.weight", (c,)) for k in (1, 2))
        yield from _affine(f"{block}.mlp.fc1", 4 * c, c)
        yield from _affine(f"{block}.mlp.fc2", c, 4 * c)
    yield "final_layer.norm.weight", (c,)
    yield from _affine("final_layer.linear", 3, c)
    yield from _adapter_shapes(arguments)


def _adapter_shapes(arguments: Arguments) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, width, scale = (arguments[k] for k in ("hidden_size", "lq_hidden_dim", "sr_scale"))
    unpack, patch = arguments.get("lq_latent_unpatchify_factor", 1), arguments["patch_size"]
    cell = scale * arguments["latent_spatial_down_factor"] // unpack
    channels = arguments["lq_latent_channels"] // unpack**2 * max(patch // cell, 1) ** 2
    convs = {"0": channels, "2": width}
    for i in range(3, 3 + arguments["lq_num_res_blocks"]):
        convs |= {f"{i}.block.2": width, f"{i}.block.5": width}
        for k in (0, 3):
            yield from _affine(f"lq_proj.latent_proj.{i}.block.{k}", width)
    for name, inputs in convs.items():
        yield from _affine(f"lq_proj.latent_proj.{name}", width, inputs, 3, 3)
    heads = {f"lq_proj.output_heads.{i}": f"lq_proj.gate_modules.{i}"
             for i in range(_num_injections(arguments))}  # fmt: skip
    if arguments.get("pit_lq_inject", False):
        heads["lq_proj.pit_head"] = "pit_lq_gate"
    per_channel = arguments["lq_gate_type"] == "sigma_aware_per_token_per_dim"
    for head, gate in heads.items():
        yield from _affine(head, d, width)
        yield from _affine(f"{gate}.content_proj", d if per_channel else 1, 2 * d)
        yield f"{gate}.log_alpha", ()
    if arguments.get("lq_aux_rgb_head", False):
        yield from _affine("lq_proj.lq_aux_rgb_head.0", width)
        yield from _affine("lq_proj.lq_aux_rgb_head.1", width, width)
        yield from _affine("lq_proj.lq_aux_rgb_head.3", 3 * (patch // scale) ** 2, width)


def _attention_shapes(
    name: str, suffix: str, width: int, heads: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.qkv{suffix}.weight", (3 * width, width)
    yield f"{name}.q_norm{suffix}.weight", (width // heads,)
    yield f"{name}.k_norm{suffix}.weight", (width // heads,)
    yield from _affine(f"{name}.proj{suffix}", width, width)


def _affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
