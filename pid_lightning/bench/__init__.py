"""`pid bench`: time and memory of each kind of work, next to this machine's roofline floor."""

WORK = ("forward", "decode", "train", "dmd2")
# "frozen": compiled with the weights as constants; "cuda graph": replayed as a whole on a GPU.
WAYS = ("eager", "compiled", "frozen", "cuda graph")
ATTENTION = "attention"  # part of the others, measured only on request
LEARNING = WORK[2:]  # weights in fp32, under autocast for smaller dtypes
INT8 = ("weights", "products")  # what is in 8 bits
