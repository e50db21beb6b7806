"""Memory policies of Linux: which nodes of a machine give the pages of a thread, or of a range of memory.

A thread's policy holds for all pages that the system takes for it: those of its memory, and those of files that it is the first to read
(the page cache follows the policy of the thread that touches or asks, whatever is said of the range; Linux's
Documentation/admin-guide/mm/numa_memory_policy.rst). A range's policy holds for memory of the process only, whichever thread touches it.
"""
import contextlib
import ctypes
import errno
import functools
import mmap
import os
import platform
import sys
from typing import NamedTuple

DEFAULT, PREFERRED, INTERLEAVE = 0, 1, 3        # modes: by the next wider scope; one node first; the nodes in turns
MOVE = 2                                        # mbind: pages that are there already move
MOST_NODES = 1024                               # that Linux can be built for
WORD = 8 * ctypes.sizeof(ctypes.c_ulong)
X86, OTHERS = (237, 238, 239, 279), (235, 237, 236, 239)        # numbers of mbind, set_mempolicy, get_mempolicy and move_pages
NUMBERS = {"x86_64": X86, "aarch64": OTHERS, "riscv64": OTHERS}.get(platform.machine()) if sys.platform == "linux" and WORD == 64 else None


class Policy(NamedTuple):
    """A mode, with the flags that Linux adds to it, and the numbers of nodes."""
    mode: int
    nodes: tuple = ()


def of_thread():
    """The Policy of the calling thread.

    Raises OSError if the system refuses, as do the other functions here.
    """
    mode, mask = ctypes.c_int(), _mask(())
    _call(2, ctypes.byref(mode), mask, ctypes.c_ulong(MOST_NODES + 1), None, ctypes.c_ulong(0))
    return Policy(mode.value, tuple(WORD * i + bit for i, word in enumerate(mask) if word for bit in range(WORD) if word >> bit & 1))


def set_for_thread(policy):
    """Set the Policy of the calling thread, for pages from now on."""
    _call(1, ctypes.c_int(policy.mode), *_set_of(policy.nodes))


def set_for(array, policy):
    """Set the Policy of the whole pages of a contiguous numpy array.

    Pages that it has already move.
    """
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    n_bytes = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if n_bytes > 0:
        _call(0, ctypes.c_void_p(start), ctypes.c_ulong(n_bytes), ctypes.c_int(policy.mode), *_set_of(policy.nodes), ctypes.c_uint(MOVE))


def nodes_at(addresses):
    """The nodes of the pages at some addresses; negative where there is none.

    Only pages that this process has touched are known.
    """
    pages, nodes = (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int * len(addresses))()
    _call(3, ctypes.c_int(0), ctypes.c_ulong(len(addresses)), pages, None, nodes, ctypes.c_int(0))
    return list(nodes)


@contextlib.contextmanager
def applied(policy):
    """A context in which the calling thread has a Policy, then its own."""
    before = of_thread()
    set_for_thread(policy)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):      # it had nodes that the process may no longer use: the system has chosen others
            set_for_thread(before)


@functools.cache
def _set_of(nodes):
    """Nodes as the system calls take them."""
    return (_mask(nodes), ctypes.c_ulong(MOST_NODES + 1)) if nodes else (None, ctypes.c_ulong(0))


def _mask(nodes):
    mask = (ctypes.c_ulong * (MOST_NODES // WORD + 1))()
    for n in nodes:
        mask[n // WORD] |= 1 << n % WORD
    return mask


@functools.cache
def _library():
    return ctypes.CDLL(None, use_errno=True)


def _call(i, *arguments):
    """Make one of the system calls."""
    if NUMBERS is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _library().syscall(ctypes.c_long(NUMBERS[i]), *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
