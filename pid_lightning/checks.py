"""One sentence for a wrong value."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral


class Mistake(ValueError):
    """A user's mistake, raised at the door where it was made: a constructor, a public function or
    a command. The program `pid` prints it as one line and exits with status 2.

    Args:
        option: name of the argument or option, as the user wrote it.
        sentence: what was given, what is accepted and how to mend it.

    Attributes:
        option, sentence: as given.
    """

    def __init__(self, option: str, sentence: str) -> None:
        super().__init__(option, sentence)
        self.option = option
        self.sentence = sentence

    def __str__(self) -> str:
        return f"{self.option}: {self.sentence}"


class Diverged(ArithmeticError):
    """A run whose numbers are no longer finite. The program `pid` prints it as one line and exits
    with status 1."""


def one_line(text: str) -> str:
    """A text as one line that any console can show: names of files hold whatever they like."""
    shown = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def check_choice(option: str, value: object, accepted: Collection[object]) -> None:
    """Raise `Mistake` unless a value is accepted."""
    if value not in accepted:
        raise Mistake(option, f"{value!r} is not one of {', '.join(map(str, accepted))}.")


def check_at_least(option: str, value: float, least: float) -> None:
    """Raise `Mistake` if a value is below its least."""
    if not value >= least:
        raise Mistake(option, f"{value} must be at least {least}.")


def check_whole(option: str, value: object) -> None:
    """Raise `Mistake` unless a value is a whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise Mistake(option, f"{value!r} must be a whole number.")


def check_between(option: str, value: float, least: float, most: float) -> None:
    """Raise `Mistake` unless a value lies between two values, both included."""
    if not least <= value <= most:
        raise Mistake(option, f"{value} must lie between {least} and {most}.")


def check_multiple(option: str, value: int, of: int, because: str, least: int = 1) -> None:
    """Raise `Mistake` unless a value is at least `least` times `of`, and a multiple of it.

    Args:
        option, value: what was given.
        of: the divisor.
        because: what the divisor is.
        least: multiples of the divisor that the value holds at least.
    """
    if value % of or value < least * of:
        nearest = max(least, round(value / of)) * of
        raise Mistake(
            option,
            f"{value} must be a multiple of {of} ({because}), at least {least * of}; use "
            f"{nearest}.",
        )
