"""`python -m pid_lightning`, the same as `pid`."""

from pid_lightning.cli import main

main()
