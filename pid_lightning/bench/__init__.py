"""`pid bench`: time and memory of every kind of work, beside the floor that this machine sets."""
