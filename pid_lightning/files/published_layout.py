"""Conversion of weights from PiD's published layout to this package's.

This package's layout differs only for speed; the function computed is the same. Linear layers with
the same input are fused into one matrix, RoPE pairs are (i, i + d/2) instead of (2i, 2i+1), and the
pixel blocks' modulation is ordered by part, then pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from einops import rearrange
from torch import Tensor

from pid_lightning.nn import PiD, PiDConfig

MATCHING = "use the family, version and sizes that they were trained with"  # the fix, in messages

Entry = tuple[str, tuple[str, ...], Callable[..., Tensor]]


def from_released(released: Mapping[str, Tensor], denoiser: PiD) -> dict[str, Tensor]:
    """Convert released tensors, named without prefix, to the state dict of `denoiser`.

    Args:
        released: tensors under the published key names.
        denoiser: the network to convert for; not modified, and may be on the meta device.

    Returns:
        A state dict for `denoiser.load_state_dict` with `strict=True`.

    Raises:
        ValueError: keys or shapes differ from the network's; names the first ones.
    """
    entries = list(_entries(denoiser.config))
    expected = {name for _, sources, _ in entries for name in sources}
    missing, unknown = sorted(expected - released.keys()), sorted(released.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"the weights do not match this network: {len(missing)} tensors missing "
            f"({first_names(missing)}), {len(unknown)} unknown ({first_names(unknown)}); "
            f"{MATCHING}."
        )
    ours = denoiser.state_dict()
    converted = {}
    for name, sources, convert in entries:
        try:
            tensor = convert(*(released[source] for source in sources))
            fits = tensor.shape == ours[name].shape
        except RuntimeError:  # the shapes cannot be rearranged
            fits = False
        if not fits:
            shapes = ", ".join(f"{source} {tuple(released[source].shape)}" for source in sources)
            raise ValueError(
                f"the weights do not match this network: {shapes} cannot become {name} of shape "
                f"{tuple(ours[name].shape)}; {MATCHING}."
            )
        converted[name] = tensor
    return converted


def first_names(names: list[str], count: int = 3) -> str:
    """The first of many names, for messages."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "") if names else "none"


def _entries(config: PiDConfig) -> Iterator[Entry]:
    """(our name, released names, conversion from the released tensors) for every tensor."""
    yield from _linear("patch_embedding", "s_embedder.proj")
    yield from _linear("time_embedding.hidden", "t_embedder.mlp.0")
    yield from _linear("time_embedding.out", "t_embedder.mlp.2")
    if config.text_length == 0:
        raise ValueError(
            "text_length: 0 has no published layout; set it above 0, as in every released network."
        )
    yield from _linear("text_embedding.linear", "y_embedder.proj")
    yield _same("text_embedding.norm.weight", "y_embedder.norm.weight")
    yield _same("text_embedding.position", "y_pos_embedding")
    for i in range(config.num_blocks):
        for stream, modulation, letter in (("image", "img", "x"), ("text", "txt", "y")):
            yield from _stream_entries(
                f"patch_blocks.{i}", stream, modulation, letter, config.num_heads
            )
    yield from _linear("pixel_embedding", "pixel_embedder.proj")
    for i in range(config.num_pixel_blocks):
        yield from _pixel_block_entries(f"pixel_blocks.{i}", config)
    yield _same("out_norm.weight", "final_layer.norm.weight")
    yield from _linear("out", "final_layer.linear")
    yield from _adapter_entries(config)


def _stream_entries(
    block: str, stream: str, modulation: str, letter: str, num_heads: int
) -> Iterator[Entry]:
    ours = f"{block}.{stream}"
    yield from _linear(f"{ours}.modulation", f"{block}.adaLN_modulation_{modulation}.0")
    yield _same(f"{ours}.attention_norm.weight", f"{block}.norm_{letter}1.weight")
    yield _same(f"{ours}.mlp_norm.weight", f"{block}.norm_{letter}2.weight")
    yield from _attention_entries(
        f"{ours}.qkv", f"{ours}.attention_out", f"{block}.attn", f"_{letter}", num_heads
    )
    mlp = f"{block}.mlp_{letter}"
    yield f"{ours}.mlp.gate_up.weight", (f"{mlp}.w1.weight", f"{mlp}.w3.weight"), _stack_rows
    yield _same(f"{ours}.mlp.down.weight", f"{mlp}.w2.weight")


def _attention_entries(
    qkv: str, out: str, released: str, suffix: str, num_heads: int
) -> Iterator[Entry]:
    def halves_qkv(weight: Tensor) -> Tensor:
        q, k, v = rearrange(weight, "(three h d) i -> three h d i", three=3, h=num_heads)
        rows = torch.stack((_pairs_to_halves(q), _pairs_to_halves(k), v))
        return rearrange(rows, "three h d i -> (three h d) i")

    def halves_norm(weight: Tensor) -> Tensor:
        return _pairs_to_halves(weight[None, :, None])[0, :, 0]

    yield f"{qkv}.linear.weight", (f"{released}.qkv{suffix}.weight",), halves_qkv
    yield f"{qkv}.q_norm.weight", (f"{released}.q_norm{suffix}.weight",), halves_norm
    yield f"{qkv}.k_norm.weight", (f"{released}.k_norm{suffix}.weight",), halves_norm
    yield from _linear(out, f"{released}.proj{suffix}")


def _pixel_block_entries(block: str, config: PiDConfig) -> Iterator[Entry]:
    pixels = config.patch_size**2

    def by_part(rows: Tensor) -> Tensor:
        return rearrange(rows, "(p six c) ... -> (six p c) ...", six=6, p=pixels)

    modulation = f"{block}.adaLN_modulation.0"
    yield f"{block}.modulation.weight", (f"{modulation}.weight",), by_part
    yield f"{block}.modulation.bias", (f"{modulation}.bias",), by_part
    yield _same(f"{block}.attention_norm.weight", f"{block}.norm1.weight")
    yield _same(f"{block}.mlp_norm.weight", f"{block}.norm2.weight")
    yield from _linear(f"{block}.compress", f"{block}.compress_to_attn")
    yield from _linear(f"{block}.expand", f"{block}.expand_from_attn")
    yield from _attention_entries(
        f"{block}.qkv", f"{block}.attention_out", f"{block}.attn", "", config.pixel_num_heads
    )
    yield from _linear(f"{block}.mlp.0", f"{block}.mlp.fc1")
    yield from _linear(f"{block}.mlp.2", f"{block}.mlp.fc2")


def _adapter_entries(config: PiDConfig) -> Iterator[Entry]:
    adapter = config.adapter
    for layer in (0, 2):
        yield from _linear(f"adapter.stem.{layer}", f"lq_proj.latent_proj.{layer}")
    for i in range(adapter.num_res_blocks):
        for layer in (0, 2, 3, 5):
            ours = f"adapter.res_blocks.{i}.layers.{layer}"
            yield from _linear(ours, f"lq_proj.latent_proj.{i + 3}.block.{layer}")
    num_heads = -(-config.num_blocks // adapter.interval)
    heads = [f"lq_proj.output_heads.{i}" for i in range(num_heads)]
    gates = [f"lq_proj.gate_modules.{i}" for i in range(num_heads)]
    if adapter.inject_pixels:
        heads.append("lq_proj.pit_head")
        gates.append("pit_lq_gate")
    for kind in ("weight", "bias"):
        yield f"adapter.heads.{kind}", tuple(f"{head}.{kind}" for head in heads), _stack_rows
    for i, gate in enumerate(gates):
        weight = (f"{gate}.content_proj.weight",)
        yield f"gates.{i}.tokens.weight", weight, lambda w: w.chunk(2, dim=1)[0]
        yield f"gates.{i}.feature.weight", weight, lambda w: w.chunk(2, dim=1)[1]
        yield _same(f"gates.{i}.feature.bias", f"{gate}.content_proj.bias")
        yield _same(f"gates.{i}.log_alpha", f"{gate}.log_alpha")
    if adapter.rgb_head:
        for layer in (0, 1, 3):
            yield from _linear(f"adapter.rgb_head.{layer}", f"lq_proj.lq_aux_rgb_head.{layer}")


def _same(ours: str, released: str) -> Entry:
    return ours, (released,), lambda tensor: tensor


def _linear(ours: str, released: str) -> Iterator[Entry]:
    yield _same(f"{ours}.weight", f"{released}.weight")
    yield _same(f"{ours}.bias", f"{released}.bias")


def _stack_rows(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def _pairs_to_halves(rows: Tensor) -> Tensor:
    """Reorder (heads, d, ...) from RoPE pairs (2i, 2i+1) to pairs (i, i + d/2)."""
    return rearrange(rows, "h (i two) c -> h (two i) c", two=2)
