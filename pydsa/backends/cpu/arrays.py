"""Arrays and the addresses of their memory."""
import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner


def _pointer_to(number):
    @intrinsic
    def pointer_to(typingctx, address):
        """An address as a pointer that carray takes: contiguous rows inside arrays of any strides."""
        return (types.CPointer(number)(types.intp), lambda context, builder, signature, args: builder.inttoptr(
            args[0], context.get_value_type(types.CPointer(number))))
    return pointer_to


floats_pointer, uints_pointer = _pointer_to(types.float32), _pointer_to(types.uint32)


@inner
def address(array):
    """Where an array begins, as a signed integer: numba's ctypes.data is unsigned, and added to a signed one becomes a float."""
    return np.int64(array.ctypes.data)


@inner
def contiguous(values):
    """A row whose stride the compiler does not know to be one element, as an array that it does."""
    return carray(floats_pointer(address(values)), (values.size,))


@inner
def floats_at(address, n_rows, n_columns):
    """A float32 array over memory at an address."""
    return carray(floats_pointer(address), (n_rows, n_columns))


@inner
def uints_at(address, n):
    return carray(uints_pointer(address), (n,))
