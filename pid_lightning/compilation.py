"""Networks compiled for inference: one graph for each size of input."""

from __future__ import annotations

from torch import Tensor, nn

MOST_GRAPHS = 64  # sizes that one network may meet; torch's own limit is 8, beyond it refuses


def compile_for_inference(
    network: nn.Module, freeze: bool = False, cuda_graphs: bool = False
) -> None:
    """Compile a network; each new size of input is compiled at its first call.

    Args:
        network: called under ``torch.no_grad`` or ``torch.inference_mode``.
        freeze: the graphs hold the weights, on a CPU laid out as its products read them, which
            saves those a tenth of their time. Until the process ends that takes the memory of
            the weights once more for each size, and weights that change later are not seen.
        cuda_graphs: a GPU replays each graph as a whole, which saves launching its kernels one by
            one: for small pictures, whose kernels are short. A graph keeps its activations'
            memory.

    Raises:
        ValueError: CUDA graphs for a network that is not on a GPU.
    """
    device = next(network.parameters()).device
    if cuda_graphs and device.type != "cuda":
        raise ValueError(
            f"cuda_graphs: this network is on {device}, where there are none; move it to a GPU "
            "first, or leave cuda_graphs out."
        )
    # Options keep graphs of both kinds apart, but freezing is heard only when a graph is traced.
    options = {"freezing": freeze, "triton.cudagraphs": cuda_graphs}
    network.compile(dynamic=False, fullgraph=True, options=options)
    compiled = network._compiled_call_impl

    def call(*inputs: object, **named: object) -> Tensor:
        from torch._dynamo import config as tracing
        from torch._inductor import config as generation

        with tracing.patch(cache_size_limit=MOST_GRAPHS), generation.patch(freezing=freeze):
            result = compiled(*inputs, **named)
        # A replayed graph writes every result to one place: guidance needs two at a time.
        return result.clone() if cuda_graphs else result

    # Where `compile` puts what it makes: copies of the network leave it behind.
    network._compiled_call_impl = call
    call.holds_weights = freeze


def check_not_frozen(network: nn.Module, asked: str) -> None:
    """Refuse what compiled graphs would not see.

    Args:
        network: perhaps compiled.
        asked: what would change its weights, for the message.

    Raises:
        ValueError: its graphs hold the weights.
    """
    if getattr(network._compiled_call_impl, "holds_weights", False):
        raise ValueError(
            f"{asked} comes too late, compiled graphs hold the weights; ask for it before "
            "compile(freeze=True)."
        )
