"""Opt-in: weights of linear layers in 8 bits, by torchao. Near the exact picture, not equal."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pid_lightning.compilation import check_not_frozen
from pid_lightning.nn import PiD

SMALLEST_WIDTH = 64  # of layers that are worth it, on both sides


def quantise(denoiser: PiD, activations: bool = False) -> None:
    """Hold the weights of the wide linear layers in 8 bits, one scale a row, in place.

    Such a network is for inference in the type it has now, and cannot be saved. What stays exact:
    the adapter's convolutions, the colours' narrow layers, the pixel blocks' modulations, which
    are read in parts, and the time embedding, which is never computed in less than fp32.

    Args:
        denoiser: the network.
        activations: multiply in 8 bits too, inputs rounded with one scale a token; in eager mode
            on a CPU that is slower.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        ValueError: it was done before, or compiled graphs hold the weights.
    """
    check_not_frozen(denoiser, "quantise")
    try:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as fault:
        raise ModuleNotFoundError(
            "8-bit weights need torchao: pip install 'pid_lightning[int8]'."
        ) from fault
    if any(map(is_quantised, denoiser.parameters())):
        raise ValueError("quantise: this network's weights are in 8 bits already.")
    exact = {block.modulation for block in denoiser.pixel_blocks}
    exact.update(denoiser.time_embedding.modules())

    def is_wide(module: nn.Module, name: str) -> bool:
        return (
            isinstance(module, nn.Linear)
            and module not in exact
            and min(module.in_features, module.out_features) >= SMALLEST_WIDTH
        )

    config = Int8DynamicActivationInt8WeightConfig() if activations else Int8WeightOnlyConfig()
    quantize_(denoiser, config, filter_fn=is_wide)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is held in another form than its type says."""
    return is_traceable_wrapper_subclass(weight.data)
