"""Networks compiled for inference: one graph for each size of input."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.nn.condition import Condition
from pid_lightning.nn.denoiser import PiD


def plain_name(name: str) -> str:
    """A tensor's name without what `torch.compile` of a network or of a part adds to it."""
    return name.replace("_orig_mod.", "")


def compile_for_inference(denoiser: PiD, freeze: bool = False, cuda_graphs: bool = False) -> None:
    """Compile a network, in place; each new size of picture or caption is compiled at its first
    call, and its graph stays until the process ends.

    Args:
        denoiser: called under ``torch.no_grad`` or ``torch.inference_mode``.
        freeze: store the weights in the graphs, prepacked on a CPU, which makes matmuls a tenth
            faster there. Each input size then takes the memory of the weights once more, and later
            changes to the weights have no effect.
        cuda_graphs: replay each graph as a whole instead of launching its kernels one by one; for
            small pictures, whose kernels are short. Each graph keeps the memory of its
            activations.

    Raises:
        Mistake: CUDA graphs for a network that is not on a GPU.
    """
    device = denoiser.out.weight.device
    if cuda_graphs and device.type != "cuda":
        raise Mistake(
            "cuda_graphs",
            f"this network is on {device}, but CUDA graphs need a GPU; move it to a GPU first, or "
            "leave cuda_graphs out.",
        )
    # The options keep both kinds of graphs apart, but freezing is only read while tracing.
    options = {"freezing": freeze, "triton.cudagraphs": cuda_graphs}
    compiled = torch.compile(PiD.velocity, dynamic=False, fullgraph=True, options=options)

    def velocity(denoiser: PiD, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        from torch._dynamo import config as tracing
        from torch._inductor import config as generation

        # torch's limit of 8 graphs is for programs that recompile by mistake.
        many = {"cache_size_limit": sys.maxsize, "accumulated_cache_size_limit": sys.maxsize}
        # On a GPU a known pattern takes 8-bit weights to `aten._weight_int8pack_mm`, which does
        # without matrix units.
        patterns = "quantise" not in denoiser.changes or x_t.device.type != "cuda"
        settings = generation.patch(freezing=freeze, pattern_matcher=patterns)
        with tracing.patch(**many), settings:
            result = compiled(denoiser, x_t, t, condition)
        # A replayed graph overwrites its last result, but guidance needs two at a time.
        return result.clone() if cuda_graphs else result

    denoiser.velocity_function = velocity
    others = (change for change in denoiser.changes if change not in ("compile", "freeze"))
    denoiser.changes = (*others, "freeze" if freeze else "compile")
