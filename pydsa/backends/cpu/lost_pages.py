"""What happens where a mapped file has lost a page: zeros, and a mark, instead of the end of the process.

Kernels, numpy and threads of all kinds read mapped files, so that the signal (SIGBUS) can come anywhere. Its handler is compiled code that
calls nothing of Python's. Pages that are not of our files keep the handler that was there before.
"""
import ctypes
import functools
import mmap
import platform
import signal
import sys

from numba import types

from pydsa.backends.cpu.arrays import by_symbol
from pydsa.backends.cpu.jit import ByAddress
from pydsa.backends.cpu.team.atomics import add_to_word, load_word
from pydsa.machine import maps

CAN = platform.system() == "Linux" and sys.maxsize > 2**32 and sys.byteorder == "little"     # as siginfo_t and sigaction are read here
ADDRESS = 16                            # where siginfo_t has the address
SIGBUS, SA_SIGINFO = 7, 4
READ, ANONYMOUS_FIXED = 1, 0x32         # PROT_READ; MAP_PRIVATE, MAP_FIXED and MAP_ANONYMOUS
PAGE = mmap.PAGESIZE
AT_ENTRIES, WORDS, OLD, LOST = 8 * maps.ENTRIES, maps.WORDS, 8 * maps.OLD, 8 * maps.LOST

_table = by_symbol("pydsa_maps", maps.TABLE)
_mmap = types.ExternalFunction("mmap", types.int64(types.int64, types.int64, types.int32, types.int32, types.int32, types.int64))
_sigaction = types.ExternalFunction("sigaction", types.int32(types.int32, types.int64, types.int64))


def on_bus_error(number, info, context):
    """Put zeros in place of what a mapped file has lost, up to its end.

    A page at a time would take as many steps, and more areas of memory than a process may have.
    """
    table, address = _table(), load_word(info + ADDRESS)
    for i in range(load_word(table + 8 * maps.N_ENTRIES)):
        entry = table + AT_ENTRIES + 8 * WORDS * i
        end = load_word(entry + 8)
        if load_word(entry) <= address < end:
            page = address // PAGE * PAGE
            if _mmap(page, end - page, READ, ANONYMOUS_FIXED, -1, 0) == page:
                add_to_word(entry + LOST, 1)
                add_to_word(table, 1)
                return
    _sigaction(SIGBUS, table + OLD, 0)      # the page is touched again, and whoever handled it before does


_handler = ByAddress(on_bus_error, types.int32, types.int64, types.int64)


class _Action(ctypes.Structure):
    """The struct sigaction of Linux's C libraries."""
    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_byte * 128), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]


@functools.cache
def watch():
    """Let this process outlive pages that its mapped files lose.

    Elsewhere than on Linux the system ends it.
    """
    if CAN and signal.getsignal(signal.SIGBUS) is not signal.SIG_IGN:
        library = ctypes.CDLL(None, use_errno=True)
        ours = _Action(_handler.address, flags=SA_SIGINFO)
        library.sigaction(SIGBUS, ctypes.byref(ours), ctypes.c_void_p(maps.TABLE.ctypes.data + OLD))
