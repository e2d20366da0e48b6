"""Parsers of the commands, and the one sentence in which a user's mistake is told."""

from __future__ import annotations

import re
import textwrap
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, auto_cli

from pid_lightning.checks import Mistake, one_line
from pid_lightning.commands.yaml_limits import limit_yaml

KEY = re.compile(r'Parser key "([^"]*)":')
TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\]")
HEADINGS = ("Does not validate against", "Subtypes:", "Errors:", "Given value type:")


class CommandParser(ArgumentParser):
    """A parser that takes no abbreviated option, and turns what is False by default into a
    switch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        limit_yaml()
        super().__init__(*args, exit_on_error=False, allow_abbrev=False, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """As its base class, but for switches."""
        if kwargs.get("type") is bool and kwargs.get("default") is False:
            kwargs = {"action": "store_true", "help": kwargs.get("help")}
        return super().add_argument(*args, **kwargs)


def run(function: Callable[..., None], command: str, arguments: Sequence[str]) -> None:
    """Call a function with options that its signature and docstring describe."""
    auto_cli(function, list(arguments), prog=f"pid {command}", parser_class=CommandParser)


def make_parser(command: str, description: str) -> ArgumentParser:
    """A parser for the options of a command."""
    return CommandParser(prog=f"pid {command}", description=description)


def sentence(error: BaseException) -> str | None:
    """What a user is told of an error: of a `Mistake`, of an OSError of this machine, of what the
    parser refuses, also where another error was raised from it. None is a bug."""
    cause = find_cause(error, Mistake, OSError)
    if cause is None and isinstance(error, ArgumentError):
        return parser_sentence(str(error))
    return None if cause is None else one_line(str(cause))


def find_cause(error: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """The first of an error and its causes that is of one of some kinds."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error


def parser_sentence(message: str) -> str:
    """One sentence of jsonargparse's message, often a paragraph about every type that a value could
    have had: the option, what it accepts, and the value that was given."""
    option = ".".join(dict.fromkeys(KEY.findall(message)))
    if not option:
        return textwrap.shorten(message, 300)
    name = message.partition("dot import path string: ")[2].partition("\n")[0]
    if name:
        return (
            f"{option}: {name!r} is no class for it; check its spelling, or give its import path, "
            "as in package.module.Class."
        )
    if "is abstract" in message:
        name = message.partition("NestedArg(key='")[2].partition("'")[0]
        return (
            f"{option}: no class is set that takes {name}; set one first, as in --{option} CLASS."
        )
    text = TYPE.sub(r"\1\2", KEY.sub("", message)).replace("NoneType", "null")
    lines = [line.lstrip(" -") for line in text.replace(". Got value", "\nGiven value").split("\n")]
    lines = [line for line in lines if line and not line.startswith(HEADINGS)]
    # Of an argument of a class, the errors and the value come before those of the class.
    end = next((i for i, line in enumerate(lines) if line.startswith("Given value: ")), len(lines))
    accepted = [line for line in lines[:end] if line.startswith("Expected ")]
    told = [f"{option}:"]
    for line in lines[:end]:
        if line not in accepted:
            told.append(line.replace("Problem with given class_path", "in"))
            if not line.endswith(":"):
                return " ".join(told)
    types = " or ".join(line.removeprefix("Expected ").removeprefix("a ") for line in accepted)
    value = "".join(lines[end : end + 1]).removeprefix("Given value: ")
    return f"{' '.join(told)} expected {types}, not {value!r}."
