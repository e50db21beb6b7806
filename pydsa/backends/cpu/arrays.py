"""Array views of memory, and the addresses of arrays."""
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner


def _pointer_to(dtype):
    @intrinsic
    def pointer_to(typingctx, address):
        """Cast an address to a pointer that carray takes.

        Used for contiguous rows inside arrays of any strides.
        """
        return (types.CPointer(dtype)(types.intp), lambda context, builder, signature, args: builder.inttoptr(
            args[0], context.get_value_type(types.CPointer(dtype))))
    return pointer_to


floats_pointer, uints_pointer, ints_pointer = _pointer_to(types.float32), _pointer_to(types.uint32), _pointer_to(types.int64)
marks_pointer, words_pointer = _pointer_to(types.uint16), _pointer_to(types.uint64)

LINE = 64       # bytes of a cache line


def by_symbol(name, array):
    """A function of kernels that returns an array's address.

    They find it by a symbol, so that they can be cached on disk.
    """
    llvm.add_symbol(name, array.ctypes.data)

    @intrinsic
    def address_of(typingctx):
        def codegen(context, builder, signature, args):
            if name not in builder.module.globals:
                ir.GlobalVariable(builder.module, ir.IntType(8), name).linkage = "external"
            return builder.ptrtoint(builder.module.globals[name], context.get_value_type(types.intp))
        return types.intp(), codegen
    return address_of


@inner
def align(n):
    """Round a number of bytes, or an address, up to whole cache lines."""
    return (n + LINE - 1) // LINE * LINE


@inner
def address(array):
    """Return the address of an array's first element, as a signed integer.

    Numba's ctypes.data is unsigned; added to a signed integer it becomes a float.
    """
    return np.int64(array.ctypes.data)


@inner
def contiguous(values):
    """View a row as a contiguous array.

    The compiler does not know that the stride of `values` is one element; it knows it of the view.
    """
    return carray(floats_pointer(address(values)), (values.size,))


@inner
def floats_at(address, n_rows, n_columns):
    """View memory at an address as a float32 array [n_rows, n_columns]."""
    return carray(floats_pointer(address), (n_rows, n_columns))


@inner
def uints_at(address, n):
    """View memory at an address as a uint32 array [n]."""
    return carray(uints_pointer(address), (n,))


@inner
def ints_at(address, n):
    """View memory at an address as an int64 array [n]."""
    return carray(ints_pointer(address), (n,))


@inner
def marks_at(address, n):
    """View memory at an address as a uint16 array [n]."""
    return carray(marks_pointer(address), (n,))


@inner
def words_at(address, n):
    """View memory at an address as a uint64 array [n]."""
    return carray(words_pointer(address), (n,))
