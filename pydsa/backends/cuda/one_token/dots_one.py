"""One token's products: 64 weights of a lane times activations."""
import numpy as np

from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.int8x2.linear import LOW, TILE_U32
from pydsa.backends.cuda.intrinsics.device import bits_float, device, dp4a
from pydsa.backends.cuda.intrinsics.instructions import load_eight, load_four, load_sixteen
from pydsa.quants import TYPES


LOW_BYTES = 4 * LOW                     # from the high bytes of a quad to its low ones
ZERO = np.float32(0)


@device
def quads_of(packed, first, second, far, plane):
    """The quads at the bytes `first`, `second`, and `far` from each."""
    first, second = first + plane, second + plane
    return (load_sixteen(packed, first), load_sixteen(packed, second), load_sixteen(packed, first + far),
            load_sixteen(packed, second + far))


@device
def place_of_lane(c, strided):
    """The byte of a row of activations at which a lane's first quad begins.

    It is that of sixteens 4 c to 4 c + 3, or of those of one half of four groups. See place_of_quad.
    """
    at = 4 * TILE_U32 * (c >> 4) + 512 * (c >> 3 & 1)
    if strided:
        return np.int32(at + 32 * (c >> 1 & 3) + 144 * (c & 1))
    return np.int32(at + 16 * (c & 7))


@device
def adjacent_quads(packed, at, second):
    """High and low quads of four adjacent sixteens from a byte on.

    See place_of_lane.
    """
    other = (at ^ 16) + 128
    return quads_of(packed, at, other, 256 * second, 0), quads_of(packed, at, other, 256 * second, LOW_BYTES)


@device
def strided_quads(packed, at):
    """adjacent_quads of the sixteens of one half of four groups."""
    a, b, e, f = quads_of(packed, at, at ^ 16, 256, 0)
    h, i, j, k = quads_of(packed, at, at ^ 16, 256, LOW_BYTES)
    return (a, e, b, f), (h, j, i, k)


@device
def two_floats(array, at):
    """Two float32 at a byte of an array."""
    a, b = load_eight(array, at)
    return bits_float(a), bits_float(b)


@device
def four_floats(array, at):
    """Four float32 at a byte of an array."""
    a, b, c, d = load_sixteen(array, at)
    return bits_float(a), bits_float(b), bits_float(c), bits_float(d)


@device
def float_at(array, at):
    """The float32 at a byte of an array."""
    return bits_float(load_four(array, at))


def make_activations(name):
    """A type's function that loads what 64 weights are multiplied with.

    These are high quads, low quads, scales and sums of four sixteens. x_at, f_at: the bytes of packed and scales at which they begin. half:
    which half of four groups it is, where the type is strided. second: see blocks/__init__.py.
    """
    entry, whole = GROUPED[name], TYPES[name].size > 32         # rows are multiples of 64 numbers
    needs_sums = entry.offsets or entry.lane.bias > 0

    @device
    def adjacent(packed, scales, sums, x_at, f_at, half, second):
        high, low = adjacent_quads(packed, x_at, second)
        if whole:
            d, d1 = two_floats(scales, f_at)
        else:
            d, d1 = float_at(scales, f_at), float_at(scales, f_at + 4) if second > 0 else ZERO
        a, b, e, f = ZERO, ZERO, ZERO, ZERO
        if needs_sums:
            a, b = two_floats(sums, 2 * f_at)
            if whole or second > 0:
                e, f = two_floats(sums, 2 * f_at + 8)
        return high, low, (d, d, d1, d1), (a, b, e, f)

    @device
    def strided(packed, scales, sums, x_at, f_at, half, second):
        high, low = strided_quads(packed, x_at)
        y, first = (ZERO, ZERO, ZERO, ZERO), 2 * f_at + 4 * half
        if needs_sums:
            y = float_at(sums, first), float_at(sums, first + 8), float_at(sums, first + 16), float_at(sums, first + 24)
        return high, low, four_floats(scales, f_at), y
    return strided if entry.lane.strided else adjacent


@device
def add_sixteen(w, x, total):
    """total + w x: sixteen int8 of each."""
    a, b, c, d = w
    x0, x1, x2, x3 = x
    return dp4a(d, x3, dp4a(c, x2, dp4a(b, x1, dp4a(a, x0, total))))


@device
def with_low(high, bias):
    """256 times the sum of products with high bytes, and a bias.

    The sum of products with low bytes begins with it.
    """
    return np.int32(np.int32(high * np.int32(256)) + bias)


def make_dot(entry):
    """A type's function that multiplies 64 weights; entry: of GROUPED."""
    lane, offsets = entry.lane, entry.offsets
    weights, bias, pairs = lane.weights, -lane.bias, not lane.strided and not entry.halves      # pairs of sixteens have one scale

    @device
    def bias_of(total):
        return np.int32(np.int32(total) * np.int32(bias)) if bias else np.int32(0)

    @device
    def dot(data, row, c, second, x):
        """64 weights of a row times what activations() returns."""
        high, low, f, y = x
        w0, w1, w2, w3, d, m = weights(data, row, c, second)
        if pairs:
            p = add_sixteen(w1, high[1], add_sixteen(w0, high[0], np.int32(0)))
            q = add_sixteen(w3, high[3], add_sixteen(w2, high[2], np.int32(0)))
            p = add_sixteen(w1, low[1], add_sixteen(w0, low[0], with_low(p, np.int32(bias_of(y[0]) + bias_of(y[1])))))
            q = add_sixteen(w3, low[3], add_sixteen(w2, low[2], with_low(q, np.int32(bias_of(y[2]) + bias_of(y[3])))))
            a, b = d[0] * np.float32(np.int32(p)), d[2] * np.float32(np.int32(q))
            if offsets:
                a -= m[0] * (y[0] + y[1])
                b -= m[2] * (y[2] + y[3])
            return f[0] * a + f[2] * b
        p = add_sixteen(w0, low[0], with_low(add_sixteen(w0, high[0], np.int32(0)), bias_of(y[0])))
        q = add_sixteen(w1, low[1], with_low(add_sixteen(w1, high[1], np.int32(0)), bias_of(y[1])))
        r = add_sixteen(w2, low[2], with_low(add_sixteen(w2, high[2], np.int32(0)), bias_of(y[2])))
        s = add_sixteen(w3, low[3], with_low(add_sixteen(w3, high[3], np.int32(0)), bias_of(y[3])))
        a, b = d[0] * np.float32(np.int32(p)), d[1] * np.float32(np.int32(q))
        e, g = d[2] * np.float32(np.int32(r)), d[3] * np.float32(np.int32(s))
        if offsets:
            a -= m[0] * y[0]
            b -= m[1] * y[1]
            e -= m[2] * y[2]
            g -= m[3] * y[3]
        return (f[0] * a + f[1] * b) + (f[2] * e + f[3] * g)
    return dot
