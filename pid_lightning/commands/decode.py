"""`pid decode`: upscales pictures and decodes latents; needs no Lightning."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from pid_lightning.commands.parsing import make_parser
from pid_lightning.decoding.settings import DecodeSettings


def decode(arguments: Sequence[str]) -> None:
    """Decode pictures or latents to larger pictures."""
    parser = make_parser("decode", "Upscale pictures or decode latents, with a JSON beside each.")
    parser.add_argument("inputs", nargs="+", help="Pictures, .safetensors latents, folders.")
    parser.add_argument(
        "--model",
        type=str,
        help="A .safetensors, a .ckpt, the folder of a run or model, a hub id or a bundled name.",
    )
    parser.add_argument("--output", default="decoded", help="Folder for the results.")
    # A text as it is: where None were a type too, "#1 fan art" would be the comment of a YAML.
    parser.add_argument("--prompt", type=str, help="Caption of every picture.")
    told = "Go on in a folder: leave out what it holds, or what another process is at."
    parser.add_argument("--continue", type=bool, default=False, help=told)
    parser.add_class_arguments(DecodeSettings, as_group=False, skip={"prompt"})
    given = parser.parse_args(arguments)
    settings = DecodeSettings(**{field.name: given[field.name] for field in fields(DecodeSettings)})
    from pid_lightning.commands.decode_files import decode_files  # torch only where it is needed
    from pid_lightning.decoding.memory import keep_freed_memory

    keep_freed_memory()
    try:
        folder = Path(os.path.expanduser(given.output))
        decode_files(given.inputs, given.model, folder, settings, given["continue"])
    except KeyboardInterrupt:
        told = "stopped; the files written so far are complete, and --continue goes on."
        print(f"\npid: {told}", file=sys.stderr)
        sys.exit(130)
