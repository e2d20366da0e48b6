"""The rows of `pid bench`: every kind of work at every size, in every mode."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator

import torch

from pid_lightning.commands.bench import ATTENTION, INT8, LEARNING, WAYS, measure
from pid_lightning.commands.bench.attention import attention_rows
from pid_lightning.commands.bench.baseline import build_pair
from pid_lightning.commands.bench.estimate import count_flops, estimate_peaks, weights_dtype
from pid_lightning.commands.bench.networks import build_random, draw_inputs
from pid_lightning.commands.bench.pieces import assemble, gather
from pid_lightning.commands.bench.rates import Rates
from pid_lightning.commands.bench.report import Row
from pid_lightning.commands.bench.work import Networks, Work, duplicate
from pid_lightning.diffusion.sampling import STUDENT_TIMES
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import PiD
from pid_lightning.nn.fixed_times import fix_times
from pid_lightning.pictures.metrics import psnr

RECOMPUTED = " recomputed"  # mode suffix of rows with activation checkpointing
IN_WINDOWS = " in windows"  # mode suffix of rows with windowed attention
MEBIBYTE = 2**20


def estimate_rows(given: argparse.Namespace, info: ModelInfo) -> Iterator[Row]:
    """Rows of estimated memory and operations."""
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
        try:
            exact = measure.exact_velocity(gathered["eager"].denoiser, inputs)
        except torch.OutOfMemoryError:
            print("  out of memory in fp64: no errors of this size", file=sys.stderr, flush=True)
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
