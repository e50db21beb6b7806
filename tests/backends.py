"""The backend whose kernels the tests of ops look at: `kernels`, the CPU's, or with PYDSA_TEST_DEVICE=cuda the GPU's.

With NUMBA_ENABLE_CUDASIM=1 too, Numba's simulator runs the latter; with PYDSA_TEST_DEVICE=ptx they are compiled for a GPU and executed by
tests/ptx. Both are slow: SIMULATED tests take few and small shapes.
"""
import importlib
import os

import numpy as np

DEVICE = os.environ.get("PYDSA_TEST_DEVICE", "cpu")
IN_SIMULATOR = DEVICE == "cuda" and os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
SIMULATED = IN_SIMULATOR or DEVICE == "ptx"
if DEVICE == "ptx":
    from tests.ptx.driver import install
    install()
    DEVICE = "cuda"


class OnDevice:
    """A backend with arrays of its own, for tests that have numpy's: they are copied there, and what they hold afterwards back."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        function = getattr(self._backend, name)
        if not callable(function) or isinstance(function, type):
            return function

        def call(*args):
            roots = {}
            result = function(*(self._moved(a, roots) for a in args))
            for host, there in roots.values():
                if host.flags.writeable:
                    host[...] = self._backend.fetch(there)
            return self._backend.fetch(result) if isinstance(result, self._backend.DeviceArray) else result
        return call

    def _moved(self, a, roots):
        """A numpy array there; a slice of columns as the same slice of what it was cut from, so that kernels meet strides."""
        if not isinstance(a, np.ndarray):
            return a
        root = a.base if isinstance(a.base, np.ndarray) and a.base.strides == a.strides and not a.flags.c_contiguous else a
        if id(root) not in roots:
            roots[id(root)] = root, self._backend.upload(np.ascontiguousarray(root))
        there = roots[id(root)][1]
        if a is root:
            return there
        start = (a.ctypes.data - root.ctypes.data) // a.itemsize
        return there[..., start:start + a.shape[-1]]


def choose(simulated, otherwise):
    """Shapes for tests: fewer and smaller ones in the simulator."""
    return simulated if SIMULATED else otherwise


kernels = importlib.import_module(f"pydsa.backends.{DEVICE}")
if DEVICE == "cuda":
    kernels = OnDevice(kernels)
