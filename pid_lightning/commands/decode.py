"""`pid decode|export|import|bench`, which need no Lightning (except to measure training)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pid_lightning.commands.parsing import check_at_least, check_between
from pid_lightning.decoding.memory import keep_freed_memory

# Each command imports what it uses, so that help and argument errors are quick.
if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@dataclass(frozen=True)
class DecodeSettings:
    """How files are decoded.

    Args:
        sigma: noise level of the latents; added to encoded pictures, assumed for latent files.
        steps: sampling steps; null takes as many as the model was trained for.
        seed: of all noise; a file's result does not depend on the other files.
        prompt: caption of every picture; null is none.
        text_model: language model that encodes the prompt, the one used in training.
        text_prefix: text in front of the prompt, as in training.
        text_cache: folder that caches the prompt's features.
        guidance_scale: of a teacher's text guidance; 1 is none.
        tile: side of the tiles in output pixels, auto (tiles of the trained size where the picture
            is larger), or null to decode it whole.
        device: null takes the GPU where there is one.
        dtype: of the weights; null keeps the stored one.
        int8: keep linear layers in 8 bits, half the memory of bf16 (needs torchao).
        window: restrict the patch blocks' attention to windows of at most this many pixels a side.
        format: of the pictures; WebP is lossless.
        compile: compile the network, once per size it sees; with tiles that is once in all.
        compare: also write NAME_compare, the native decode beside PiD's.
        match_colour: take low frequencies from the native decode.
        overwrite: replace existing results.
    """

    sigma: float = 0.0
    steps: int | None = None
    seed: int = 0
    prompt: str | None = None
    text_model: str | None = None
    text_prefix: str = ""
    text_cache: str | None = None
    guidance_scale: float = 1.0
    tile: int | Literal["auto"] | None = "auto"
    device: str | None = None
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    int8: bool = False
    window: int | None = None
    format: Literal["png", "webp"] = "png"
    compile: bool = False
    compare: bool = False
    match_colour: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_between("sigma", self.sigma, 0, 1)
        for name in ("text_model", "text_prefix", "text_cache"):
            if getattr(self, name) and self.prompt is None:
                raise ValueError(f"{name}: only used with a prompt; give one, or leave it out.")


def decode(arguments: Sequence[str]) -> None:
    """Decode pictures or latents to larger pictures."""
    from docstring_parser import parse  # as jsonargparse reads the help of all other options

    parser = _parser("decode", "Upscale pictures or decode latents, with a JSON beside each.")
    parser.add_argument("inputs", nargs="+", help="Pictures, .safetensors latents, folders.")
    parser.add_argument(
        "--model",
        type=str | None,
        help="A .safetensors, a .ckpt, the folder of a run or model, a hub id or a bundled name.",
    )
    parser.add_argument("--output", default="decoded", help="Folder for the results.")
    told = {one.arg_name: one.description for one in parse(DecodeSettings.__doc__).params}
    switches = {field.name for field in fields(DecodeSettings) if field.default is False}
    for name in sorted(switches):
        parser.add_argument(f"--{name}", action="store_true", help=told[name])
    parser.add_class_arguments(DecodeSettings, skip=switches)
    given = parser.parse_args(arguments)
    settings = DecodeSettings(**{field.name: given[field.name] for field in fields(DecodeSettings)})
    from pid_lightning.commands.decode_files import decode_files

    keep_freed_memory()
    try:
        decode_files(given.inputs, given.model, Path(os.path.expanduser(given.output)), settings)
    except KeyboardInterrupt:
        print("\npid: stopped; the files written so far are complete.", file=sys.stderr)
        sys.exit(130)


def export(arguments: Sequence[str]) -> None:
    """Write a run's network, its average where there is one, as one model file."""
    parser = _parser("export", "Write a run's network as one self-describing model file.")
    parser.add_argument("run", help="A run's folder (its newest checkpoint), or a .ckpt.")
    parser.add_argument("out", help="The .safetensors to write.")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="Of the weights.")
    parser.add_argument("--description", default="", help="Text to store in the file.")
    given = parser.parse_args(arguments)
    from pid_lightning.files.atomic import make_folder
    from pid_lightning.files.hub import find_model
    from pid_lightning.files.models import DTYPES, check_model_path, load_model, save_model

    check_model_path(given.out)
    _check_unused(given.out)
    if not os.path.exists(os.path.expanduser(given.run)):
        raise FileNotFoundError(f"{given.run}: no such run; name its folder or a .ckpt.")
    path = find_model(given.run)
    make_folder("out", Path(given.out).parent)
    denoiser, info = load_model(path)
    save_model(denoiser, info, given.out, DTYPES[given.dtype], given.description)
    kind = "teacher" if info.student_times is None else "student"
    print(f"{given.out}: the {kind} of {path}, {info.family} on {info.latent_space} latents")


def import_(arguments: Sequence[str]) -> None:
    """Convert published weights to a model file."""
    from pid_lightning.files import published as import_released

    parser = _parser("import", "Convert published weights to one self-describing model file.")
    parser.add_argument("released", help="The published .pth.")
    parser.add_argument("out", help="The .safetensors to write.")
    parser.add_argument(
        "--family", required=True, choices=list(import_released.FAMILIES), help="Of the latents."
    )
    parser.add_argument(
        "--version", required=True, choices=list(import_released.VERSIONS), help="Of the weights."
    )
    parser.add_argument("--ema", action="store_true", help="Take net_ema. instead of net.")
    parser.add_argument("--teacher", action="store_true", help="These weights are not distilled.")
    parser.add_argument(
        "--image_size", type=int, default=2048, help="Side of the training outputs in pixels."
    )
    given = parser.parse_args(arguments)
    check_at_least("image_size", given.image_size, 1)
    _check_unused(given.out)
    options = {"student_times": None} if given.teacher else {}
    info = import_released.import_released(
        os.path.expanduser(given.released),
        given.out,
        given.family,
        given.version,
        ema=given.ema,
        image_size=given.image_size,
        **options,
    )
    print(
        f"{given.out}: {given.family} {given.version}, {info.latent_channels} channels, "
        f"{info.scale}x; such weights are licensed for non-commercial use"
    )


def bench(arguments: Sequence[str]) -> None:
    """Measure time and memory of decoding and training against this machine's limits."""
    from pid_lightning.commands.bench.command import bench

    bench(arguments)


def _check_unused(path: str) -> None:
    if os.path.exists(os.path.expanduser(path)):
        raise FileExistsError(f"{path} exists already: give another name, or move it away.")


def _parser(command: str, description: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"pid {command}", description=description, exit_on_error=False, allow_abbrev=False
    )


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "bench": bench,
    "decode": decode,
    "export": export,
    "import": import_,
}
