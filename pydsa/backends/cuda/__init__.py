"""The CUDA backend: the ops of reference.py as Numba kernels, on float32 values and GGUF blocks in the GPU's memory.

With NUMBA_ENABLE_CUDASIM=1 the kernels run in Numba's simulator, as Python functions: for tests, without a GPU.
"""
import functools

import numpy as np

from pydsa.backends import host
from pydsa.backends.cuda.array import DeviceArray, empty, gpu, upload  # noqa: F401
from pydsa.backends.cuda.attention import dense_attention, masked_attention, sparse_attention  # noqa: F401
from pydsa.backends.cuda.ceilings import measure_ceilings, product_format  # noqa: F401
from pydsa.backends.cuda.device import SIMULATED
from pydsa.backends.cuda.fuse import fewer_launches
from pydsa.backends.cuda.indexer import indexer_scores, indexer_select, scatter_mask  # noqa: F401
from pydsa.backends.cuda.launch import Kernel, compile_all
from pydsa.backends.cuda.linear import head_linear, linear  # noqa: F401
from pydsa.backends.cuda.mha import mha_attention, mha_sparse_attention  # noqa: F401
from pydsa.backends.cuda.moe import moe_down, moe_gate_up, moe_linear, moe_route  # noqa: F401
from pydsa.backends.cuda.norm import add, expert_scale, layer_norm, rms_norm, scale, silu_mul  # noqa: F401
from pydsa.backends.cuda.rope import hadamard, rope, rope_table  # noqa: F401
from pydsa.backends.cuda.rows import CacheRows, Weight, cache_bytes, cache_rows, cache_write, get_rows, weight  # noqa: F401
from pydsa.backends.cuda.sampling import PICKS, pick  # noqa: F401
from pydsa.backends.cuda.top_k import top_k  # noqa: F401
from pydsa.backends.cuda.variants import VARIANTS  # noqa: F401
from pydsa.errors import PydsaError

FLOAT = np.float32
WEIGHTS_FIRST = True        # before kernels are compiled, whose list is that of the calls with them
OLDEST = 8, 0       # compute capability: of A100 and of GeForce 30, the first with the tensor instructions that f16x2 uses


def check_device():
    """A clear error where there is no GPU that can run the kernels."""
    if not SIMULATED and gpu.capability < OLDEST:
        major, minor = gpu.capability
        raise PydsaError(f"--device cuda: this GPU, {gpu.name}, has compute capability {major}.{minor}; pydsa needs "
                         f"{OLDEST[0]}.{OLDEST[1]} or later (A100, GeForce 30 and newer).")


def describe_device():
    """What the GPU is and has; PydsaError if there is none."""
    check_device()
    free, total = gpu.memory()
    kind = "" if SIMULATED else "compute capability {}.{}, ".format(*gpu.capability)
    return f"{gpu.name}, {kind}{free / 2**30:.1f} GiB of memory free of {total / 2**30:.1f}"


def free_bytes():
    """Bytes of memory that are free on the device."""
    return gpu.memory()[0]


def nan_met():
    """False: weights whose NaN a choice could hide are looked at when they are copied (model.py)."""
    return False


def fetch(array):
    """The values of an array of the backend, as a numpy array."""
    return array.get()


def store(array, values):
    """Copy the values of a numpy array into a contiguous array of the backend."""
    array.set(values)


def timed(calls):
    """Seconds of each of several calls, pairs of an op and its arguments.

    They are done twice; the host's time between them does not count.
    """
    once = host.timed(calls)       # scratch memory grows now or never
    if SIMULATED:
        return once
    return gpu.time_each([functools.partial(op, *args) for op, args in calls])


def compile_calls(bind, progress=None):
    """Compile the kernels of bind()'s calls, and those that sample.

    bind() makes pairs of an op and its arguments. progress(done, total, name) is called before each kernel.
    """
    def kind(a):
        if isinstance(a, DeviceArray):
            return a.shape, a.dtype
        return a.type if isinstance(a, Weight) else a.storage if isinstance(a, CacheRows) else None

    wanted, calls = {}, bind()
    for op, args in calls:
        wanted.setdefault((op, tuple(map(kind, args))), args)
    Kernel.listed = {}
    try:
        for (op, _), args in wanted.items():
            op(*args)
        ops = {op for op, _ in calls}
        for launch in fewer_launches([(op, args, 0) for op, args in calls]):
            if launch.func not in ops:      # not an op left as it is
                launch()
        pick(empty((1,), np.int32), empty((1,), np.int64), 0, empty((1, 1), np.float32), 1, 1.0, 0.0, 1.0, 0.0)
        listed = list(Kernel.listed.values())
    finally:
        Kernel.listed = None
    compile_all(listed, progress)


def check_threads(n):
    """The GPU has its own: None, whatever is asked for; a clear error where there is no GPU to use."""
    check_device()


def set_threads(n):
    """Nothing to set."""


class Recording(host.Calls):
    """One token's step as a CUDA graph: run() launches kernel by kernel at first, then records that, then launches all at once."""

    def __init__(self, calls):
        super().__init__(calls)
        self._launches = fewer_launches([(op, args, node.n_out) for node, op, args in calls])
        self._warm, self._step = False, None

    def run(self, before=None, after=None):
        """Do all calls once more: one by one, if functions come in between."""
        if before or after:
            super().run(before, after)
            return
        if SIMULATED or not self._warm:         # the first time scratch memory grows, which cannot be recorded
            self._launch()
            self._warm = True
            return
        if self._step is None:
            self._step = gpu.record(self._launch)
        gpu.replay(self._step)

    def _launch(self):
        for launch in self._launches:
            launch()


def recorded(calls, levels, again):
    """A Recording of a step of one token that repeats, or else Calls.

    The rules of fusion take a call of one row for the whole op: a step of several sessions has such calls, one for each.
    """
    one_token = calls[0][2][0].shape[0] == 1        # what the first op writes has all rows
    return Recording(calls) if again and one_token else host.Calls(calls)
