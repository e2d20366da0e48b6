"""The denoiser's optimiser (AdamW, or Muon for matrices and AdamW for the rest), its schedule and
the clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pid_lightning.training.settings import Training


def make_optimizer(denoiser: nn.Module, settings: Training, fused: bool) -> torch.optim.Optimizer:
    """The optimiser for all trainable parameters of `denoiser`, with AdamW fused or not; Muon's
    updates are scaled to the size of AdamW's, so that both take one learning rate."""
    learning = [p for p in denoiser.parameters() if p.requires_grad]
    both = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(learning, fused=fused, **both)
    # Muon is for hidden layers, not for narrow ends: three colours, or one gate value per token.
    matrices = [p for p in learning if p.ndim >= 2 and min(len(p), p[0].numel()) > 3]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for p in learning if id(p) not in matrix_ids]
    return MuonAndAdamW(matrices, rest, settings.learning_rate, settings.weight_decay, fused)


def make_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, decay_steps: float | None
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up of the learning rate, then constant, or a cosine to 0 at `decay_steps`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if decay_steps is None:
            return 1.0
        span = max(decay_steps - warmup_steps, 1)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup_steps) / span))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def clip_gradients(
    optimizer: torch.optim.Optimizer, limit: float | None, algorithm: str | None
) -> Tensor:
    """Clip what an optimiser steps, as a trainer is configured, and return the norm from before.

    Lightning refuses to clip for fused optimisers, which unscale fp16 gradients themselves; here
    they are only used where gradients are not scaled.
    """
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
    if limit and algorithm == "value":
        torch.nn.utils.clip_grad_value_(learning, limit)
    elif limit:
        torch.nn.utils.clip_grads_with_norm_(learning, limit, norm)
    return norm


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, as one optimiser with one schedule and state;
    groups that are added later are AdamW's.

    Muon (https://kellerjordan.github.io/posts/muon) steps along the orthogonal matrix nearest to
    the momentum, here scaled to the size of AdamW's step (arXiv 2502.16982, equation 4). The
    kernel (out, in, h, w) of a convolution is treated as a matrix (out, in*h*w).
    `torch.optim.Muon` (from torch 2.9, without kernels) and timm's fuse the bfloat16 products,
    which rounds otherwise (by up to 0.02 of a step's entries): runs would not resume equal.

    Args:
        matrices: parameters for Muon, each with at least 2 dimensions.
        rest: parameters for AdamW.
        learning_rate: for both.
        weight_decay: for both.
        fused: whether AdamW is fused.
    """

    momentum: float = 0.95

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        rest: Sequence[nn.Parameter],
        learning_rate: float,
        weight_decay: float,
        fused: bool,
    ) -> None:
        both = {"lr": learning_rate, "weight_decay": weight_decay}
        self._adamw = torch.optim.AdamW(rest, fused=fused, **both)
        super().__init__([{"params": matrices}, *self._adamw.param_groups], both)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Step both, after calling `closure` if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon, *adamw = self.param_groups
        for parameter in muon["params"]:
            if parameter.grad is not None:
                self._step_matrix(parameter, muon["lr"], muon["weight_decay"])
        self._adamw.param_groups, self._adamw.state = adamw, self.state
        self._adamw.step()
        return loss

    def _step_matrix(self, parameter: Tensor, learning_rate: float, weight_decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad.flatten(1)
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        step = orthogonalised(gradient.lerp(state["momentum"], self.momentum))  # Nesterov momentum
        size = 0.2 * math.sqrt(max(step.shape))
        parameter.mul_(1 - learning_rate * weight_decay)
        parameter.sub_(step.view_as(parameter), alpha=learning_rate * size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Approximate U V^T of `matrix` = U S V^T in bfloat16 by five Newton-Schulz iterations, whose
    coefficients raise small singular values fastest: all but the tiniest end near 0.5 to 1.5."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)  # singular values at most 1
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x
