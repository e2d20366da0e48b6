"""Import rules: the plain torch modules do not import Lightning, and imports stay light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pid_lightning

PACKAGE = Path(pid_lightning.__file__).parent
HEAVY = (
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "jsonargparse",
    "timm",
    "open_clip",
    "transformers",
    "datasets",
    "diffusers",
    "torchmetrics",
    "tensorboard",
)
PLAIN_TORCH = (
    "flow",
    "noising",
    "losses",
    "sampling",
    "randomness",
    "nn",
    "released",
    "decoding",
    "weights",
    "encoders",
    "latent_spaces",
    "decoder",
    "decode_files",
    "diffusers_vae",
    "early_stop",
    *("bench/baseline", "bench/estimate", "bench/measure", "bench/networks", "bench/work"),
)
LAZY = ("timm", "open_clip", "transformers", "datasets", "diffusers", "torchmetrics")
# Modules that the method's files may import at the top level; others only inside functions.
# torch brings triton on Linux, and `nn/attention_kernel.py` is used nowhere else.
METHOD = {"torch", "triton", "einops", "pid_lightning"} | set(sys.stdlib_module_names)

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


def heavy_imports(modules: list[str]) -> dict[str, list[str]]:
    arguments = json.dumps([modules, HEAVY])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_plain_torch_modules_import_nothing_heavy() -> None:
    names = (name.replace("/", ".") for name in PLAIN_TORCH)
    imports = heavy_imports(["pid_lightning", *(f"pid_lightning.{name}" for name in names)])
    assert {module: names for module, names in imports.items() if names} == {}


def test_the_public_names_are_there() -> None:
    for name in pid_lightning.__all__:
        assert getattr(pid_lightning, name) is not None
    assert set(pid_lightning.__all__) <= set(dir(pid_lightning))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pid_lightning.no_such_name


# ------------------------------------------------------------------- static checks


def sources(*modules: str) -> list[Path]:
    found = []
    for module in modules:
        folder = PACKAGE / module
        found += sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """The full names of the modules in an import statement."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def head(tree: ast.Module) -> list[ast.AST]:
    """Statements that run at import, except those under TYPE_CHECKING."""
    found, waiting = [], list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        found.append(node)
        waiting += ast.iter_child_nodes(node)
    return found


def test_plain_torch_modules_never_import_lightning() -> None:
    forbidden = ("lightning", "pytorch_lightning", "lightning_fabric")
    above = tuple(f"pid_lightning.{module}" for module in ("modules", "callbacks", "cli"))
    for path in sources(*PLAIN_TORCH):
        for name in (n for node in ast.walk(parsed(path)) for n in imported(node)):
            assert name.split(".")[0] not in forbidden, (path, name)
            assert not name.startswith(above), (path, name)


def test_the_method_needs_torch_and_einops_only() -> None:
    for path in sources("flow", "noising", "losses", "sampling", "randomness", "nn"):
        for name in (n for node in head(parsed(path)) for n in imported(node)):
            assert name.split(".")[0] in METHOD, (path, name)


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for path in sources("."):
        for name in (n for node in head(parsed(path)) for n in imported(node)):
            assert name.split(".")[0] not in LAZY, (path, name)


def test_no_source_names_cuda_by_method_or_seeds_the_world() -> None:
    """`.cuda()` fixes the device; `torch.manual_seed` changes the global random state."""
    for path in sources("."):
        for node in (n for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)):
            called = ast.unparse(node.func)
            assert not called.endswith(".cuda"), (path, called)
            assert called not in ("torch.manual_seed", "torch.random.manual_seed"), (path, called)
