"""How a thread sleeps until a word has changed, by what the system has.

Linux has futexes, Windows has WaitOnAddress, other systems have condition variables (POSIX threads). Functions are called by name, so that
machine code in a cache holds no address of a process.

Watched is the upper half of a word of 64 bits, with the memory of a condition variable behind it: WATCHED_BYTES in all.
"""
import ctypes
import platform
import sys

import llvmlite.binding as llvm
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.team.atomics import load_word
from pydsa.backends.cpu.vectors.simd import I32, INTP

MUTEX, CONDITION, WATCHED_BYTES = 128, 256, 384      # a pthread_mutex_t, and a pthread_cond_t, take 64 bytes at most
NUMBER = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine())       # of the system call futex(2)
WAIT, WAKE = 128, 129      # FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE
FOREVER = 0xFFFFFFFF       # milliseconds


@inner
def upper_half(word):
    """The upper 32 bits of a word."""
    return (word >> 32) & 0xFFFFFFFF


if platform.system() == "Linux" and NUMBER and sys.byteorder == "little":
    _syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))

    @inner
    def prepare(at):
        """Make what a wait at this address needs."""

    @inner
    def sleep_while(at, value):
        """Sleep while the upper half of the word is `value`.

        It may also return for no reason.
        """
        _syscall(NUMBER, at + 4, WAIT, value, 0, 0, 0)       # compares and sleeps as one

    @inner
    def wake(at, n):
        """Wake up to n of those that sleep; the word has changed."""
        _syscall(NUMBER, at + 4, WAKE, n, 0, 0, 0)

elif platform.system() == "Windows":
    _library = ctypes.WinDLL("kernelbase")
    for _name in ("WaitOnAddress", "WakeByAddressAll"):
        llvm.add_symbol(_name, ctypes.cast(getattr(_library, _name), ctypes.c_void_p).value)
    _wait_on_address = types.ExternalFunction("WaitOnAddress", types.int32(types.int64, types.int64, types.int64, types.uint32))
    _wake_by_address = types.ExternalFunction("WakeByAddressAll", types.void(types.int64))

    @intrinsic
    def _stored(typingctx, value):
        """Store the lower half of an integer on the stack; return its address."""
        def codegen(context, builder, signature, args):
            slot = cgutils.alloca_once(builder, I32)
            builder.store(builder.trunc(args[0], I32), slot)
            return builder.ptrtoint(slot, INTP)
        return types.int64(types.int64), codegen

    @inner
    def prepare(at):
        """Make what a wait at this address needs."""

    @inner
    def sleep_while(at, value):
        """Sleep while the upper half of the word is `value`.

        It may also return for no reason.
        """
        _wait_on_address(at + 4, _stored(value), 4, FOREVER)

    @inner
    def wake(at, n):
        """Wake all that sleep; the word has changed."""
        _wake_by_address(at + 4)

else:
    def _posix(name, *parameters):
        return types.ExternalFunction(f"pthread_{name}", types.int32(*parameters))

    _mutex_init, _condition_init = (_posix(name, types.int64, types.int64) for name in ("mutex_init", "cond_init"))
    _lock, _unlock = _posix("mutex_lock", types.int64), _posix("mutex_unlock", types.int64)
    _wait, _broadcast = _posix("cond_wait", types.int64, types.int64), _posix("cond_broadcast", types.int64)

    @inner
    def prepare(at):
        """Make what a wait at this address needs."""
        _mutex_init(at + MUTEX, 0)
        _condition_init(at + CONDITION, 0)

    @inner
    def sleep_while(at, value):
        """Sleep while the upper half of the word is `value`.

        It may also return for no reason.
        """
        _lock(at + MUTEX)
        if upper_half(load_word(at)) == value:
            _wait(at + CONDITION, at + MUTEX)
        _unlock(at + MUTEX)

    @inner
    def wake(at, n):
        """Wake all that sleep; the word has changed."""
        _lock(at + MUTEX)
        _broadcast(at + CONDITION)
        _unlock(at + MUTEX)
