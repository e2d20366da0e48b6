"""Losses of tiny trainings, to compare with those recorded in `tests/data/golden/losses.json`.

A change that moves or simplifies code leaves them equal to the last bit. A change that is meant to
train otherwise records them anew, and says so in its commit::

    PYTHONPATH=. python tests/support/golden.py

`tests/data/saved_run` is a run saved when these were recorded, `saved_model.safetensors` its
export and `saved_decode.safetensors` what that decodes. They are never made anew: what users saved
then has to open always. `old_config.yaml` and `old_model.safetensors` are of version 0.1.0, of
latents that are gone.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pid_lightning.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = Path(__file__).parents[1] / "data"
RECORDED = DATA / "golden" / "losses.json"

# Another processor or version of torch rounds sums otherwise. With the instructions of AVX2 and of
# SSE instead of AVX-512, no loss moved by more than 0.0041 of itself.
TOLERANCE = 0.02

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """A quickstart config of the same design whose ten steps take seconds."""
    config["test_after_fit"] = False
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    model["denoiser"] |= {
        "width": 32,
        "num_heads": 2,
        "num_blocks": 2,
        "pixel_width": 4,
        "pixel_attention_width": 16,
        "pixel_num_heads": 2,
        "num_pixel_blocks": 1,
        "refiner_width": 8,
    }
    model["denoiser"]["adapter"] |= {
        "width": 16,
        "num_res_blocks": 1,
        "denoise_width": 8,
        "denoise_blocks": 1,
    }
    # A high rate would let another rounding grow to percents in ten steps.
    model["training"] |= {"learning_rate": 1e-3, "warmup_steps": 2, "decay_steps": 20}
    data |= {"image_size": 64, "batch_size": 2, "shorter_sides": [256]}
    config["trainer"] |= QUIET | {
        "max_steps": 10,
        "precision": "32-true",
        "log_every_n_steps": 1,
        "val_check_interval": 10,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
    }
    callbacks = config["trainer"]["callbacks"]  # all that take part in training
    callbacks[:] = [one for one in callbacks if one not in ("PictureGrids", "DistillationGrids")]
    return config


def quickstart(folder: Path) -> dict[str, list[float]]:
    """Losses of ten steps of the shrunk quickstart, and of its average after them; run in
    `folder`."""
    return _fit(folder, shrink(yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())))


def teacher(folder: Path) -> dict[str, list[float]]:
    """Losses of ten steps of its teacher; `quickstart` has run in `folder`."""
    config = shrink(yaml.safe_load((CONFIGS / "quickstart_teacher.yaml").read_text()))
    config["model"]["init_args"]["init_from"] = str(folder / "quickstart")
    return _fit(folder, config)


def distillation(folder: Path) -> dict[str, list[float]]:
    """Losses of ten turns of its distillation; `teacher` has run in `folder`."""
    config = shrink(yaml.safe_load((CONFIGS / "quickstart_dmd2.yaml").read_text()))
    config["trainer"]["callbacks"][0]["init_args"] |= {
        "teacher": str(folder / "quickstart_teacher"),
        "teacher_dtype": "float32",
        "student_every": 2,
        "taps": [1],
    }
    return _fit(folder, config)


def resumed(folder: Path) -> dict[str, list[float]]:
    """Losses of the two steps after the last of the saved run, resumed from a copy in `folder`."""
    run = folder / "saved_run" / "version_0"
    shutil.copytree(DATA / "saved_run", run)
    place = f"--trainer.logger.init_args.save_dir={folder}"
    main(
        ["fit", f"--config={run}/config.yaml", place, "--ckpt_path=last", "--trainer.max_steps=302"]
    )
    return read_losses(run)


def _fit(folder: Path, config: dict[str, Any]) -> dict[str, list[float]]:
    logger = config["trainer"]["logger"]["init_args"]
    logger["save_dir"] = str(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", f"--config={path}"])
    return read_losses(folder / logger["name"] / "version_0")


def read_losses(run: Path) -> dict[str, list[float]]:
    """The values of every loss in a run's TensorBoard files."""
    events = EventAccumulator(str(run)).Reload()
    names = [name for name in events.Tags()["scalars"] if name.endswith("loss")]
    return {name: [event.value for event in events.Scalars(name)] for name in sorted(names)}


def here() -> dict[str, str]:
    """What decides how sums round."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "torch": torch.__version__,
        "processor": next(names, platform.processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def assert_as_recorded(name: str, losses: dict[str, list[float]]) -> None:
    """Compare with the record: to the last bit where sums round alike, else to `TOLERANCE`."""
    recorded = json.loads(RECORDED.read_text())
    tolerance = 0.0 if recorded["made on"] == here() else TOLERANCE
    then = recorded[name]
    assert losses.keys() == then.keys(), f"{name}: {sorted(losses)}, recorded {sorted(then)}"
    apart = [
        f"{name} {key}: {losses[key]}, recorded {then[key]}"
        for key in then
        if len(losses[key]) != len(then[key])
        or not all(map(partial(math.isclose, rel_tol=tolerance), losses[key], then[key]))
    ]
    assert not apart, "\n".join(apart)


def record() -> None:
    """Write all losses of today's code and this machine."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    losses: dict[str, Any] = {"made on": here()}
    with tempfile.TemporaryDirectory() as folder:
        for run in (quickstart, teacher, distillation, resumed):
            losses[run.__name__] = run(Path(folder))
    RECORDED.write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    record()
