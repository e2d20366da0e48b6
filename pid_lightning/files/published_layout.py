"""PiD's published layout of weights and this package's: the same numbers, named and ordered
differently.

The layouts differ only for speed; the function computed is the same. Here, linear layers with the
same input are fused into one matrix, RoPE pairs are (i, i + d/2) instead of (2i, 2i+1), and the
pixel blocks' modulation is ordered by part, then pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.nn import PiD, PiDConfig
from pid_lightning.nn.compilation import plain_name


class Entry(NamedTuple):
    """Tensors here with the numbers of published ones; several are one tensor cut along `dim`."""

    ours: tuple[str, ...]
    published: tuple[str, ...]
    dim: int = 0
    order: Tensor | None = None  # our row i is the published row order[i]; None: the same rows

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _move(tensors, self.published, self.ours, self.dim, self.order)

    def to_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inverse = None if self.order is None else self.order.argsort()
        return _move(tensors, self.ours, self.published, self.dim, inverse)


def _move(
    tensors: Mapping[str, Tensor],
    sources: Sequence[str],
    targets: Sequence[str],
    dim: int,
    order: Tensor | None,
) -> dict[str, Tensor]:
    parts = [tensors[name] for name in sources]
    whole = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
    whole = whole if order is None else whole[order]
    cut = whole.chunk(len(targets), dim) if len(targets) > 1 else [whole]
    return dict(zip(targets, cut, strict=True))


def from_published(published: Mapping[str, Tensor], denoiser: PiD) -> dict[str, Tensor]:
    """Convert published tensors, named without prefix, to the state dict of `denoiser`.

    Args:
        published: tensors under the published key names.
        denoiser: the network to convert for; not modified, and may be on the meta device.

    Returns:
        A state dict for `denoiser.load_state_dict` with `strict=True`. A learned null, which
        published networks lack, is left out.

    Raises:
        Mistake: keys or shapes differ from the network's; names the first ones.
    """
    table = list(_table(denoiser.config))
    empty = {name: tensor.to("meta") for name, tensor in denoiser.state_dict().items()}
    expected = {k: v for entry in table for k, v in entry.to_published(empty).items()}
    misshapen = [
        f"{name} {tuple(published[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in published and published[name].shape != tensor.shape
    ]
    wrong = {
        "missing": sorted(expected.keys() - published.keys()),
        "unknown": sorted(published.keys() - expected.keys()),
        "of another shape": misshapen,
    }
    if any(wrong.values()):
        told = [
            f"{len(names)} tensors {kind} ({first_names(names)})"
            for kind, names in wrong.items()
            if names
        ]
        raise Mistake(
            "published",
            f"the weights do not match this network: {', '.join(told)}; use the family, version "
            "and sizes that they were trained with.",
        )
    return {k: v for entry in table for k, v in entry.to_ours(published).items()}


def to_published(denoiser: PiD) -> dict[str, Tensor]:
    """Convert a network's weights to tensors under the published names, without prefix.

    Raises:
        Mistake: the network has tensors that no published one has, such as a learned null; names
            the first ones.
    """
    state = {plain_name(name): value for name, value in denoiser.state_dict().items()}
    table = list(_table(denoiser.config))
    differing = sorted(state.keys() ^ {name for entry in table for name in entry.ours})
    if differing:
        raise Mistake(
            "denoiser",
            f"{len(differing)} tensors ({first_names(differing)}) set it apart from the published "
            "networks; build it with their sizes and options.",
        )
    return {k: v for entry in table for k, v in entry.to_published(state).items()}


def first_names(names: Sequence[str], count: int = 3) -> str:
    """The first of many names, for messages."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "") if names else "none"


def _table(config: PiDConfig) -> Iterator[Entry]:
    """An entry for every tensor."""
    yield from _linear("patch_embedding", "s_embedder.proj")
    yield from _linear("time_embedding.hidden", "t_embedder.mlp.0")
    yield from _linear("time_embedding.out", "t_embedder.mlp.2")
    yield from _linear("text_embedding.linear", "y_embedder.proj")
    yield _same("text_embedding.norm.weight", "y_embedder.norm.weight")
    yield _same("text_embedding.position", "y_pos_embedding")
    for i in range(config.num_blocks):
        yield from _stream(f"patch_blocks.{i}", "image", "img", "x", config)
        yield from _stream(f"patch_blocks.{i}", "text", "txt", "y", config)
    yield from _linear("pixel_embedding", "pixel_embedder.proj")
    for i in range(config.num_pixel_blocks):
        yield from _pixel_block(f"pixel_blocks.{i}", config)
    yield _same("out_norm.weight", "final_layer.norm.weight")
    yield from _linear("out", "final_layer.linear")
    yield from _adapter(config)


def _stream(
    block: str, stream: str, modulation: str, letter: str, config: PiDConfig
) -> Iterator[Entry]:
    ours = f"{block}.{stream}"
    yield from _linear(f"{ours}.modulation", f"{block}.adaLN_modulation_{modulation}.0")
    yield _same(f"{ours}.attention_norm.weight", f"{block}.norm_{letter}1.weight")
    yield _same(f"{ours}.mlp_norm.weight", f"{block}.norm_{letter}2.weight")
    yield from _attention(
        ours, f"{block}.attn", f"_{letter}", config.num_heads, config.width // config.num_heads
    )
    mlp = f"{block}.mlp_{letter}"
    yield Entry((f"{ours}.mlp.gate_up.weight",), (f"{mlp}.w1.weight", f"{mlp}.w3.weight"))
    yield _same(f"{ours}.mlp.down.weight", f"{mlp}.w2.weight")


def _attention(
    ours: str, published: str, suffix: str, num_heads: int, head_width: int
) -> Iterator[Entry]:
    width = num_heads * head_width
    rows = torch.arange(3 * width, device="cpu")  # of q, k and v; v has no RoPE pairs
    halves = rearrange(rows[:head_width], "(i two) -> (two i)", two=2)
    pairs = rearrange(rows[: 2 * width], "(h i two) -> (h two i)", two=2, i=head_width // 2)
    qkv = torch.cat((pairs, rows[2 * width :]))
    for name, rows in (("linear", qkv), ("q_norm", halves), ("k_norm", halves)):
        theirs = "qkv" if name == "linear" else name
        names = (f"{ours}.qkv.{name}.weight",), (f"{published}.{theirs}{suffix}.weight",)
        yield Entry(*names, order=rows)
    yield from _linear(f"{ours}.attention_out", f"{published}.proj{suffix}")


def _pixel_block(block: str, config: PiDConfig) -> Iterator[Entry]:
    pixels = config.patch_size**2
    rows = torch.arange(pixels * 6 * config.pixel_width, device="cpu")
    by_part = rearrange(rows, "(p six c) -> (six p c)", six=6, p=pixels)
    for kind in ("weight", "bias"):
        names = (f"{block}.modulation.{kind}",), (f"{block}.adaLN_modulation.0.{kind}",)
        yield Entry(*names, order=by_part)
    yield _same(f"{block}.attention_norm.weight", f"{block}.norm1.weight")
    yield _same(f"{block}.mlp_norm.weight", f"{block}.norm2.weight")
    yield from _linear(f"{block}.compress", f"{block}.compress_to_attn")
    yield from _linear(f"{block}.expand", f"{block}.expand_from_attn")
    num_heads = config.pixel_num_heads
    head_width = config.pixel_attention_width // num_heads
    yield from _attention(block, f"{block}.attn", "", num_heads, head_width)
    yield from _linear(f"{block}.mlp.0", f"{block}.mlp.fc1")
    yield from _linear(f"{block}.mlp.2", f"{block}.mlp.fc2")


def _adapter(config: PiDConfig) -> Iterator[Entry]:
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
        yield Entry((f"adapter.heads.{kind}",), tuple(f"{head}.{kind}" for head in heads))
    for i, gate in enumerate(gates):
        halves = (f"gates.{i}.tokens.weight", f"gates.{i}.feature.weight")
        yield Entry(halves, (f"{gate}.content_proj.weight",), dim=1)
        yield _same(f"gates.{i}.feature.bias", f"{gate}.content_proj.bias")
        yield _same(f"gates.{i}.log_alpha", f"{gate}.log_alpha")
    if adapter.rgb_head:
        for layer in (0, 1, 3):
            yield from _linear(f"adapter.rgb_head.{layer}", f"lq_proj.lq_aux_rgb_head.{layer}")


def _same(ours: str, published: str) -> Entry:
    return Entry((ours,), (published,))


def _linear(ours: str, published: str) -> Iterator[Entry]:
    yield _same(f"{ours}.weight", f"{published}.weight")
    yield _same(f"{ours}.bias", f"{published}.bias")
