"""Limits of the YAML that is read, so that no file takes all memory or ends in a traceback."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import set_loader
from jsonargparse._loaders_dumpers import yaml_load

from pid_lightning.checks import Mistake

MOST_VALUES = 100_000  # with every alias written out
DEEPEST = 100
LONGEST_NUMBER = 100


def limit_yaml() -> None:
    """Have jsonargparse refuse YAML beyond the limits."""
    set_loader("yaml", load, (yaml.YAMLError,))


def load(text: str) -> Any:
    """What jsonargparse's own loader makes of YAML.

    Raises:
        Mistake: it nests too deeply, names too many values by aliases, or holds an endless number.
    """
    try:
        _measure(yaml.compose(text, Loader=yaml.SafeLoader), {}, 0)
    except yaml.YAMLError:
        pass  # told by the loader
    except RecursionError:
        raise Mistake("config", _told("nests too deeply")) from None
    return yaml_load(text)


def _measure(node: yaml.Node | None, known: dict[int, int], depth: int) -> int:
    """The number of values under a node with every alias written out."""
    if depth > DEEPEST:
        raise Mistake("config", _told("nests too deeply"))
    if node is None or id(node) in known:
        return 1 if node is None else known[id(node)]
    if isinstance(node, yaml.ScalarNode):
        number = node.value.replace("_", "").lstrip("+-")
        if len(number) > LONGEST_NUMBER and number.isdigit():
            raise Mistake("config", _told(f"holds a number of {len(number)} digits"))
        return 1
    inner = [part for one in node.value for part in (one if isinstance(one, tuple) else (one,))]
    known[id(node)] = MOST_VALUES + 1  # an alias of what it stands in
    known[id(node)] = 1 + sum(_measure(part, known, depth + 1) for part in inner)
    if known[id(node)] > MOST_VALUES:
        raise Mistake("config", _told(f"stands for over {MOST_VALUES:,} values by its aliases"))
    return known[id(node)]


def _told(fault: str) -> str:
    return f"this YAML {fault}; a config has a few dozen lines, so give another file."
