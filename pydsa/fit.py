"""The longest context of a model that fits in memory, for `-c 0`."""
from pydsa.backends.devices import backend_of
from pydsa.errors import OutOfMemoryError
from pydsa.plan import check_fits
from pydsa.setup import Setup

STEP = 256          # tokens; contexts shorter than the model's own are multiples of it
SPARE = 0.1         # of the memory that a context takes, left free beside it


def longest_context(path, **settings):
    """The model's own context, or the longest that fits -> (tokens, all).

    The memory of each device must hold it with a tenth to spare. all: whether the model's own fits. settings: those of model.Setup, without
    n_ctx. Raises the errors of Setup, and OutOfMemoryError if not even 256 tokens fit.
    """
    try:
        return _longest_context(path, settings)
    except OutOfMemoryError:
        if not Setup(path, **settings).streaming.slots or settings.get("stream_from"):
            raise
        return _longest_context(path, settings | {"stream_from": 0})        # without slots, as the model will be loaded then


def _longest_context(path, settings):
    def n_bytes(n_ctx):
        return {name: memory.total for name, memory in Setup(path, n_ctx, **settings).memory.items()}

    own = Setup(path, **settings)
    longest, backends = own.config.n_ctx_train, {name: backend_of(name) for name in own.placement.devices}
    low, high = min(STEP, longest), longest
    if _fits(n_bytes(high), backends):
        return longest, True
    if low < own.n_ubatch < high:       # values of a ubatch take memory too, so the line has a bend where a context is as long as one
        low, high = (own.n_ubatch, high) if _fits(n_bytes(own.n_ubatch), backends) else (low, own.n_ubatch)
    start, end = n_bytes(low), n_bytes(high)
    first, last = 0, (high - low) // STEP + 1       # steps from `low`: as if `first` fitted, and `last` did not
    while last - first > 1:
        middle = (first + last) // 2
        part = middle * STEP / max(1, high - low)
        fits = _fits({name: start[name] + (end[name] - start[name]) * part for name in start}, backends)
        first, last = (middle, last) if fits else (first, middle)
    while first > 0 and not _fits(n_bytes(low + first * STEP), backends):
        first = first * 15 // 16        # no line goes through all contexts' bytes
    n_ctx = low + first * STEP
    check_fits(n_bytes(n_ctx), backends, f"The model with a context of {n_ctx} tokens")
    return n_ctx, False


def _fits(n_bytes, backends):
    try:
        check_fits({name: n * (1 + SPARE) for name, n in n_bytes.items()}, backends, "")
    except OutOfMemoryError:
        return False
    return True
