"""`pid bench`: parses and checks its arguments, then prints the rows."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pid_lightning.checks import check_at_least
from pid_lightning.commands.bench import ATTENTION, INFERRING, INT8, LEARNING, WORK
from pid_lightning.files.atomic import make_folder

NETWORKS = ("full", "full_v15", "small")


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
    import torch  # after the arguments are checked, so that --help and errors are fast

    from pid_lightning.commands.bench import report, rows
    from pid_lightning.commands.bench.networks import build_meta, check_sizes, find
    from pid_lightning.commands.bench.rates import measure_rates
    from pid_lightning.commands.devices import find_device

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
        figures = rows.estimate_rows(given, info)
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
            rows.measure_attention(given, info, device, rates),
            rows.measure_rows(given, denoiser, info, device, rates),
        )
    gathered = []
    for row in figures:
        gathered.append(row)
        if given.json is not None:  # each row: the next may run out of memory
            report.write_json(given.json, gathered, **details)
    print(report.format_table(gathered))


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
        if getattr(given, name) and not set(INFERRING) & set(given.work):
            raise ValueError(f"--{name}: only for forward and decode; add one of them to --work.")
    for name in ("compile", "baseline"):
        if getattr(given, name) and set(given.work) == {ATTENTION}:
            raise ValueError(f"--{name}: adds no rows for attention; add other work to --work.")
    if "on" in given.activation_checkpointing and not set(LEARNING) & set(given.work):
        raise ValueError(
            "--activation_checkpointing: only for train and dmd2; add one of them to --work."
        )
