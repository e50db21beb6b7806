"""Which GPUs there are, asked without numba and without a CUDA context.

The driver is started here, for the command line, which asks what there is, as for the CUDA backend, which uses it.
"""
import ctypes
import importlib
import importlib.util
import os
import sys
import uuid
from typing import NamedTuple

import psutil

from pydsa.errors import PydsaError

OLDEST = 8, 0       # compute capability: of A100 and of GeForce 30, the first with the tensor instructions that the kernels use
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
SIMULATOR = "Numba's CUDA simulator"        # in place of a GPU's name
LIBRARIES = ("nvcuda.dll", "nvml.dll") if sys.platform == "win32" else ("libcuda.so.1", "libnvidia-ml.so.1")

api = None          # cuda.bindings.driver, once it is needed; tests put another one here
_process = None     # the id of the process that has started the driver; a fork of it cannot use it


class Usable(NamedTuple):
    """A GPU that pydsa could run on. Sizes are bytes."""
    index: int      # among those of CUDA_VISIBLE_DEVICES
    name: str
    total: int
    free: int


def do(name, *args):
    """Call a driver function -> its results.

    That is a value, a list of several, or None. Raises PydsaError if the driver answers with an error.
    """
    status, *results = getattr(driver(), name)(*args)
    if status:
        raise PydsaError(f"The CUDA driver answers {status.name} to {name}.")
    return results if len(results) > 1 else results[0] if results else None


def driver():
    """The driver's functions as cuda.bindings has them, or a stand-in's."""
    global api
    if api is None:
        api = importlib.import_module("cuda.bindings.driver")
    return api


def start():
    """Start the driver, as often as wanted.

    Raises PydsaError where there is none, no GPU, or an older one than the installed packages make kernels for.
    """
    global _process
    check_process()
    try:
        do("cuInit", 0)
        version = do("cuDriverGetVersion")
    except Exception as error:      # without a driver cuda.bindings raises its own exceptions
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PydsaError(f"--device cuda finds no NVIDIA driver or no GPU ({first}); `nvidia-smi` must list one.") from error
    _process = os.getpid()
    made_for = int(importlib.import_module("cuda.bindings").__version__.split(".")[0])
    if version // 1000 < made_for:
        raise PydsaError(f"--device cuda: the NVIDIA driver knows CUDA {version // 1000}.{version % 1000 // 10}, but the installed "
                         f"packages make kernels for CUDA {made_for}; pydsa needs a newer driver, or `pip install "
                         f"'numba-cuda[cu{version // 1000}]'`.")


def forked():
    """Whether this is a fork of a process that has started the driver."""
    return _process not in (None, os.getpid())


def check_process():
    """Raise PydsaError in a fork of a process that has started the driver."""
    if forked():
        raise PydsaError("This process was forked from one that had used the GPU already, and cannot use it: load the model after the "
                         "fork, or start the process anew (multiprocessing's \"spawn\").")


def n_gpus():
    """The number of GPUs in CUDA_VISIBLE_DEVICES; PydsaError if there is none.

    In the simulator it is that of the environment variable PYDSA_SIMULATED_GPUS, or one.
    """
    if SIMULATED:
        text = os.environ.get("PYDSA_SIMULATED_GPUS", "1")
        if not (text.isascii() and text.isdigit() and int(text)):
            raise PydsaError(f"PYDSA_SIMULATED_GPUS is {text!r}, expected a number of GPUs, 1 or more.")
        return int(text)
    start()
    return do("cuDeviceGetCount")


def check_index(index):
    """The number of GPUs, if there is one of this index; else PydsaError."""
    n = n_gpus()
    if index >= n:
        there = "is only GPU 0" if n == 1 else f"are only GPUs 0 to {n - 1}"
        raise PydsaError(f"There is no GPU {index}: there {there} (the driver's list, or that of CUDA_VISIBLE_DEVICES).")
    return n


def title(index):
    """How messages call a GPU: "The GPU", or where there are several "GPU 1"."""
    return "The GPU" if n_gpus() == 1 else f"GPU {index}"


def capability(device):
    """The compute capability of a device of the driver, (9, 0) for example."""
    kinds = importlib.import_module("cuda.bindings.driver").CUdevice_attribute
    return tuple(do("cuDeviceGetAttribute", kind, device) for kind in
                 (kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))


def device_name(device):
    """The name of a device of the driver."""
    return do("cuDeviceGetName", 100, device).split(b"\0")[0].decode()


def usable_gpus():
    """The GPUs that pydsa could run on, a list of Usable.

    That needs the package numba-cuda, a driver that is new enough, and a compute capability of OLDEST or later. The list is empty where
    there is none, whatever the reason, and nothing is raised. Without a driver this takes less than a millisecond. No context is created,
    except where NVML, a part of the driver, cannot tell how much memory is free.
    """
    try:
        if SIMULATED:
            memory = psutil.virtual_memory()
            return [Usable(i, SIMULATOR, memory.total, memory.available) for i in range(n_gpus())]
        if not installed():
            return []
        found = []
        for i in range(n_gpus()):
            device = do("cuDeviceGet", i)
            if capability(device) >= OLDEST:
                total, free = memory_of(device)
                found.append(Usable(i, device_name(device), total, free))
        return found
    except Exception:       # a broken driver or package: there is no GPU to use, and whoever asks for one is told why
        return []


def installed():
    """Whether the packages and the driver's library are there."""
    return importlib.util.find_spec("numba_cuda") is not None and (api is not None or library(LIBRARIES[0]) is not None)


def library(name):
    """A shared library, or None."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def memory_of(device):
    """Bytes of memory of a device of the driver: total and free."""
    total = do("cuDeviceTotalMem", device)
    of_parts = "cuDeviceGetUuid_v2" if hasattr(driver(), "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"      # of a MIG device, not its GPU
    free = _free_by_nvml(uuid.UUID(bytes=bytes(do(of_parts, device).bytes)))
    if free is None:
        context = do("cuDevicePrimaryCtxRetain", device)
        try:
            do("cuCtxPushCurrent", context)
            try:
                free, total = do("cuMemGetInfo")
            finally:
                do("cuCtxPopCurrent")
        finally:
            do("cuDevicePrimaryCtxRelease", device)
    return total, min(free, total)


def _free_by_nvml(identity):
    """Free bytes of the GPU with this UUID; None if NVML does not know."""
    nvml = library(LIBRARIES[1])
    if nvml is None or nvml.nvmlInit_v2():
        return None
    try:
        handle, sizes = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()       # total, free, used
        for kind in ("GPU", "MIG"):
            if not nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{identity}".encode(), ctypes.byref(handle)):
                return None if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(sizes)) else sizes[1]
        return None
    except AttributeError:      # an old NVML without one of the functions
        return None
    finally:
        nvml.nvmlShutdown()
