"""One sentence for a wrong value."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MOST = 2**31  # of a whole number that describes anything


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


def check_fields(described: Any, prefix: str = "") -> None:
    """Raise `Mistake` unless every field of a dataclass holds what its annotation says, finite and
    of a sensible size: whoever built it, and from whatever file."""
    for name, kind in _hints(type(described)).items():
        check_type(prefix + name, getattr(described, name), kind)


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raise `Mistake` unless a function takes these arguments by their names and types."""
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise Mistake("arguments", f"{error}; give those of {function.__name__}.") from error
    hints = _hints(function)
    for name, value in arguments.items():
        check_type(name, value, hints.get(name, Any))


@functools.cache
def _hints(described: Any) -> dict[str, Any]:
    is_class = inspect.isclass(described) and not is_dataclass(described)
    return get_type_hints(described.__init__ if is_class else described)


def check_type(option: str, value: object, kind: Any) -> None:
    """Raise `Mistake` unless a value is what an annotation says, of a file's content too."""
    if not _is_a(value, kind):
        raise Mistake(option, f"{shown(value)} must be {_in_words(kind)}.")


def _in_words(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(kind)))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (dict, list, tuple):
        container = "dictionary" if get_origin(kind) is dict else "list"
        return f"a {container} of {_in_words(get_args(kind)[container == 'dictionary'])}"
    words = {
        Any: "anything",
        int: "a whole number",
        float: "a number",
        str: "a text",
        type(None): "null",
    }
    return words.get(kind) or (kind.__name__ if inspect.isclass(kind) else str(kind))


def _is_a(value: object, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple and isinstance(value, tuple):
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(parts) and all(map(_is_a, value, parts))
    if origin is list and isinstance(value, list):
        return all(_is_a(each, parts[0]) for each in value)
    if origin is dict and isinstance(value, dict):
        return all(_is_a(k, parts[0]) and _is_a(v, parts[1]) for k, v in value.items())
    if kind in (int, float):
        is_number = isinstance(value, Integral if kind is int else Real)
        return is_number and not isinstance(value, bool) and abs(value) < MOST
    return kind is Any or (inspect.isclass(kind) and isinstance(value, kind))


def shown(value: object) -> str:
    """A value in a few words, however large or nested it is."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__}"


def check_choice(option: str, value: object, accepted: Collection[object]) -> None:
    """Raise `Mistake` unless a value is accepted."""
    if value not in accepted:
        raise Mistake(option, f"{shown(value)} is not one of {', '.join(map(str, accepted))}.")


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
