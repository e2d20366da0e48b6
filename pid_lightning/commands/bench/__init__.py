"""`pid bench`: time and memory of each kind of work, next to this machine's roofline floor."""

INFERRING = ("forward", "decode")
LEARNING = ("train", "dmd2")  # weights in fp32, under autocast for smaller dtypes
WORK = (*INFERRING, *LEARNING)
ATTENTION = "attention"  # part of the others, measured only on request
GRAPH = "cuda graph"  # replayed as a whole on a GPU
COMPILED = ("compiled", "frozen", GRAPH)  # "frozen": with the weights as constants
WAYS = ("eager", *COMPILED)
INT8 = ("weights", "products")  # what is in 8 bits
