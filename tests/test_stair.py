"""The house's law: imports go down the stair, and each room imports only the libraries it may."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pid_lightning

PACKAGE = Path(pid_lightning.__file__).parent
STAIR = (  # from the top to the foot; a room imports from rooms below its own floor
    ("__main__",),
    ("commands",),
    ("training",),
    ("decoding",),
    ("pictures", "encoders"),
    ("files",),
    ("nn",),
    ("diffusion",),
    ("checks",),
)
FLOOR = {room: height for height, rooms in enumerate(reversed(STAIR)) for room in rooms}
METHOD = {"torch", "triton", "einops", "pid_lightning"} | set(sys.stdlib_module_names)
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
LAZY = ("timm", "open_clip", "transformers", "datasets", "diffusers", "torchmetrics")
HEAVY = (*LIGHTNING, *LAZY, "jsonargparse", "tensorboard")
FILES = {
    ".".join(("pid_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# Imports the modules one by one; prints the heavy imports of each and fails on any CUDA call.
PROBE = """
import importlib, json, sys
import torch

def forbidden(*arguments, **options):
    raise RuntimeError("CUDA was called at import")

for name in ("_lazy_init", "is_available", "device_count", "current_device"):
    setattr(torch.cuda, name, forbidden)
modules, heavy = json.loads(sys.argv[1])
state, imports = torch.get_rng_state(), {}
for module in modules:
    importlib.import_module(module)
    imports[module] = sorted(name for name in heavy if name in sys.modules)
assert torch.equal(torch.get_rng_state(), state), "a global seed was set"
print(json.dumps(imports))
"""


def room_of(module: str) -> str:
    package, *rooms = module.split(".")
    return rooms[0] if package == "pid_lightning" and rooms else ""


def imported(node: ast.AST) -> list[str]:
    """The full names in an import statement, of modules where there are such."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in FILES else node.module for name in names]
    return []


def all_imports(module: str) -> set[str]:
    """Everything that a module imports, within functions and for type checking too."""
    return {name for node in ast.walk(TREES[module]) for name in imported(node)}


def imports_at_start(module: str) -> set[str]:
    """What is imported with a module: not within functions, not for type checking."""
    found, waiting = set(), list(TREES[module].body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        found.update(imported(node))
        waiting += ast.iter_child_nodes(node)
    return found


def test_every_module_lives_in_a_room() -> None:
    assert {room_of(module) for module in FILES} - {""} == set(FLOOR)


def test_imports_go_down_the_stair() -> None:
    upward = [
        f"{module} -> {name}"
        for module in FILES
        for name in all_imports(module)
        if room_of(module) and room_of(name) in FLOOR and room_of(name) != room_of(module)
        if FLOOR[room_of(name)] >= FLOOR[room_of(module)]
    ]
    assert upward == []


def test_no_imports_in_a_circle() -> None:
    graph = {module: all_imports(module) & FILES.keys() - {module} for module in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("libraries", "rooms"),
    [(LIGHTNING, {"training", "commands"}), (("jsonargparse",), {"commands"})],
)
def test_libraries_of_the_upper_rooms(libraries: tuple[str, ...], rooms: set[str]) -> None:
    users = {
        module
        for module in FILES
        if any(name.split(".")[0] in libraries for name in all_imports(module))
    }
    assert users
    assert {room_of(module) for module in users} <= rooms


def test_the_method_imports_torch_and_einops_only() -> None:
    for module in FILES:
        if room_of(module) in ("nn", "diffusion"):
            roots = {name.split(".")[0] for name in imports_at_start(module)}
            assert roots <= METHOD, module


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for module in FILES:
        assert {name.split(".")[0] for name in imports_at_start(module)}.isdisjoint(LAZY), module


def test_lower_rooms_import_nothing_heavy_and_call_no_gpu() -> None:
    lower = [module for module in FILES if FLOOR.get(room_of(module), 0) <= FLOOR["decoding"]]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([lower, HEAVY])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imports = json.loads(done.stdout.splitlines()[-1])
    assert {module: names for module, names in imports.items() if names} == {}


def test_the_public_names_are_there() -> None:
    for name in pid_lightning.__all__:
        assert getattr(pid_lightning, name) is not None
    assert set(pid_lightning.__all__) <= set(dir(pid_lightning))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pid_lightning.no_such_name


def test_no_source_names_cuda_by_method_or_seeds_the_world() -> None:
    """`.cuda()` fixes the device; `torch.manual_seed` changes the global random state."""
    for module, tree in TREES.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            called = ast.unparse(node.func)
            assert not called.endswith(".cuda"), (module, called)
            assert called not in ("torch.manual_seed", "torch.random.manual_seed"), (module, called)
