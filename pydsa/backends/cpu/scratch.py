"""Scratch memory of each thread: one buffer for a task, one for the kernel that it calls.

Buffers grow and stay: fresh memory from the system costs a page fault for every 4 KiB, which is more than most tasks take. They are found
by a symbol, so that kernels can be cached on disk. What the tasks of an op share lies elsewhere (Task.scratch).

Beside them is a mark that a choice, of keys or of experts, met NaN: a choice would hide it.
"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.arrays import LINE, align, by_symbol
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.vectors.simd import I8, INTP, i64_at, store
from pydsa.machine.cores import MOST_THREADS


# The mark; then address, aligned address and bytes of each buffer, two a thread
BUFFERS = np.zeros((1 + 2 * MOST_THREADS, 3), np.int64)
_buffers = by_symbol("pydsa_scratch", BUFFERS)


@intrinsic
def _allocate(typingctx, n):
    """Allocate n bytes with numba's allocator; return 0 on failure."""
    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I8.as_pointer(), [INTP]), "NRT_Allocate")
        return builder.ptrtoint(builder.call(function, args), INTP)
    return types.intp(types.intp), codegen


@intrinsic
def _free(typingctx, address):
    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [I8.as_pointer()]), "NRT_Free")
        builder.call(function, [builder.inttoptr(args[0], I8.as_pointer())])
        return context.get_dummy_value()
    return types.void(types.intp), codegen


@inner
def mark_nan():
    """Mark that a choice met a value that is not finite."""
    store(_buffers(), 0, np.int64(1))


def forget_buffers():
    """Leave all buffers to whoever had them; new ones are made."""
    BUFFERS[:] = 0


def nan_met():
    """Whether a choice met NaN or infinity since the last call."""
    met = bool(BUFFERS[0, 0])
    BUFFERS[0, 0] = 0
    return met


@inner
def thread_scratch(thread, n):
    """Return the address of n bytes, aligned to 64, for a thread's kernel.

    The memory is reused if it is large enough.
    """
    return _reserve(2 * thread, n)


@inner
def task_scratch(thread, n):
    """Return the address of n bytes, aligned to 64, for a thread's task.

    Kernels that the task calls leave it alone.
    """
    return _reserve(2 * thread + 1, n)


@inner
def _reserve(buffer, n):
    at = _buffers() + 24 * (1 + buffer)
    if i64_at(at, 16) < n:
        n += n // 4
        if i64_at(at, 0):
            _free(i64_at(at, 0))
        memory = _allocate(n + LINE)
        store(at, 0, memory)
        store(at, 8, align(memory))
        store(at, 16, n if memory else 0)
    return i64_at(at, 8)
