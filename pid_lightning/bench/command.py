"""`pid bench`: parses and checks its arguments, then measures and prints rows."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pid_lightning.bench import ATTENTION, LEARNING, WAYS, WORK
from pid_lightning.files import make_folder
from pid_lightning.mistakes import check_at_least

# torch is imported after the arguments are checked, so that --help and errors are fast.
if TYPE_CHECKING:
    import torch

    from pid_lightning.bench.rates import Rates
    from pid_lightning.bench.report import Row
    from pid_lightning.bench.work import Networks, Work
    from pid_lightning.nn import PiD
    from pid_lightning.weights import ModelInfo

NETWORKS = ("full", "full_v15", "small")
RECOMPUTED = " recomputed"  # mode suffix of rows with activation checkpointing
IN_WINDOWS = " in windows"  # mode suffix of rows with windowed attention
INT8 = ("weights", "products")
MEBIBYTE = 2**20


class Parser(argparse.ArgumentParser):
    """Tells mistakes in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError, which `pid` prints."""
        raise ValueError(f"bench: {message}.")


def bench(arguments: Sequence[str]) -> None:
    """Print the table, and write the JSON file if requested.

    Raises:
        ValueError, OSError: an invalid argument, described in one sentence.
    """
    # argparse, because a GPU machine may have little more than torch installed.
    given = parser().parse_args(arguments)
    _check(given)
    import torch

    from pid_lightning.bench import report
    from pid_lightning.bench.networks import build_meta, check_sizes, find
    from pid_lightning.bench.rates import measure_rates
    from pid_lightning.devices import find_device

    device = find_device(None if given.device == "auto" else given.device)
    if given.cuda_graphs and device.type != "cuda":
        raise ValueError("--cuda_graphs: needs a GPU; leave it out on a CPU.")
    denoiser, info = find(given.network, given.model)
    check_sizes(info, given.sizes)
    build_meta(info).attend_in_windows(given.window)  # raises before weights are drawn
    details = {
        "network": given.model or given.network,
        "parameters": sum(p.numel() for p in build_meta(info).parameters()),
    }
    if given.estimate:
        figures = estimate_rows(given, info)
    else:
        rates = {dtype: measure_rates(device, getattr(torch, dtype)) for dtype in given.dtype}
        details["machine"] = report.describe_machine(
            device, {name: vars(rate) for name, rate in rates.items()}
        )
        for name, rate in rates.items():
            print(
                f"{name}: {rate.flops_per_second / 1e12:.3g} TFLOP/s for a matmul, "
                f"{rate.bytes_per_second / 1e9:.3g} GB/s for a copy, torch {torch.__version__}"
            )
        figures = itertools.chain(
            measure_attention(given, info, device, rates),
            measure_rows(given, denoiser, info, device, rates),
        )
    rows = []
    for row in figures:
        rows.append(row)
        if given.json is not None:  # each row: the next may run out of memory
            report.write_json(given.json, rows, **details)
    print(report.format_table(rows))


def parser() -> argparse.ArgumentParser:
    """The options of `pid bench`."""
    made = Parser(
        prog="pid bench",
        allow_abbrev=False,
        description="Measure time and peak memory of a forward pass, a 4-step decode, a training "
        "step and both DMD2 steps, next to the roofline floor: operations and bytes divided by "
        "this machine's measured rates.",
    )
    add = made.add_argument
    add("--network", choices=NETWORKS, default="small", help="Network, with random weights.")
    add(
        "--model",
        help="Model to measure instead, as in pid decode; --baseline uses its sizes.",
    )
    add(
        "--work",
        nargs="+",
        choices=(*WORK, ATTENTION),
        default=list(WORK),
        help="What to measure; attention: one block of each kind, by each torch kernel.",
    )
    add("--sizes", nargs="+", type=int, default=[512], help="Output sides in pixels.")
    add("--batch_size", nargs="+", type=int, default=[1], help="Batch sizes.")
    add(
        "--dtype",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["bfloat16"],
        help="Compute dtype; what is trained stays in float32, under autocast.",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Device to use.")
    add(
        "--activation_checkpointing",
        nargs="+",
        choices=("off", "on"),
        default=["off"],
        help="For train and dmd2: recompute blocks in the backward pass.",
    )
    add("--compile", action="store_true", help="Add rows for the compiled network.")
    add(
        "--freeze",
        action="store_true",
        help="For forward and decode: add rows compiled with the weights as constants.",
    )
    add(
        "--cuda_graphs",
        action="store_true",
        help="For forward and decode on a GPU: add rows compiled and replayed as a CUDA graph.",
    )
    add("--baseline", action="store_true", help="Add rows for tests/plain.py, run in turn.")
    add(
        "--int8",
        nargs="+",
        choices=INT8,
        default=[],
        help="For forward and decode: add rows with 8-bit linear layers (torchao): weights stored "
        "in 8 bits, or products computed in 8 bits too.",
    )
    add(
        "--window",
        type=int,
        help="For forward and decode: add rows with attention in windows of at most this many "
        "pixels a side.",
    )
    add("--repeat", type=int, default=5, help="Timed calls per row; the median is reported.")
    add(
        "--check",
        action="store_true",
        help="Compare forward passes with fp64, and decoded pictures with eager mode.",
    )
    add("--estimate", action="store_true", help="Estimate memory and operations, not time.")
    add("--json", type=Path, help="JSON file for the rows.")
    return made


def _check(given: argparse.Namespace) -> None:
    """Check everything that does not need torch."""
    for name in ("repeat", "batch_size"):
        value = getattr(given, name)
        check_at_least(f"--{name}", min(value) if isinstance(value, list) else value, 1)
    if given.json is not None and given.json.is_dir():
        raise ValueError(f"--json: {given.json} is a folder; name a file.")
    if given.json is not None:
        make_folder("--json", given.json.parent)
    for name in ("compile", "freeze", "cuda_graphs", "baseline", "check", "int8", "window"):
        if given.estimate and getattr(given, name):
            raise ValueError(f"--estimate: nothing is run; leave out --{name} or --estimate.")
    if given.estimate and ATTENTION in given.work:
        raise ValueError("--estimate: attention can only be measured; leave out one of the two.")
    for name in ("check", "int8", "freeze", "cuda_graphs", "window"):
        if getattr(given, name) and not {"forward", "decode"} & set(given.work):
            raise ValueError(f"--{name}: only for forward and decode; add one of them to --work.")
    for name in ("compile", "baseline"):
        if getattr(given, name) and set(given.work) == {ATTENTION}:
            raise ValueError(f"--{name}: adds no rows for attention; add other work to --work.")
    if "on" in given.activation_checkpointing and not set(LEARNING) & set(given.work):
        raise ValueError(
            "--activation_checkpointing: only for train and dmd2; add one of them to --work."
        )


def estimate_rows(given: argparse.Namespace, info: ModelInfo) -> Iterator[Row]:
    """Rows of estimated memory and operations."""
    import torch

    from pid_lightning.bench.estimate import count_flops, estimate_peaks

    for name, size, batch_size in itertools.product(given.work, given.sizes, given.batch_size):
        flops = count_flops(name, info, size, batch_size)
        for dtype, recomputes in itertools.product(given.dtype, _recomputes(given, name)):
            _announce(name, size, batch_size, dtype)
            peaks = estimate_peaks(name, info, size, batch_size, getattr(torch, dtype), recomputes)
            for piece, (held, peak) in peaks.items():
                yield {
                    "work": piece,
                    "size": size,
                    "batch_size": batch_size,
                    "dtype": dtype,
                    "mode": "estimate" + (RECOMPUTED if recomputes else ""),
                    "gflop": flops[piece] / 1e9,
                    "held_mebibytes": held / MEBIBYTE,
                    "peak_mebibytes": peak / MEBIBYTE,
                }


def measure_rows(
    given: argparse.Namespace,
    denoiser: PiD | None,
    info: ModelInfo,
    device: torch.device,
    rates: dict[str, Rates],
) -> Iterator[Row]:
    """Measured rows of all work except attention."""
    import torch

    from pid_lightning.bench.baseline import build_pair
    from pid_lightning.bench.estimate import weights_dtype
    from pid_lightning.bench.networks import build_random

    names = [name for name in given.work if name != ATTENTION]
    if not names:
        return
    kept = {
        (name, dtype): weights_dtype(name, getattr(torch, dtype))
        for name, dtype in itertools.product(names, given.dtype)
    }
    generator = torch.Generator().manual_seed(0)
    sources = {"eager": denoiser if denoiser is not None else build_random(info, generator)}
    if given.baseline:
        sources["eager"], sources["plain"] = build_pair(sources["eager"].float(), info, generator)
    widest = functools.reduce(torch.promote_types, kept.values())
    for source in sources.values():
        if next(source.parameters()).dtype.itemsize > widest.itemsize:
            source.to(widest)
    for dtype, name in itertools.product(given.dtype, names):
        gathered = {}
        for size, batch_size in itertools.product(given.sizes, given.batch_size):
            _announce(name, size, batch_size, dtype)
            row = {"size": size, "batch_size": batch_size, "dtype": dtype}
            try:
                gathered = gathered or _gather(
                    given, name, sources, kept[name, dtype], info, device
                )
                yield from _measure_size(given, name, gathered, info, row, rates[dtype])
            except torch.OutOfMemoryError:
                print("  out of memory: no rows of this size", file=sys.stderr, flush=True)
        del gathered  # free memory before the next networks are built


def _gather(
    given: argparse.Namespace,
    name: str,
    sources: dict[str, torch.nn.Module],
    dtype: torch.dtype,
    info: ModelInfo,
    device: torch.device,
) -> dict[str, Networks]:
    """The networks of one kind of work, with weights in `dtype`, in all modes but compiled ones."""
    from pid_lightning.bench.work import duplicate, gather
    from pid_lightning.fixed_times import fix_times
    from pid_lightning.sampling import STUDENT_TIMES

    gathered = {
        mode: gather(name, duplicate(source, dtype, True).to(device), info)
        for mode, source in sources.items()
    }
    if name == "decode":  # as `pid decode` does
        fix_times(gathered["eager"].denoiser, info.student_times or STUDENT_TIMES)
    if name not in LEARNING:
        for extent in given.int8:
            gathered[f"eager int8 {extent}"] = gathered["eager"].quantised(
                activations=extent == "products"
            )
        if given.window is not None:
            gathered["eager" + IN_WINDOWS] = gathered["eager"].in_windows(given.window)
    return gathered


def measure_attention(
    given: argparse.Namespace, info: ModelInfo, device: torch.device, rates: dict[str, Rates]
) -> Iterator[Row]:
    """Measured rows of attention, if requested."""
    import torch

    from pid_lightning.bench.attention import attention_rows

    if ATTENTION not in given.work:
        return
    for dtype, size, batch_size in itertools.product(given.dtype, given.sizes, given.batch_size):
        _announce(ATTENTION, size, batch_size, dtype)
        row = {"size": size, "batch_size": batch_size, "dtype": dtype}
        options = (size, batch_size, getattr(torch, dtype), device, rates[dtype], given.repeat)
        yield from (row | figures for figures in attention_rows(info, *options))


def _measure_size(
    given: argparse.Namespace,
    name: str,
    gathered: dict[str, Networks],
    info: ModelInfo,
    row: Row,
    rates: Rates,
) -> Iterator[Row]:
    import torch

    from pid_lightning.bench import measure
    from pid_lightning.bench.estimate import count_flops
    from pid_lightning.bench.networks import draw_inputs
    from pid_lightning.bench.work import assemble
    from pid_lightning.metrics import psnr

    size, batch_size, dtype = row["size"], row["batch_size"], getattr(torch, row["dtype"])
    device = next(gathered["eager"].denoiser.parameters()).device
    inputs = draw_inputs(info, size, batch_size, device)
    modes: dict[str, dict[str, Work]] = {
        mode: assemble(name, networks, inputs, info, dtype)
        for mode, networks in _variants(given, name, gathered).items()
    }
    figures = measure.measure(modes, device, given.repeat)
    flops = count_flops(name, info, size, batch_size)
    flops_in_windows = flops
    if given.window is not None:
        flops_in_windows = count_flops(name, info, size, batch_size, given.window)
    exact = picture = None
    if given.check and name == "forward":
        exact = measure.exact_velocity(gathered["eager"].denoiser, inputs)
    if given.check and name == "decode":
        picture = modes["eager"]["decode"].run()
    for (piece, mode), measured in figures.items():
        work = modes[mode][piece]
        operations = (flops_in_windows if mode.endswith(IN_WINDOWS) else flops)[piece]
        floor = rates.floor_seconds(operations, work.traffic_bytes())
        if mode.endswith(INT8[1]):  # the measured rates are for matmuls in `dtype`
            floor = None
        plain = figures.get((piece, "plain"))
        peak = measured.peak_bytes
        decibels = None
        if picture is not None and mode != "eager":
            decibels = psnr(work.run(), picture).mean().item()
        yield {
            "work": piece,
            **row,
            "mode": mode,
            "seconds": measured.seconds,
            "ratio_to_plain": None if plain is None else measured.seconds / plain.seconds,
            "gflop": operations / 1e9,
            "floor_seconds": floor,
            "floor_share": None if floor is None else floor / measured.seconds,
            "held_mebibytes": measured.held_bytes / MEBIBYTE,
            "peak_mebibytes": None if peak is None else peak / MEBIBYTE,
            "first_seconds": measured.first_seconds,
            "relative_error": None if exact is None else measure.relative_error(work.run(), exact),
            "psnr": decibels,
        }


def _variants(
    given: argparse.Namespace, name: str, gathered: dict[str, Networks]
) -> dict[str, Networks]:
    """The networks of every mode, in the order of their turns."""
    import torch

    variants = {}
    infers = name not in LEARNING
    enabled = (True, given.compile, given.freeze and infers, given.cuda_graphs and infers)
    ways = list(itertools.compress(WAYS, enabled))
    torch.compiler.reset()  # every size recompiles, and torch limits their number
    ours = [mode for mode in gathered if mode != "plain"]
    for mode, way, recomputes in itertools.product(ours, ways, _recomputes(given, name)):
        label = mode.replace("eager", way) + (RECOMPUTED if recomputes else "")
        variants[label] = gathered[mode].variant(way, recomputes)
    if "plain" in gathered:
        variants["plain"] = gathered["plain"]
    return variants


def _recomputes(given: argparse.Namespace, name: str) -> list[bool]:
    if name not in LEARNING:
        return [False]
    return [choice == "on" for choice in dict.fromkeys(given.activation_checkpointing)]


def _announce(name: str, size: int, batch_size: int, dtype: str) -> None:
    print(f"{name}, {size} x {size}, batch {batch_size}, {dtype} ...", file=sys.stderr, flush=True)
