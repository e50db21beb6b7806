"""Where the weights of a model are: mapped from the file, copied to memory, or locked there."""
import bisect
import collections
import contextlib
import ctypes
import itertools
import mmap
import os
import warnings

import numpy as np

from pydsa.errors import PydsaError
from pydsa.machine import mempolicy
from pydsa.machine.limits import allocating
from pydsa.machine.mempolicy import INTERLEAVE
from pydsa.machine.numa import place_memory, planned_memory
from pydsa.options import size

LIMIT = "raise the limit of locked memory (ulimit -l), or leave out --mlock"
SAMPLES, FEWEST, UNEVEN = 64, 16, 0.25      # pages that are looked at; that tell something; and what is more than chance


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
            raise PydsaError(f"The system does not lock {size(sum(n for _, n in ranges))} of weights in memory ({reason}): {LIMIT}.")


def _pages(array):
    """The address and the bytes of the whole pages that hold an array."""
    span = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides)) + array.itemsize
    first = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    return first, array.ctypes.data + span - first


def warn_of_nodes(tensors):
    """Warn if mapped weights lie on other nodes than --numa says.

    What was read before, or written by a download, stays where it is.
    """
    policy, word = planned_memory()
    if policy is None:
        return
    with contextlib.suppress(OSError):      # what the system does not tell is no reason for a warning
        nodes = collections.Counter(node for node in mempolicy.nodes_at(_in_memory(tensors)) if node >= 0)
        n = sum(nodes.values())
        node, most = max(nodes.items(), key=lambda item: item[1], default=(0, 0))
        apart = most > n * (1 / len(policy.nodes) + UNEVEN) if policy.mode == INTERLEAVE else nodes[policy.nodes[0]] < n / 2
        if n >= FEWEST and apart:
            warnings.warn(f"{most / n:.0%} of the weights that are in memory already lie on node {node}, as they were read or written "
                          f"without --numa {word}: drop the file from memory (dd if=FILE iflag=nocache count=0), or use --no-mmap.",
                          stacklevel=3)


def _in_memory(tensors):
    """Addresses of some pages of tensors that are in memory; touches them."""
    tensors, library, found = [tensor for tensor in tensors if tensor.make is None], ctypes.CDLL(None), []
    ends = list(itertools.accumulate(tensor.data.nbytes for tensor in tensors))
    for i in range(SAMPLES if tensors else 0):
        at = (2 * i + 1) * ends[-1] // (2 * SAMPLES)
        k = bisect.bisect(ends, at)
        data = tensors[k].data
        address, known = data.ctypes.data + at - (ends[k] - data.nbytes), ctypes.c_ubyte()
        page = ctypes.c_void_p(address // mmap.PAGESIZE * mmap.PAGESIZE)
        if library.mincore(page, ctypes.c_size_t(1), ctypes.byref(known)) == 0 and known.value & 1:
            ctypes.c_ubyte.from_address(address).value      # so that it is known where it is
            found.append(page.value)
    return found
