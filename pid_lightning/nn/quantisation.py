"""Opt-in 8-bit weights for linear layers, by torchao: close to the exact picture, not equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pid_lightning.checks import Mistake, check_choice
from pid_lightning.nn.changes import check_allowed
from pid_lightning.nn.denoiser import PiD

MIN_WIDTH = 64  # of inputs and outputs, for a layer to be worth it


def quantise(denoiser: PiD, activations: bool = False) -> None:
    """Store the weights of the wide linear layers in 8 bits, with one scale per row, in place.

    The network is then for inference in its current dtype only and cannot be saved. These stay
    exact: the adapter's convolutions, the narrow layers on pixels, the pixel blocks' modulations,
    whose weights are split, and the time embedding, which is always computed in fp32 at least.

    Args:
        denoiser: the network.
        activations: also multiply in 8 bits, with inputs rounded to one scale per token; slower
            in eager mode on a CPU. Not in the patch blocks' modulations, which have one row a
            picture: a GPU's 8-bit products (`torch._int_mm`) need at least 17.

    Raises:
        Mistake: torchao is not installed, weights in fp64, or a change that rules it out (see
            `changes`).
    """
    check_allowed(denoiser.changes, "quantise")
    check_choice("quantise", denoiser.dtype, (torch.float32, torch.bfloat16, torch.float16))
    try:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as error:
        raise Mistake(
            "int8", "8-bit weights need torchao; pip install 'pid_lightning[int8]'."
        ) from error
    exact = {block.modulation for block in denoiser.pixel_blocks}
    exact.update(denoiser.time_embedding.modules())
    wide = {
        module
        for module in denoiser.modules()
        if isinstance(module, nn.Linear)
        and module not in exact
        and min(module.in_features, module.out_features) >= MIN_WIDTH
    }
    weights_only = wide
    if activations:
        streams = [s for block in denoiser.patch_blocks for s in (block.image, block.text)]
        weights_only = {stream.modulation for stream in filter(None, streams)} & wide
    in_products = wide - weights_only
    # torchao's settings of torch's compiler would hold for every network of the process, and take
    # minutes a graph on a GPU.
    weights_config = Int8WeightOnlyConfig(set_inductor_config=False)
    products_config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(denoiser, weights_config, lambda module, _: module in weights_only)
    quantize_(denoiser, products_config, lambda module, _: module in in_products)
    denoiser.changes += ("quantise",)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored in another format than its dtype says."""
    return is_traceable_wrapper_subclass(weight.data)
