"""The program `pid`, also `python -m pid_lightning`: Lightning is imported where it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

LIGHT_COMMANDS = ("bench", "decode", "export", "import")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `pid`: commands that need no Lightning by `commands`, the others by `cli`."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in LIGHT_COMMANDS:
        from pid_lightning import commands

        commands.run(given[0], given[1:])
    else:
        from pid_lightning import cli

        cli.main(arguments)  # None lets LightningCLI read sys.argv; given arguments make it warn


if __name__ == "__main__":
    main()
