"""The longest context of a model that fits in memory, for `-c 0`."""
from pydsa.errors import OutOfMemoryError
from pydsa.setup import Setup
from pydsa.plan import check_memory

STEP = 256          # tokens; contexts shorter than the model's own are multiples of it
SPARE = 0.1         # of the memory that a context takes, left free beside it


def longest_context(path, **settings):
    """The model's own context, or the longest that fits -> (tokens, all).

    The memory must hold it with a tenth to spare. all: whether the model's own fits. settings: those of model.Setup, without n_ctx. Raises
    the errors of Setup, and OutOfMemoryError if not even 256 tokens fit.
    """
    def n_bytes(n_ctx):
        return Setup(path, n_ctx, **settings).total_bytes

    own = Setup(path, **settings)
    longest, backend = own.config.n_ctx_train, own.device.backend()
    low, high = min(STEP, longest), longest
    if _fits(n_bytes(high), backend):
        return longest, True
    if low < own.n_ubatch < high:       # values of a ubatch take memory too, so the line has a bend where a context is as long as one
        low, high = (own.n_ubatch, high) if _fits(n_bytes(own.n_ubatch), backend) else (low, own.n_ubatch)
    start, end = n_bytes(low), n_bytes(high)
    first, last = 0, (high - low) // STEP + 1       # steps from `low`: as if `first` fitted, and `last` did not
    while last - first > 1:
        middle = (first + last) // 2
        fits = _fits(start + (end - start) * middle * STEP / max(1, high - low), backend)
        first, last = (middle, last) if fits else (first, middle)
    while first > 0 and not _fits(n_bytes(low + first * STEP), backend):
        first = first * 15 // 16        # no line goes through all contexts' bytes
    n_ctx = low + first * STEP
    check_memory(n_bytes(n_ctx), f"The model with a context of {n_ctx} tokens", backend)
    return n_ctx, False


def _fits(n_bytes, backend):
    try:
        check_memory(n_bytes * (1 + SPARE), "", backend)
    except OutOfMemoryError:
        return False
    return True
