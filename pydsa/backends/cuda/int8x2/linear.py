"""The activations of one token, rounded for products (gemv.py).

Activations are quantized to int16 with a scale per 32 values, stored as int8 pairs: x = scale (256 high + low), both bytes signed, the
largest magnitude 32,512. Weights and activations are multiplied as int8 by dp4a. Sums over 32 values are exact; only scales and sums of
groups are floats.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.block_sums import abs_bits
from pydsa.backends.cuda.intrinsics.device import (SIMULATED, WARP, bits_float, device, max_of_eight, nearest, pack_int8x2, sum_of_four,
                                                   warp_max_int)
from pydsa.backends.cuda.intrinsics.division import divide
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel
from pydsa.quants import INT8X2_MAX


PACK_THREADS = 8 if SIMULATED else 256  # threads of a packing block, four values each
TILE = 1024                             # values that are interleaved in Int8x2: 64 quads of high bytes, then those of low bytes
LOW = TILE // 4                         # uint32 from a quad of high bytes to that of low bytes
TILE_U32 = 2 * LOW
ZERO = np.float32(0)


class Int8x2(NamedTuple):
    """Rows of activations as int8 pairs: scale (256 high + low).

    A quad is the four uint32 of sixteen values. See place_of_quad.
    """
    packed: object      # uint32 [N, tiles * TILE_U32]
    scales: object      # float32 [N, n/32]
    sums: object        # float32 [N, n/16], sums of sixteen values in units of their scale: whole numbers


@device
def place_of_quad(q):
    """The uint32 at which quad q of a row's high bytes begins.

    Eight lanes of a warp that each take four quads read theirs from 128 bytes in one go, in both of these orders: lane c takes quads 4 c to
    4 c + 3, or quads 0, 2, 4, 6 from 8 (c >> 1) + (c & 1) on.
    """
    return (q >> 6) * TILE_U32 + (q & 32) * 4 + (q & 3) * 32 + (q >> 3 & 3) * 8 + ((q >> 2 ^ q) & 1) * 4


@device
def pack_four(packed, scales, sums, t, four, valid, a, b, c, e):
    """Quantize values 4 * four to 4 * four + 3 of row t: a, b, c, e.

    Seven adjacent lanes must call it with the rest of the group of 32. valid: whether to store the result. A group with a non-finite value
    gets a non-finite scale.
    """
    abs_max = bits_float(np.uint32(max_of_eight(max(max(abs_bits(a), abs_bits(b)), max(abs_bits(c), abs_bits(e))))))
    factor = divide(np.float32(INT8X2_MAX), abs_max) if abs_max > np.float32(1e-30) else ZERO
    a, b, c, e = nearest(a, factor), nearest(b, factor), nearest(c, factor), nearest(e, factor)
    total = sum_of_four(np.float32(a + b + c + e))
    if valid:
        at = place_of_quad(four >> 2) + (four & 3)
        packed[t, at], packed[t, at + LOW] = pack_int8x2(a, b, c, e)
        if four & 3 == 0:
            sums[t, four >> 2] = total
        if four & 7 == 0:
            scales[t, four >> 3] = divide(abs_max, np.float32(INT8X2_MAX))


@device
def head_scale(q, t, h, start, end, lane):
    """The factor that quantizes q[t, h, start:end] to int16, and the scale.

    One warp computes it. The scale is NaN if a value is not finite.
    """
    bits = np.int32(0)
    for i in range(start + lane, end, WARP):
        bits = max(bits, abs_bits(q[t, h, i]))
    abs_max = bits_float(np.uint32(warp_max_int(bits)))
    finite = abs_max < np.float32(np.inf)
    factor = np.float32(INT8X2_MAX) / abs_max if finite and abs_max > np.float32(1e-30) else ZERO
    return factor, abs_max / np.float32(INT8X2_MAX) if finite else np.float32(np.nan)


@device
def pack_head_four(q, t, h, i, factor, valid):
    """Quantize four values of q[t, h] from i on: high bytes, low bytes.

    Zeros unless `valid`.
    """
    a, b, c, e = (nearest(q[t, h, i], factor), nearest(q[t, h, i + 1], factor), nearest(q[t, h, i + 2], factor),
                  nearest(q[t, h, i + 3], factor)) if valid else (0, 0, 0, 0)
    return pack_int8x2(a, b, c, e)


@kernel("u4[:,:], f4[:,:], f4[:,:], f4[:,:]", PACK_THREADS)
def pack_rows(packed, scales, sums, x):
    """Pack rows to Int8x2. Four values per thread."""
    t, four, n = cuda.blockIdx.x, cuda.blockIdx.y * PACK_THREADS + cuda.threadIdx.x, x.shape[1] // 4
    i = 4 * min(four, n - 1)
    pack_four(packed, scales, sums, t, four, four < n, x[t, i], x[t, i + 1], x[t, i + 2], x[t, i + 3])


def scratch_for(x, name=""):
    """Scratch memory for the Int8x2 of rows. Each name has its own."""
    return scratch_for_rows(*x.shape, name)


def scratch_for_rows(n_rows, n, name=""):
    """scratch_for() of n_rows rows of n values."""
    return Int8x2(scratch(("x packed", name), (n_rows, blocks_for(n, TILE) * TILE_U32), np.uint32),
                  scratch(("x scales", name), (n_rows, n // 32), np.float32), scratch(("x sums", name), (n_rows, n // 16), np.float32))


def pack_into(x, made):
    """Pack rows of any strides into `made`, an Int8x2."""
    pack_rows((x.shape[0], blocks_for(x.shape[1] // 4, PACK_THREADS)), *made, x)


def pack(x):
    """Pack activations, rows of any strides, to Int8x2 in scratch memory."""
    made = scratch_for(x)
    pack_into(x, made)
    return made
