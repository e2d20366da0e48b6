"""`pid bench`: time and memory of each kind of work, next to the least time this machine needs."""
