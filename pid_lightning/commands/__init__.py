"""The program `pid`."""
