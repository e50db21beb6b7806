"""Where the weights of a model are: mapped from the file, copied to memory, or locked there."""
import ctypes
import mmap
import os

import numpy as np

from pydsa.errors import PydsaError
from pydsa.limits import allocating
from pydsa.numa import place_memory

LIMIT = "raise the limit of locked memory (ulimit -l), or leave out --mlock"


def copied(tensor):
    """The tensor with its bytes in memory of the process.

    Large ones lie in large pages, where the system has them. Raises OutOfMemoryError where it refuses the memory at once.
    """
    if tensor.make is not None:         # made on load: in memory anyway
        return tensor
    data = tensor.data
    with allocating(f"tensor {tensor.name}"):
        memory = place_memory(np.empty(data.nbytes + 2 * mmap.PAGESIZE, np.uint8))
    start = -memory.ctypes.data % mmap.PAGESIZE
    copy = memory[start:start + data.nbytes].reshape(data.shape)
    copy[...] = data
    copy.flags.writeable = False
    return tensor._replace(data=copy)


def lock(arrays):
    """Keep arrays in memory, as long as the process runs.

    Raises PydsaError if the system refuses; none is locked then.
    """
    library = None if os.name == "nt" else ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "mlock"):
        raise PydsaError("--mlock is not possible here, as the system has no mlock(); leave it out.")
    ranges = [_pages(array) for array in arrays]
    for i, (address, n) in enumerate(ranges):
        if library.mlock(ctypes.c_void_p(address), ctypes.c_size_t(n)):
            reason = os.strerror(ctypes.get_errno())
            for locked in ranges[:i]:
                library.munlock(ctypes.c_void_p(locked[0]), ctypes.c_size_t(locked[1]))
            total = sum(n for _, n in ranges)
            raise PydsaError(f"The system does not lock {total / 2**30:.1f} GiB of weights in memory ({reason}): {LIMIT}.")


def _pages(array):
    """The address and the bytes of the whole pages that hold an array."""
    span = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides)) + array.itemsize
    first = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    return first, array.ctypes.data + span - first
