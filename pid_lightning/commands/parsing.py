"""User errors end in one sentence and exit status 2; bugs keep their traceback."""

from __future__ import annotations

import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jsonargparse import ArgumentParser

PACKAGE = Path(__file__).parents[1]


@contextmanager
def exit_on_mistake() -> Iterator[None]:
    """Turn errors of the parser and those that this package raised on purpose into one sentence and
    exit status 2."""
    try:
        yield
    except (ArgumentError, ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, ArgumentError):
            error = parser_sentence(str(error))
        elif raised_here(error) is not error:
            raise
        print(f"pid: {error}", file=sys.stderr)
        sys.exit(2)


def raised_here(error: BaseException | None) -> BaseException | None:
    """The first of an error and its causes that this package's code raised on purpose."""
    while error is not None:
        if raised_in(error, PACKAGE) and (isinstance(error, OSError) or _by_statement(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def raised_in(error: BaseException, package: Path) -> bool:
    """Whether an error was raised directly in the code under a package's folder."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and package in Path(frames[-1].filename).parents


def _by_statement(error: BaseException) -> bool:
    """Whether a `raise` raised it: a builtin, which has no frame of its own, fails by a bug."""
    return (traceback.extract_tb(error.__traceback__)[-1].line or "").startswith("raise ")


def parser_sentence(message: str) -> str:
    """Condense jsonargparse's multi-line message to one sentence.

    Args:
        message: lists an error for each type that a value could have had.
    """
    option = re.match(r'Parser key "([^"]*)"', message)
    if "Problem with given class_path" in message:  # of an argument inside of it
        option = None
    unknown = re.search(r"Expected a dot import path string: (\S+)", message)
    if option and unknown:
        return (
            f"{option[1]}: there is no class {unknown[1]!r}; check its spelling, or give its "
            "import path, as in package.module.Class."
        )
    nested = re.search(r"(?s)is abstract.*NestedArg\(key='(\w+)'", message)
    if option and nested:
        return (
            f"{option[1]}.{nested[1]}: no class is set that takes it; name one first, as in "
            f"--{option[1]} CLASS."
        )
    noise = (
        r"(- )?(Does not validate|Subtypes:|Errors:|Subclass types|a class path|a dict|"
        r"Given value type)"
    )
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("NoneType", "null")
    message = re.sub(r"(a )?typing\.Literal\[(.*?)\]", r"one of \2", message)
    message = re.sub(r'Parser key "([^"]*)":', r"\1:", message)
    lines = [line.strip() for line in message.splitlines()]
    lines = [line for line in lines if line and not re.match(noise, line)]
    kept = [line for line in lines if not line.startswith(("- Expected ", "Given value"))]
    if len(kept) < 2:  # the expectation is all there is
        kept = lines
    told = " ".join(kept).replace(": - ", ": ").replace(" - ", "; ")
    told = re.sub("; Expected (a )?", " or ", told)
    return re.sub(r"(\.)? (Given|Got) value: ", ", not ", told)


def make_parser(command: str, description: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"pid {command}", description=description, exit_on_error=False, allow_abbrev=False
    )
