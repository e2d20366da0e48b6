"""What steps the denoiser: AdamW, or Muon for its matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "muon")


def make_optimizer(
    denoiser: nn.Module, name: str, learning_rate: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    """The optimiser of everything in `denoiser` that learns.

    Args:
        denoiser: what learns.
        name: one of `OPTIMIZERS`.
        learning_rate: of every parameter; Muon's updates are brought to the size of AdamW's.
        weight_decay: of every parameter.
        fused: AdamW in one kernel.
    """
    learning = [p for p in denoiser.parameters() if p.requires_grad]
    adamw = {"lr": learning_rate, "weight_decay": weight_decay, "fused": fused}
    if name == "adamw":
        return torch.optim.AdamW(learning, **adamw)
    check_muon()
    # The narrow ends of the network are no hidden layers: three colours, one gate value a token.
    matrices = [p for p in learning if p.ndim == 2 and min(p.shape) > 3]
    taken = {id(p) for p in matrices}
    rest = [p for p in learning if id(p) not in taken]
    return Together(
        torch.optim.Muon(
            matrices,
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, **adamw),
    )


def check_muon() -> None:
    """Refuse Muon where torch does not have it.

    Raises:
        ValueError: torch is older than 2.9.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"training.optimizer: muon needs torch 2.9 or later, here is {torch.__version__}; "
            "take adamw or a newer torch."
        )


class Together(torch.optim.Optimizer):
    """Several optimisers of disjoint parameters as one: one step, one schedule, one state.

    Args:
        parts: the optimisers; their parameter groups become this one's, in order.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts: Sequence[torch.optim.Optimizer] = parts
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """One set of groups and one state, whoever changes them."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Every part's step, after `closure` if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into every part."""
        super().load_state_dict(state_dict)
        self._share()
