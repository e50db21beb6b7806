"""Arguments of ops as words of memory, and back as arrays and numbers.

Arrays are passed as their address, shape and strides, whatever their layout, so that an op is compiled once.
"""
import operator
import struct

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from pydsa.backends.cpu.team.team import Task
from pydsa.backends.cpu.vectors.simd import I64, INTP, pointer

FLOAT = types.float64
_signatures = {}        # key_of() of all arguments -> their Signature


class Signature(tuple):
    """The types of an op's arguments, whose hash is computed once.

    That of a type is Python code; a step of eight conversations has 400 calls.
    """

    def __hash__(self):
        if not hasattr(self, "_hash"):
            self._hash = super().__hash__()
        return self._hash


def signature_of(args):
    """The Signature of arguments, one object for all of these types."""
    key = tuple([key_of(a) for a in args])
    found = _signatures.get(key)
    if found is None:
        found = _signatures[key] = Signature(kind_of(a) for a in args)
    return found


def key_of(argument):
    """What tells the kind of an argument, without numba's types."""
    if isinstance(argument, np.ndarray):
        return argument.dtype, argument.ndim
    if isinstance(argument, tuple):
        return type(argument), *[key_of(a) for a in argument]
    return type(argument)


def kind_of(argument):
    """The type as which kernels see an argument: arrays have any strides."""
    if isinstance(argument, np.ndarray):
        return types.Array(numba.from_dtype(argument.dtype), argument.ndim, "A")
    if isinstance(argument, tuple):
        return types.NamedTuple([kind_of(a) for a in argument], type(argument))
    if isinstance(argument, (bool, np.bool_)):
        return types.boolean
    return FLOAT if isinstance(argument, (float, np.floating)) else types.int64


def words_of(argument):
    """The words of an argument in a record, ints."""
    if isinstance(argument, np.ndarray):
        return [argument.ctypes.data, *argument.shape, *argument.strides]
    if isinstance(argument, tuple):
        return [word for a in argument for word in words_of(a)]
    if isinstance(argument, (float, np.floating)):
        return list(struct.unpack("q", struct.pack("d", argument)))
    return [operator.index(argument) if not isinstance(argument, np.bool_) else int(argument)]


def reader(signature):
    """An intrinsic read(record, *task's fields).

    It returns a tuple of the arguments of an op with this signature, and its Task.
    """
    task = types.NamedUniTuple(types.int64, len(Task._fields), Task)
    result = types.Tuple([*signature, task])

    @intrinsic
    def read(typingctx, record, index, thread, n_threads, scratch, coming):
        def codegen(context, builder, _, args):
            words = _Words(context, builder, args[0])
            values = [words.value(kind) for kind in signature]
            return context.make_tuple(builder, result, [*values, context.make_tuple(builder, task, args[1:])])
        return result(*[types.int64] * 6), codegen
    return read


class _Words:
    """Emits loads of arguments from a record, one after the other."""

    def __init__(self, context, builder, record):
        self.context, self.builder, self.record, self.n = context, builder, record, 0

    def word(self):
        address = self.builder.add(self.record, INTP(8 * self.n))
        self.n += 1
        return self.builder.load(pointer(self.builder, address, I64), align=8)

    def value(self, kind):
        b = self.builder
        if isinstance(kind, types.NamedTuple):
            return self.context.make_tuple(b, kind, [self.value(k) for k in kind])
        if isinstance(kind, types.Array):
            array, data = self.context.make_array(kind)(self.context, b), self.word()
            shape, strides = ([self.word() for _ in range(kind.ndim)] for _ in "ab")
            size = self.context.get_abi_sizeof(self.context.get_data_type(kind.dtype))
            populate_array(array, data=b.inttoptr(data, array.data.type), shape=shape, strides=strides, itemsize=INTP(size), meminfo=None)
            return array._getvalue()
        if kind == FLOAT:
            return b.bitcast(self.word(), ir.DoubleType())
        return b.trunc(self.word(), ir.IntType(1)) if kind == types.boolean else self.word()
