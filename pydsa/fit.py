"""The longest context of a model that fits in memory, for `-c 0`."""
from pydsa.errors import OutOfMemoryError
from pydsa.model import Setup
from pydsa.plan import check_memory

STEP = 256          # tokens; contexts shorter than the model's own are multiples of it
SPARE = 0.1         # of the memory that a context takes, left free beside it


def longest_context(path, **settings):
    """The model's own context, or the longest that fits -> (tokens, all).

    The memory must hold it with a tenth to spare. all: whether the model's own fits. settings: those of model.Setup, without n_ctx. Raises
    the errors of Setup, and OutOfMemoryError if not even 256 tokens fit.
    """
    own = Setup(path, **settings)
    longest, backend = own.config.n_ctx_train, own.device.backend()
    whole = Setup(path, longest, **settings)
    if _fits(whole.total_bytes, backend):
        return longest, True
    short = Setup(path, min(STEP, longest), **settings)
    low, high = 1, -(-longest // STEP)          # in steps: `low` is as if it fitted, `high` is too long
    while high - low > 1:
        middle = (low + high) // 2
        n_bytes = short.total_bytes + (whole.total_bytes - short.total_bytes) * (middle - 1) * STEP / max(1, longest - short.n_ctx)
        low, high = (middle, high) if _fits(n_bytes, backend) else (low, middle)
    while low > 1 and not _fits(Setup(path, low * STEP, **settings).total_bytes, backend):      # the bytes are no line through two points
        low = low * 15 // 16
    n_ctx = min(longest, low * STEP)
    check_memory(Setup(path, n_ctx, **settings).total_bytes, f"The model with a context of {n_ctx} tokens", backend)
    return n_ctx, False


def _fits(n_bytes, backend):
    try:
        check_memory(n_bytes * (1 + SPARE), "", backend)
    except OutOfMemoryError:
        return False
    return True
