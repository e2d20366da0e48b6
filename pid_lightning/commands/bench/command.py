"""`pid bench`: rows of figures, as a table and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch

from pid_lightning import __version__
from pid_lightning.commands.bench import estimate, measure, networks
from pid_lightning.commands.bench.settings import LEARNING, BenchSettings, read_settings
from pid_lightning.commands.bench.work import Mode, Work, weights_dtype
from pid_lightning.commands.decode_files import find_device
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files.atomic import replaced_file
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn.fixed_times import fix_times
from pid_lightning.pictures.metrics import align
from pid_lightning.training.sample import Sample

Row = dict[str, Any]


def bench(arguments: Sequence[str]) -> None:
    """Print the table, and write the JSON file if requested."""
    settings = read_settings(arguments)
    device = find_device(settings.device)
    info = networks.NETWORKS[settings.network]
    empty = networks.build_meta(info)
    for size in settings.sizes:
        empty.check_size(size, size)
    details = {
        "network": settings.network,
        "parameters": sum(p.numel() for p in empty.parameters()),
        "versions": {"torch": torch.__version__, "pid_lightning": __version__},
    }
    if settings.estimate:
        rows = estimate_rows(settings, info)
    else:
        rates = {}
        for dtype in settings.dtype:
            rates[dtype] = measure.measure_rate(device, getattr(torch, dtype))
            print(f"{dtype}: {rates[dtype] / 1e12:.3g} TFLOP/s for a matmul")
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        machine = {"gpu": gpu, "threads": torch.get_num_threads(), "flops_per_second": rates}
        details |= {"machine": machine}
        rows = measure_rows(settings, info, device, rates)
    gathered = []
    for row in rows:
        gathered.append(row)
        if settings.json is not None:  # each row: the next may run out of memory
            with replaced_file(settings.json) as part:
                part.write_text(json.dumps(details | {"rows": gathered}, indent=1) + "\n", "utf-8")
    print(format_table(gathered))


def estimate_rows(settings: BenchSettings, info: ModelInfo) -> Iterator[Row]:
    """Rows of estimated memory and operations."""
    for name, dtype in product(settings.work, settings.dtype):
        mode = modes_of(settings, name)[0]
        for size, batch_size in product(settings.sizes, settings.batch_size):
            row = announce(name, size, batch_size, dtype)
            work = (name, info, size, batch_size)
            flops = estimate.count_flops(*work)
            for call, peaks in estimate.estimate_peaks(*work, getattr(torch, dtype), mode).items():
                gflop = flops[call] / 1e9
                yield row | {"work": call, "mode": str(mode), "gflop": gflop} | peaks


def measure_rows(
    settings: BenchSettings, info: ModelInfo, device: torch.device, rates: dict[str, float]
) -> Iterator[Row]:
    """Rows of measured time and memory; `rates` are operations per second by dtype."""
    for name, dtype in product(settings.work, settings.dtype):
        works: dict[str, Work] = {}
        for size, batch_size in product(settings.sizes, settings.batch_size):
            row = announce(name, size, batch_size, dtype)
            try:
                works = works or _open(settings, name, info, getattr(torch, dtype), device)
                sample = networks.random_sample(info, size, batch_size, device)
                flops = estimate.count_flops(name, info, size, batch_size)
                for figures in _measure_batch(settings, works, sample, device):
                    num, seconds = flops[figures["work"]], figures["seconds"]
                    share = num / rates[dtype] / seconds
                    yield row | figures | {"gflop": num / 1e9, "floor_share": share}
            except torch.OutOfMemoryError:
                print("  out of memory: no rows of this size", file=sys.stderr, flush=True)
        del works  # free memory before the next networks are built


def _open(
    settings: BenchSettings, name: str, info: ModelInfo, dtype: torch.dtype, device: torch.device
) -> dict[str, Work]:
    """The work on the network as it is, and perhaps on its plain transcription."""
    sources = networks.build(info, settings.baseline)
    kept = weights_dtype(name, dtype)
    works = {way: Work.of(name, x.to(device, kept), info, dtype) for way, x in sources.items()}
    if name == "decode":  # as `pid decode` does
        fix_times(works["eager"].denoiser, info.student_times or STUDENT_TIMES)
    return works


def _measure_batch(
    settings: BenchSettings, works: dict[str, Work], sample: Sample, device: torch.device
) -> Iterator[Row]:
    name = works["eager"].name
    torch.compiler.reset()  # every size recompiles, and torch limits their number
    modes = {
        mode: works["plain" if mode.way == "plain" else "eager"].in_mode(mode)
        for mode in modes_of(settings, name)
    }
    exact = None
    if settings.check and name == "forward":
        exact = measure.exact_velocity(works["eager"].denoiser, sample)
    figures = measure.measure(modes, sample, device, settings.repeat)
    for (call, mode), row in figures.items():
        plain = figures.get((call, Mode("plain")))
        row["of_plain"] = None if plain is None else row["seconds"] / plain["seconds"]
        if exact is not None:
            row["error"] = measure.relative_error(modes[mode].calls(sample)[call](), exact)
        yield {"work": call, "mode": str(mode), **row}


def modes_of(settings: BenchSettings, name: str) -> list[Mode]:
    """The modes of one kind of work, in the order of their turns."""
    recomputes = settings.activation_checkpointing and name in LEARNING
    modes = [Mode("eager", recomputes)]
    modes += [Mode("compiled", recomputes)] if settings.compile else []
    return modes + ([Mode("plain")] if settings.baseline else [])


def announce(name: str, size: int, batch_size: int, dtype: str) -> Row:
    """Say what comes next; returns the first columns of its rows."""
    print(f"{name}, {size} x {size}, batch {batch_size}, {dtype} ...", file=sys.stderr, flush=True)
    return {"work": name, "size": size, "batch": batch_size, "dtype": dtype}


def format_table(rows: Sequence[Row]) -> str:
    """Aligned plain text; columns that no row fills are left out."""
    shown = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    lines = [[key.replace("_", " ") for key in shown]]
    for row in rows:
        values = ["-" if row.get(key) is None else row[key] for key in shown]
        lines.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    return align(lines)
