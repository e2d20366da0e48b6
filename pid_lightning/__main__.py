"""The program `pid`, also `python -m pid_lightning`: Lightning is imported where it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

LIGHT_COMMANDS = ("bench", "decode", "export", "import")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `pid`: commands that need no Lightning by `commands`, the others by `cli`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in LIGHT_COMMANDS:
        from pid_lightning import commands

        commands.run(arguments[0], arguments[1:])
    else:
        from pid_lightning import cli

        cli.main(arguments)


if __name__ == "__main__":
    main()
