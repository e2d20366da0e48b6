"""`pid bench`: time and memory of every kind of work, beside the floor that this machine sets."""

WORK = ("forward", "decode", "train", "dmd2")
WAYS = ("eager", "compiled", "frozen")  # the last: a compiled graph that holds the weights
LEARNING = WORK[2:]  # weights in fp32, under autocast where the type is a smaller one
