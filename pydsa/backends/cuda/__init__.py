"""The CUDA backend: the ops of reference.py as Numba kernels, on float32 values and GGUF blocks in the GPU's memory.

on(i) is the backend on GPU i, with all names of this module, on(i, "exact") that in another precision. The module itself is the backend on
the thread's current GPU, which is GPU 0, in its precision, which is "float16".
With NUMBA_ENABLE_CUDASIM=1 the kernels run in Numba's simulator, as Python functions: for tests, without a GPU.
"""
import functools

import numpy as np

from pydsa.backends import gpus, host
from pydsa.backends.cuda import int8x2
from pydsa.backends.cuda.attention import dense_attention, masked_attention, sparse_attention  # noqa: F401
from pydsa.backends.cuda.ceilings import measure_ceilings, product_format  # noqa: F401
from pydsa.backends.cuda.chosen import attend_one
from pydsa.backends.cuda.indexer import indexer_scores, indexer_select, scatter_mask  # noqa: F401
from pydsa.backends.cuda.intrinsics.device import SIMULATED
from pydsa.backends.cuda.linear import head_linear, linear  # noqa: F401
from pydsa.backends.cuda.mha import mha_attention, mha_sparse_attention  # noqa: F401
from pydsa.backends.cuda.moe import moe_down, moe_gate_up, moe_linear, moe_route  # noqa: F401
from pydsa.backends.cuda.norm import add, expert_scale, layer_norm, rms_norm, scale, silu_mul  # noqa: F401
from pydsa.backends.cuda.one_token.fuse import fewer_launches
from pydsa.backends.cuda.rope import hadamard, rope, rope_table  # noqa: F401
from pydsa.backends.cuda.rows import CacheRows, Weight, cache_bytes, cache_rows, cache_write, get_rows, weight  # noqa: F401
from pydsa.backends.cuda.runtime.array import DeviceArray, empty, upload  # noqa: F401
from pydsa.backends.cuda.runtime.current import current, gpu, gpu_at, precision, selected
from pydsa.backends.cuda.runtime.launch import compile_all, listing
from pydsa.backends.cuda.runtime.streaming import Slot, measure_bus  # noqa: F401
from pydsa.backends.cuda.runtime.transfers import transfer  # noqa: F401
from pydsa.backends.cuda.sampling import PICKS, pick  # noqa: F401
from pydsa.backends.cuda.top_k import top_k  # noqa: F401
from pydsa.backends.cuda.variants import VARIANTS, switched_off  # noqa: F401
from pydsa.backends.gpus import OLDEST, n_gpus  # noqa: F401
from pydsa.backends.host import form_costs  # noqa: F401
from pydsa.errors import PydsaError
from pydsa.options import FLOAT16, PRECISIONS, choose

FLOAT = np.float32
FEW = int8x2.gemv.MOST_TOKENS, attend_one.MOST_TOKENS     # the most tokens of steps that have kernels of their own
WEIGHTS_FIRST = True        # before kernels are compiled, whose list is that of the calls with them


def check_device():
    """A clear error where there is no GPU that can run the kernels."""
    switched_off()      # the names in the environment are valid
    gpu.check()
    if not SIMULATED and gpu.capability < OLDEST:
        major, minor = gpu.capability
        which = "this GPU" if gpus.n_gpus() == 1 else f"GPU {gpu.index}"
        raise PydsaError(f"--device cuda: {which}, {gpu.name}, has compute capability {major}.{minor}; pydsa needs "
                         f"{OLDEST[0]}.{OLDEST[1]} or later (A100, GeForce 30 and newer).")


def describe_device():
    """What the GPU is and has; PydsaError if there is none."""
    check_device()
    free, total = gpu.memory()
    kind = "" if SIMULATED else "compute capability {}.{}, ".format(*gpu.capability)
    which = "" if gpus.n_gpus() == 1 else f"GPU {gpu.index}: "
    return f"{which}{gpu.name}, {kind}{free / 2**30:.1f} GiB of memory free of {total / 2**30:.1f}"


def free_bytes():
    """Bytes of memory that are free on the device."""
    return gpu.memory()[0]


def nan_met():
    """False: weights whose NaN a choice could hide are looked at when they are copied (model.py)."""
    return False


def host_empty(shape, dtype):
    """A numpy array without values, from and to which GPUs copy fast.

    It is in pinned memory, aligned to 64 bytes at least. Raises OutOfMemoryError where that is refused.
    """
    return gpu.host_empty(shape, dtype)


def register(array):
    """Let GPUs copy from a contiguous numpy array at full speed.

    It must lie in memory of the process, not of a mapped file, and share no page with another registered array. This holds as long as the
    object that is returned. Raises OutOfMemoryError where the system refuses it.
    """
    return gpu.register(array)


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
    listing.kernels = {}
    try:
        for listing.many in (False, True):
            for (op, _), args in wanted.items():
                op(*args)
        listing.many = False
        ops = {op for op, _ in calls}
        for launch in fewer_launches(calls):
            if launch.func not in ops:      # not an op left as it is
                launch()
        pick(empty((1,), np.int32), empty((1,), np.int64), 0, empty((1, 1), np.float32), 1, 1.0, 0.0, 1.0, 0.0)
        listed = list(listing.kernels.values())
    finally:
        listing.kernels, listing.many = None, False
    compile_all(listed, progress)


def reserve(calls):
    """Let scratch memory grow to what calls take.

    calls: pairs of an op and its arguments; nothing is computed. Buffers that are outgrown later stay, as recorded steps use them: steps of
    more and more tokens would leave one each.
    """
    listing.kernels = {}
    try:
        for op, args in calls:
            op(*args)
    finally:
        listing.kernels = None


def check_threads(n):
    """The GPU has its own: None, whatever is asked for; a clear error where there is no GPU to use."""
    check_device()


def set_threads(n):
    """Nothing to set."""


class Calls(host.Calls):
    """The calls of a step, made one by one.

    They run on the GPU, and in the precision, that were current when this object was made.
    """

    def __init__(self, calls):
        super().__init__(calls)
        self._gpu, self._precision = current(), precision()

    def run(self, before=None, after=None):
        """Make all calls: see host.Calls."""
        with selected(self._gpu, self._precision):
            self._run(before, after)

    def _run(self, before, after):
        super().run(before, after)


class Recording(Calls):
    """One token's step as a CUDA graph: run() launches kernel by kernel at first, then records that, then launches all at once."""

    def __init__(self, calls):
        super().__init__(calls)
        self._launches = fewer_launches([(op, args) for _, op, args in calls])
        self._warm, self._step = False, None

    def _run(self, before, after):
        """Do all calls once more: one by one, if functions come in between."""
        if before or after:
            super()._run(before, after)
            return
        if SIMULATED or not self._warm:         # the first time scratch memory grows, which cannot be recorded
            self._launch()
            self._warm = True
            return
        if self._step is None:
            self._step = self._gpu.record(self._launch)
        self._gpu.replay(self._step)

    def _launch(self):
        for launch in self._launches:
            launch()


def recorded(calls, levels, again):
    """A Recording of a step of one token that repeats, or else Calls.

    The rules of fusion take a call of one row for the whole op: a step of several sessions has such calls, one for each.
    """
    return Recording(calls) if again and _of_one_token(calls) else Calls(calls)


def _of_one_token(calls):
    """Whether each call is the whole of its op, for one row."""
    nodes = {id(node) for node, _, _ in calls}      # an op of several contexts is called for each
    return len(nodes) == len(calls) and all(args[op is cache_write].shape[0] == 1 for _, op, args in calls)


# What works on the current GPU, beside the ops
OF_THE_GPU = ("check_device", "check_threads", "compile_calls", "reserve", "describe_device", "free_bytes", "host_empty", "register",
              "empty", "upload", "weight", "cache_rows", "timed", "recorded", "pick", "measure_ceilings", "measure_bus", "Slot",
              "product_format")


class Backend:
    """The backend on one GPU in one precision: it has all names of this module.

    Functions that make arrays, run steps, compile or measure do so on this GPU, whichever the thread's current one is. Ops are those of the
    module: they run where their arrays are in the steps of recorded() and timed(), and by themselves in `with backend.selected():`.
    """

    def __init__(self, index, precision):
        self.index, self.precision = index, precision
        self.gpu = gpu_at(index)

    def __repr__(self):
        return f"pydsa.backends.cuda.on({self.index}, {self.precision!r})"

    def __getattr__(self, name):
        if name not in globals():
            raise AttributeError(f"{__name__} has no {name}")
        value = globals()[name]
        if name in OF_THE_GPU:
            value = self._here(value)
        setattr(self, name, value)      # this is not asked again
        return value

    def _here(self, function):
        @functools.wraps(function, updated=())
        def here(*args, **options):
            with self.selected():
                return function(*args, **options)
        return here

    def selected(self):
        """A context in which this GPU and precision are the thread's."""
        return selected(self.gpu, self.precision)


_backends = {}


def on(index, precision=FLOAT16):
    """The backend on a GPU in a precision: a Backend, always the same one.

    index: its number in CUDA_VISIBLE_DEVICES. Whether there is such a GPU is found out when it is used, which raises a PydsaError if not.
    Raises PydsaError for what is no index, and for a precision that there is not.
    """
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise PydsaError(f"The GPU is {index!r}, expected its number: 0, 1, ...")
    key = index, choose("precision", precision, PRECISIONS)
    if key not in _backends:
        _backends.setdefault(key, Backend(*key))
    return _backends[key]
