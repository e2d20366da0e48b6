"""A user's mistake is one sentence and exit status 2; a fault of the program is shown in full."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parent


@contextmanager
def told_in_one_sentence() -> Iterator[None]:
    """Print the sentence of a ValueError, OSError or ModuleNotFoundError that a raise statement
    here made, and exit."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if PACKAGE not in Path(frames[-1].filename).parents:
            raise
        print(f"pid: {error}", file=sys.stderr)
        sys.exit(2)
