"""The options of `pid bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from docstring_parser import parse

from pid_lightning.checks import Mistake, check_at_least
from pid_lightning.commands.parsing import make_parser
from pid_lightning.files.atomic import make_folder

Kind = Literal["forward", "decode", "train", "dmd2"]
LEARNING = ("train", "dmd2")  # weights in fp32, under autocast for smaller dtypes


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        network: sizes of a network with random weights.
        work: a forward pass, a 4-step decode, a training step, DMD2's two steps.
        sizes: output sides in pixels.
        batch_size: pictures per batch.
        dtype: what is computed in; what is trained stays in float32, under autocast.
        device: a GPU, where there is one, by default.
        compile: add rows for the compiled network; on a CPU, decodes have its weights as constants.
        baseline: add rows for the plain transcription of the method in tests/support/plain.py.
        activation_checkpointing: for train and dmd2, recompute blocks in the backward pass.
        repeat: timed calls per row, whose median is reported.
        check: compare forward passes with fp64.
        estimate: estimate memory and operations without running anything.
        json: file for the rows.

    Raises:
        Mistake, OSError: a number below 1, options that exclude one another, or a `json` that
            cannot be written.
    """

    network: Literal["full", "full_v15", "small"] = "small"
    work: tuple[Kind, ...] = ("forward", "decode", "train", "dmd2")
    sizes: tuple[int, ...] = (512,)
    batch_size: tuple[int, ...] = (1,)
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16",)
    device: Literal["cpu", "cuda"] | None = None
    compile: bool = False
    baseline: bool = False
    activation_checkpointing: bool = False
    repeat: int = 5
    check: bool = False
    estimate: bool = False
    json: str | None = None

    def __post_init__(self) -> None:
        check_at_least("sizes", min(self.sizes), 1)
        check_at_least("batch_size", min(self.batch_size), 1)
        check_at_least("repeat", self.repeat, 1)
        for option in ("compile", "baseline", "check"):
            if self.estimate and getattr(self, option):
                raise Mistake(option, "not possible with --estimate; leave out one of the two.")
        for option, needed in (("check", ("forward",)), ("activation_checkpointing", LEARNING)):
            if getattr(self, option) and not set(needed) & set(self.work):
                raise Mistake(option, f"only for {' and '.join(needed)}; add it to --work.")
        if self.json is not None:
            if Path(self.json).is_dir():
                raise Mistake("json", f"{self.json} is a folder; name a file.")
            make_folder("json", Path(self.json).parent)


def read_settings(arguments: Sequence[str]) -> BenchSettings:
    """The settings that a command line gives.

    Raises:
        Mistake, OSError: see `BenchSettings`.
        argparse.ArgumentError: an unknown option, or a value of another type.
    """
    parser = make_parser(
        "bench",
        "Measure time and peak memory of a forward pass, a 4-step decode, a training step and "
        "both DMD2 steps, next to the floor: operations divided by this machine's rate.",
    )
    told = {option.arg_name: option.description for option in parse(BenchSettings.__doc__).params}
    for name, kind in get_type_hints(BenchSettings).items():
        default = getattr(BenchSettings, name)
        options = {"type": kind, "default": default}
        if kind is bool:
            options = {"action": "store_true"}
        elif isinstance(default, tuple):
            options = {"type": get_args(kind)[0], "default": list(default), "nargs": "+"}
        parser.add_argument(f"--{name}", help=told[name], **options)
    return BenchSettings(**parser.parse_args(arguments).as_dict())
