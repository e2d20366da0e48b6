"""Result rows as a terminal table and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pid_lightning import __version__
from pid_lightning.files.atomic import replaced_file
from pid_lightning.pictures.metrics import align

Row = dict[str, Any]

# (row key, column heading, value format)
COLUMNS = (
    ("work", "work", "{}"),
    ("size", "size", "{}"),
    ("batch_size", "batch", "{}"),
    ("dtype", "dtype", "{}"),
    ("mode", "mode", "{}"),
    ("seconds", "seconds", "{:.4g}"),
    ("ratio_to_plain", "of plain", "{:.3f}"),
    ("gflop", "GFLOP", "{:.4g}"),
    ("floor_seconds", "floor s", "{:.3g}"),
    ("floor_share", "floor share", "{:.1%}"),
    ("held_mebibytes", "held MiB", "{:.0f}"),
    ("peak_mebibytes", "peak MiB", "{:.0f}"),
    ("first_seconds", "first s", "{:.3g}"),
    ("relative_error", "error", "{:.1e}"),
    ("psnr", "PSNR dB", "{:.1f}"),
)


def format_table(rows: Sequence[Row]) -> str:
    """Aligned plain text; columns that no row fills are left out."""
    shown = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    lines = [[heading for _, heading, _ in shown]]
    for row in rows:
        values = [(row.get(key), form) for key, _, form in shown]
        lines.append(["-" if value is None else form.format(value) for value, form in values])
    return align(lines)


def describe_machine(device: torch.device, rates: Mapping[str, Any]) -> dict[str, Any]:
    """The machine, its rates and the versions behind the results."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "rates": dict(rates),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # attention's kernels depend on it
        "pid_lightning": __version__,
    }


def write_json(path: str | Path, rows: Sequence[Row], **details: Any) -> None:
    """Write the rows and `details` about them atomically.

    Raises:
        OSError: the file cannot be written.
    """
    with replaced_file(path) as part:
        part.write_text(json.dumps({**details, "rows": list(rows)}, indent=1) + "\n", "utf-8")
