"""The program `pid`, also `python -m pid_lightning`: commands are imported when asked for."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from importlib import import_module

from pid_lightning.checks import Diverged, Mistake
from pid_lightning.commands.parsing import sentence

TRAINING = ("fit", "validate", "test", "predict")  # by `commands.fit`
COMMANDS = {
    "bench": ("bench.command", "bench"),
    "decode": ("decode", "decode"),
    "export": ("models", "export"),
    "import": ("models", "import_"),
}
HELP = """usage: pid COMMAND [options]; pid COMMAND --help lists them

  decode    upscale pictures or decode latents
  fit       train or distil a decoder:    pid fit --config configs/quickstart.yaml
  test      measure PSNR, SSIM and LPIPS: pid test --config FILE --ckpt_path last
  validate  measure the loss
  predict   decode with a run's network
  export    write a run's network as one model file
  import    convert published weights to one model file
  bench     measure speed and memory
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `pid`: commands that need no Lightning by their own module, the others by `fit`. A user's
    mistake is one sentence and exit status 2, a run whose numbers are no longer finite one and 1;
    Ctrl-C is 130, and 1 where Lightning ends a fit."""
    given = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for consoles that lack letters
    if not given or given[0] in ("-h", "--help"):
        print(HELP, end="")
        sys.exit(0 if given else 2)
    command = given[0]
    try:
        if command in COMMANDS:
            module, function = COMMANDS[command]
            getattr(import_module(f"pid_lightning.commands.{module}"), function)(given[1:])
        elif command in TRAINING or command.startswith("-"):
            from pid_lightning.commands import fit

            fit.main(arguments)  # None: LightningCLI reads sys.argv; given arguments make it warn
        else:
            known = ", ".join((*TRAINING, *COMMANDS))
            raise Mistake("command", f"{command!r} is not known; use one of {known}.")
    except KeyboardInterrupt:
        print("\npid: stopped.", file=sys.stderr)
        sys.exit(130)
    except Diverged as error:
        print(f"pid: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        told = sentence(error)
        if told is None:
            raise
        print(f"pid: {told}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
