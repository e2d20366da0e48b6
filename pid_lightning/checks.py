"""One sentence for a wrong value."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral


def check_choice(name: str, value: str, accepted: Collection[str]) -> None:
    """Raise ValueError unless the option `name` has an accepted value."""
    if value not in accepted:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(accepted)}.")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError if the option `name` is below its least value."""
    if value < least:
        raise ValueError(f"{name}: {value} must be at least {least}.")


def check_whole(name: str, value: object) -> None:
    """Raise ValueError unless the option `name` is a whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: {value!r} must be a whole number.")


def check_between(name: str, value: float, least: float, most: float) -> None:
    """Raise ValueError unless the option `name` lies between two values, both included."""
    if not least <= value <= most:
        raise ValueError(f"{name}: {value} must lie between {least} and {most}.")
