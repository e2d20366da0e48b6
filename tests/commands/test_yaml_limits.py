"""YAML of strangers ends in a sentence, soon, and all other YAML is what jsonargparse reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse._loaders_dumpers import yaml_load

from pid_lightning.checks import Mistake
from pid_lightning.commands.yaml_limits import load

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def bomb(levels: int, width: int = 10) -> str:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(9),
        bomb(6, 100),
        f"model: {{scale: {'9' * 5000}}}",
        f"model: {'[' * 500}{']' * 500}",
        f"model: {'[' * 100_000}",
        "".join(f"{' ' * i}a{i}:\n" for i in range(500)),
        "a: &a [" + "x, " * 100 + "*a]",
    ],
    ids=["bomb", "wide bomb", "number", "lists", "open lists", "mappings", "itself"],
)
def test_yaml_beyond_the_limits_is_refused(text: str) -> None:
    with pytest.raises(Mistake):
        load(text)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_read_as_ever(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert load(text) == yaml_load(text)
    assert load(bomb(3)) == yaml_load(bomb(3))
