"""`pid bench`: time and memory of every kind of work, beside the floor that this machine sets."""

WORK = ("forward", "decode", "train", "dmd2")
# Third: a compiled graph that holds the weights; last: one that a GPU replays as a whole.
WAYS = ("eager", "compiled", "frozen", "cuda graph")
ATTENTION = "attention"  # a part of the others, measured when asked for
LEARNING = WORK[2:]  # weights in fp32, under autocast where the type is a smaller one
