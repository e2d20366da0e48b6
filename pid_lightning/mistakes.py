"""User errors end in one sentence and exit status 2; bugs keep their traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parent


def check_choice(name: str, value: str, accepted: Collection[str]) -> None:
    """Raise ValueError unless the option `name` has an accepted value."""
    if value not in accepted:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(accepted)}.")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError if the option `name` is below its least value."""
    if value < least:
        raise ValueError(f"{name}: {value} must be at least {least}.")


@contextmanager
def exit_on_mistake() -> Iterator[None]:
    """Turn errors that this package raised on purpose into their sentence and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if raised_here(error) is not error:
            raise
        print(f"pid: {error}", file=sys.stderr)
        sys.exit(2)


def raised_here(error: BaseException | None) -> BaseException | None:
    """The first of an error and its causes that was raised directly in this package's code."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and PACKAGE in Path(frames[-1].filename).parents:
            return error
        error = error.__cause__ or error.__context__
    return None
