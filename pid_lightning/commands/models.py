"""`pid export` and `pid import`: model files from runs and from published weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pid_lightning.checks import check_at_least
from pid_lightning.commands.parsing import make_parser


def export(arguments: Sequence[str]) -> None:
    """Write a run's network, its average where there is one, as one model file."""
    parser = make_parser("export", "Write a run's network as one self-describing model file.")
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

    parser = make_parser("import", "Convert published weights to one self-describing model file.")
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
        f"{given.out}: {given.family} {given.version}, {info.geometry.latent_channels} channels, "
        f"{info.geometry.scale}x; such weights are licensed for non-commercial use"
    )


def _check_unused(path: str) -> None:
    if os.path.exists(os.path.expanduser(path)):
        raise FileExistsError(f"{path} exists already: give another name, or move it away.")
