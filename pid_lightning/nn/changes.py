"""What was done to a network for inference, and what can no longer be done afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pid_lightning.checks import Mistake

Change = Literal["fix_times", "quantise", "compile", "freeze"]
Asked = Change | Literal["dtype", "save"]

# What a change leaves behind, and what that rules out.
CONSEQUENCES: dict[Change, tuple[str, frozenset[Asked]]] = {
    "fix_times": ("its modulations know a few times only", frozenset({"fix_times", "save"})),
    "quantise": ("its weights are in 8 bits", frozenset({"quantise", "dtype", "save"})),
    "compile": ("its graphs read its weights", frozenset()),
    "freeze": ("its graphs hold its weights", frozenset({"fix_times", "quantise", "dtype"})),
}


def check_allowed(changes: Iterable[Change], asked: Asked) -> None:
    """Check that no change of a network rules out what is asked.

    Args:
        changes: `PiD.changes`.
        asked: another change, ``"dtype"`` for weights in another dtype, or ``"save"``.

    Raises:
        Mistake: a change does.
    """
    for change in changes:
        left, ruled_out = CONSEQUENCES[change]
        if asked in ruled_out:
            raise Mistake(
                asked, f"not possible after {change}, since {left}; load the model again first."
            )
