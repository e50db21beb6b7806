"""The GPUs of this process, and which of them a thread works on.

Ops, kernels and scratch memory are those of the thread's current GPU: the first one of CUDA_VISIBLE_DEVICES, except in a context of
selected(). What exists once for each GPU is made by functions that are kept_per_gpu().
"""
import functools
import threading

from pydsa.backends.cuda.device import SIMULATED

if SIMULATED:
    from pydsa.backends.cuda.simulated import SimulatedGpu as Gpu
else:
    from pydsa.backends.cuda.driver import Gpu

_gpus = {}      # index -> Gpu; never removed


class _Chosen(threading.local):
    gpu = None


_chosen = _Chosen()


def gpu_at(index):
    """The GPU of an index in CUDA_VISIBLE_DEVICES, opened on first use."""
    if index not in _gpus:
        _gpus.setdefault(index, Gpu(index))     # at once, whichever threads ask
    return _gpus[index]


def current():
    """The GPU that this thread works on."""
    return _chosen.gpu or gpu_at(0)


class selected:
    """A context in which this thread works on a GPU."""

    def __init__(self, gpu):
        self._gpu = gpu

    def __enter__(self):
        self._before, _chosen.gpu = _chosen.gpu, self._gpu

    def __exit__(self, *error):
        _chosen.gpu = self._before


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
