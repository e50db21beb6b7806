"""GPUs of this process; on which of them a thread works, and how exactly.

Ops, kernels and scratch memory are those of the thread's current GPU: the first one of CUDA_VISIBLE_DEVICES, except in a context of
selected(). So is the precision, for which the table of variants has kernels (variants.py). What exists once for each GPU is made by
functions that are kept_per_gpu().
"""
import functools
import threading

from pydsa.backends.cuda.intrinsics.device import SIMULATED
from pydsa.options import FLOAT16

if SIMULATED:
    from pydsa.backends.cuda.runtime.simulated import SimulatedGpu as Gpu
else:
    from pydsa.backends.cuda.runtime.driver import Gpu

_gpus = {}      # index -> Gpu; never removed


class _Chosen(threading.local):
    gpu, precision = None, FLOAT16


_chosen = _Chosen()


def gpu_at(index):
    """The GPU of an index in CUDA_VISIBLE_DEVICES, opened on first use."""
    if index not in _gpus:
        _gpus.setdefault(index, Gpu(index))     # at once, whichever threads ask
    return _gpus[index]


def current():
    """The GPU that this thread works on."""
    return _chosen.gpu or gpu_at(0)


def precision():
    """The precision in which this thread's ops multiply: one of PRECISIONS."""
    return _chosen.precision


class selected:
    """A context in which this thread works on a GPU.

    precision: that of its ops; None: as before.
    """

    def __init__(self, gpu, precision=None):
        self._gpu, self._precision = gpu, precision

    def __enter__(self):
        self._before = _chosen.gpu, _chosen.precision
        _chosen.gpu, _chosen.precision = self._gpu, self._precision or _chosen.precision

    def __exit__(self, *error):
        _chosen.gpu, _chosen.precision = self._before


class Current:
    """Stands for the thread's current GPU: it has the attributes of that one, and locks that one."""

    def __getattr__(self, name):
        return getattr(current(), name)

    def __enter__(self):
        return current().__enter__()

    def __exit__(self, *error):
        return current().__exit__(*error)


gpu = Current()


def kept_per_gpu(maxsize=None):
    """Decorate a function: its results are kept, for each GPU apart.

    maxsize: how many, of those used last; None: all.
    """
    def decorate(function):
        @functools.lru_cache(maxsize)
        def kept(index, *args):
            return function(*args)

        @functools.wraps(function)
        def here(*args):
            return kept(current().index, *args)
        return here
    return decorate
