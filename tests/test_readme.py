"""The README and its pages say what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
TEXT = "\n".join(PAGES.values())


def test_the_tour_names_every_room() -> None:
    tour = re.search(r"```\npid_lightning/\n.*?```", README, re.DOTALL)[0]
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "pid_lightning").iterdir()}
    named = set(re.findall(r"^  ([\w.]+/?)  ", tour, re.MULTILINE))
    assert named == {name for name in there if not name.startswith("__")} - {"py.typed"}


def test_named_configs_exist() -> None:
    for name in re.findall(r"`((?:vae|siglip|dinov2|quickstart)\w*)`", TEXT):
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), name
    for path in re.findall(r"configs/(\w+\.yaml)", TEXT):
        assert (ROOT / "configs" / path).is_file(), path


def test_every_config_is_named() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.stem}`" in TEXT, path.stem


def test_what_python_examples_import_exists() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for example in examples for line in example.splitlines()]
    imports = [line for line in lines if line.startswith(("from", "import"))]
    assert len(imports) >= 2
    exec("\n".join(imports), {})


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)[)#]", text):
            assert target.startswith("https:") or (page.parent / target).exists(), (page, target)
