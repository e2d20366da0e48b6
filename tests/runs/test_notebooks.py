"""The notebooks run end to end on tiny runs, and the committed files are complete."""

from __future__ import annotations

import csv
import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import papermill
import pytest

from pid_lightning.__main__ import main

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST_BYTES = 3_000_000
SIGMAS = [0.0, 0.4, 0.8]
STEPS = [1, 2]
STOPS, NUM_STEPS = [2, 4], 6

TINY = [
    "--data.image_size=128",
    "--data.batch_size=2",
    "--model.denoiser.width=32",
    "--model.denoiser.num_heads=2",
    "--model.denoiser.num_blocks=2",
    "--model.denoiser.pixel_width=4",
    "--model.denoiser.pixel_attention_width=16",
    "--model.denoiser.pixel_num_heads=2",
    "--model.denoiser.num_pixel_blocks=1",
    "--model.denoiser.adapter.width=16",
    "--model.denoiser.adapter.num_res_blocks=1",
    "--model.training.warmup_steps=0",
    "--model.training.learning_rate=0.03",
    "--trainer.max_steps=4",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
TINY_ENCODERS = {
    "vae": [],
    "dinov2": ["--model.model=vit_small_patch14_dinov2"],
    "siglip": ["--model.model=vit_tiny_patch16_224"],
}


def tiny_fit(family: str, *arguments: str) -> list[str]:
    """Arguments for `fit` with a family's config at a tiny size."""
    config = f"--config={ROOT / 'configs' / f'compare_{family}.yaml'}"
    return ["fit", config, *TINY, *TINY_ENCODERS[family], *arguments]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: the three families at 4x, and the autoencoder at 8x."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pid"])
        for family in TINY_ENCODERS:
            main(tiny_fit(family))
        main(tiny_fit("vae", "--model.scale=8", "--trainer.logger.name=compare_vae_8x"))
    return folder / "runs"


def execute(name: str, folder: Path, parameters: dict[str, Any]) -> tuple[dict[str, list], str]:
    """Execute a notebook; return its tables in `folder` by name, and its printed output."""
    parameters = parameters | {"device": "cpu", "tables_folder": str(folder)}
    done = papermill.execute_notebook(
        ROOT / "notebooks" / name,
        folder / name,
        parameters=parameters,
        cwd=folder,
        kernel_name="python3",
        progress_bar=False,
    )
    assert (folder / name).stat().st_size < LARGEST_BYTES
    outputs = [output for cell in done.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    tables = {}
    for file in folder.glob("*.csv"):
        with file.open(encoding="utf-8") as lines:
            tables[file.stem] = list(csv.DictReader(lines))
    return tables, printed


def assert_finite(rows: list[dict[str, str]], *columns: str) -> None:
    for row, column in product(rows, columns):
        assert math.isfinite(float(row[column])), (column, row)


def keys(rows: list[dict[str, str]], *columns: str) -> list[tuple[str | float, ...]]:
    """The values of the key columns, sorted, with numeric columns as floats."""
    numbers = ("latent_sigma", "steps", "step")
    return sorted(tuple(float(r[c]) if c in numbers else r[c] for c in columns) for r in rows)


@pytest.mark.slow
def test_compare_latent_families(runs: Path, tmp_path: Path) -> None:
    labels = {
        "VAE 4x": "compare_vae",
        "DINOv2 4x": "compare_dinov2",
        "SigLIP 4x": "compare_siglip",
        "VAE 8x": "compare_vae_8x",
        "SigLIP 8x": "compare_siglip_8x",  # does not exist
    }
    tables, printed = execute(
        "compare_latent_families.ipynb",
        tmp_path,
        {
            "runs": {label: str(runs / name) for label, name in labels.items()},
            "num_photographs": 1,
            "image_size": 128,
            "latent_sigmas": SIGMAS,
            "sigmas_shown": SIGMAS[:2],
            "steps": 1,
            "steps_compared": STEPS,
        },
    )
    assert (
        f"SigLIP 8x is left out: there is no run in {runs / 'compare_siglip_8x'}, `pid fit "
        "--config configs/compare_siglip.yaml --model.scale 8 --data.image_size 256 "
        "--data.batch_size 4 --trainer.logger.name compare_siglip_8x` makes it." in printed
    )
    made = [label for label in labels if label != "SigLIP 8x"]
    methods = [(label, "PiD") for label in made]
    methods += [(label, "native + bicubic") for label in made if label.startswith("VAE")]
    expected = sorted((*method, sigma) for method in methods for sigma in SIGMAS)
    assert keys(tables["quality"], "run", "method", "latent_sigma") == expected
    assert_finite(tables["quality"], "psnr", "ssim", "consistency", "seconds", "peak_mebibytes")
    by_pid = [row["psnr"] for row in tables["quality"] if row["method"] == "PiD"]
    assert len(set(by_pid)) == len(by_pid)  # every row is a separate decode

    shown = [SIGMAS[0], SIGMAS[1]]
    assert keys(tables["steps"], "run", "latent_sigma", "steps") == sorted(
        product(made, shown, STEPS)
    )
    assert_finite(tables["steps"], "psnr", "ssim", "seconds")

    # After a few steps the gates are still close to their initial formula.
    gates = tables["gates"]
    assert keys(gates, "run", "gate", "latent_sigma") == sorted(
        product(made, ["block 1", "pixel blocks"], SIGMAS)
    )
    for row in gates:
        opening = 1 / (1 + math.exp(5 * float(row["latent_sigma"]) - 2))
        assert float(row["opening"]) == pytest.approx(opening, abs=0.15)

    assert keys(tables["costs"], "run", "method") == sorted(methods)
    assert_finite([r for r in tables["costs"] if r["method"] == "PiD"], "estimate_mebibytes")

    # Every figure's title marks encoders with random weights.
    notebook = json.loads((tmp_path / "compare_latent_families.ipynb").read_text())
    drawn = [
        cell
        for cell in notebook["cells"]
        if any("image/jpeg" in output.get("data", {}) for output in cell.get("outputs", ()))
    ]
    assert len(drawn) == 5
    for cell in drawn:
        source = "".join(cell["source"])
        assert "caveat" in source or "panels(" in source


@pytest.mark.slow
def test_decode_and_early_stop(runs: Path, tmp_path: Path) -> None:
    tables, _ = execute(
        "decode_and_early_stop.ipynb",
        tmp_path,
        {
            "model": str(runs / "compare_vae/version_0/checkpoints/last.ckpt"),
            "steps": 1,
            "side": 128,
            "wide": [128, 192],
            "latent_sigmas": SIGMAS[:2],
            "sides_estimated": [128, 256],
            "num_steps": NUM_STEPS,
            "stops": STOPS,
            "diffusion_side": 128,
        },
    )
    methods = ["PiD", "native + bicubic"]
    quality = tables["quality"]
    assert keys(quality, "method", "latent_sigma") == sorted(product(methods, SIGMAS[:2]))
    assert_finite(quality, "psnr", "ssim", "seconds")

    stopped = tables["stopped"]
    schedulers = ["SDXL Euler", "flow matching"]
    assert keys(stopped, "scheduler", "step", "method") == sorted(
        product(schedulers, [*STOPS, NUM_STEPS], methods)
    )
    assert_finite(stopped, "psnr", "ssim", "seconds")
    native = [row for row in stopped if row["method"] == "native + bicubic"]
    for scheduler in schedulers:
        rows = sorted(
            (row for row in native if row["scheduler"] == scheduler), key=lambda r: int(r["step"])
        )
        sigmas = [float(row["latent_sigma"]) for row in rows]
        assert sigmas == sorted(sigmas, reverse=True)
        assert 1 > sigmas[0] > sigmas[-2] > sigmas[-1] == 0.0
        # The finished loop arrives at a photograph; natively decoded, remaining noise lowers PSNR.
        psnr = [float(row["psnr"]) for row in rows]
        assert psnr == sorted(psnr)
        assert psnr[-1] > 15
    smaller = [row for row in tables["estimates"] if row["side"] == "128"]
    larger = [row for row in tables["estimates"] if row["side"] == "256"]
    whole = [float(r["estimated MiB"]) for r in (*smaller, *larger) if r["way"] == "whole"]
    assert 0 < whole[0] < whole[1]


def test_both_are_here() -> None:
    assert [n.stem for n in NOTEBOOKS] == ["compare_latent_families", "decode_and_early_stop"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_whole(notebook: Path) -> None:
    """Small, without errors, executed in order or not at all, with a parameters cell first."""
    assert notebook.stat().st_size < LARGEST_BYTES
    text = notebook.read_text(encoding="utf-8")
    assert str(ROOT) not in text  # a local path
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    counts = [cell["execution_count"] for cell in code]
    assert counts in ([None] * len(code), list(range(1, len(code) + 1)))
    assert [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])] == code[:1]
