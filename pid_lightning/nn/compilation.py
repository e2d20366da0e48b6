"""Networks compiled for inference: one graph for each size of input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pid_lightning.nn.quantisation import is_quantised

MAX_GRAPHS = 64  # input sizes per network, instead of torch's default limit of 8


def compile_for_inference(
    network: nn.Module, freeze: bool = False, cuda_graphs: bool = False
) -> None:
    """Compile a network; each new size of picture or caption is compiled at its first call.

    Args:
        network: called under ``torch.no_grad`` or ``torch.inference_mode``.
        freeze: store the weights in the graphs, prepacked on a CPU, which makes matmuls a tenth
            faster there. Each input size then takes the memory of the weights once more until
            the process ends, and later changes to the weights have no effect.
        cuda_graphs: replay each graph as a whole instead of launching its kernels one by one; for
            small pictures, whose kernels are short. Each graph keeps the memory of its
            activations.

    Raises:
        ValueError: CUDA graphs for a network that is not on a GPU.
    """
    device = next(network.parameters()).device
    if cuda_graphs and device.type != "cuda":
        raise ValueError(
            f"cuda_graphs: this network is on {device}, but CUDA graphs need a GPU; move it to a "
            "GPU first, or leave cuda_graphs out."
        )
    # The options keep both kinds of graphs apart, but freezing is only read while tracing.
    options = {"freezing": freeze, "triton.cudagraphs": cuda_graphs}
    network.compile(dynamic=False, fullgraph=True, options=options)
    compiled = network._compiled_call_impl
    uses_patterns: dict[tuple[object, ...], bool] = {}  # of each size so far

    def call(*inputs: object, **named: object) -> Tensor:
        from torch._dynamo import config as tracing
        from torch._inductor import config as generation

        tensors = [x for x in tree_leaves((inputs, named)) if isinstance(x, Tensor)]
        size = (torch.is_inference_mode_enabled(), *(tensor.shape for tensor in tensors))
        if size not in uses_patterns:
            if len(uses_patterns) == MAX_GRAPHS:
                raise ValueError(
                    f"compile: {MAX_GRAPHS + 1} sizes of input, but at most {MAX_GRAPHS} are "
                    "compiled; decode in tiles of one size, or without compile."
                )
            uses_patterns[size] = _patterns_help(network)
        settings = generation.patch(freezing=freeze, pattern_matcher=uses_patterns[size])
        with tracing.patch(cache_size_limit=MAX_GRAPHS), settings:
            result = compiled(*inputs, **named)
        # A replayed graph overwrites its last result, but guidance needs two at a time.
        return result.clone() if cuda_graphs else result

    # The attribute that `compile` sets: copies of the network do not keep it.
    network._compiled_call_impl = call
    call.holds_weights = freeze


def _patterns_help(network: nn.Module) -> bool:
    """Whether torch may replace known patterns of operations: not products with 8-bit weights on a
    GPU, where `aten._weight_int8pack_mm` does without matrix units."""
    on_gpu = next(network.parameters()).device.type == "cuda"
    return not (on_gpu and any(map(is_quantised, network.parameters())))


def check_not_frozen(network: nn.Module, asked: str) -> None:
    """Refuse to change weights that frozen graphs hold, since it would have no effect.

    Args:
        network: the network, compiled or not.
        asked: the option or method that would change its weights, for the message.

    Raises:
        ValueError: the network's graphs hold its weights.
    """
    if getattr(network._compiled_call_impl, "holds_weights", False):
        raise ValueError(
            f"{asked} comes too late: compiled graphs hold the weights; use it before "
            "compile(freeze=True)."
        )
