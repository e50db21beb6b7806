"""One token's norm, in one launch with what stands around it.

Before it the outputs of the chosen experts are weighted and added, and up to two sums are made. After it the row is rounded for products
with quantized weights, and multiplied with a matrix of float32: the router's, or that of the indexer's head weights. Every block makes the
norm for itself, and multiplies it with two rows, which it asked for before it waited for the row.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.int8x2.linear import pack_four
from pydsa.backends.cuda.intrinsics.device import SIMULATED, WARP, bits_float, device, load_four_f32, store_four_f32, sync, warp_sum
from pydsa.backends.cuda.intrinsics.division import divide, inverse_root
from pydsa.backends.cuda.intrinsics.instructions import let_later_begin, load_sixteen, wait_for_earlier
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


WIDE = 8 if SIMULATED else 1024     # threads of a block
MOST = 8 * WIDE                     # values of a row that it can have in its registers
WARP_BITS = WARP.bit_length() - 1
ROWS = 2                            # of the matrix, a block
PARTS, ALL_PARTS = 32, 96           # sums of warps, of the norm and of two products
ZERO, NO_BITS = np.float32(0), np.uint32(0)


@device
def load_eight(row, i, there, j, far):
    """Four values of a row from i on if `there`, and four from j on if `far`.

    Zeros stand for those that are not loaded: another thread may write them meanwhile.
    """
    a, b, c, d = load_four_f32(row, i) if there else (ZERO, ZERO, ZERO, ZERO)
    e, f, g, h = load_four_f32(row, j) if far else (ZERO, ZERO, ZERO, ZERO)
    return a, b, c, d, e, f, g, h


@device
def store_eight(row, i, there, j, far, values):
    """Store four values from i on if `there`, and four from j on if `far`."""
    if there:
        store_four_f32(row, i, values[0], values[1], values[2], values[3])
    if far:
        store_four_f32(row, j, values[4], values[5], values[6], values[7])


@device
def plus(x, y):
    """The sums of two tuples of eight."""
    return (x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3], x[4] + y[4], x[5] + y[5], x[6] + y[6], x[7] + y[7])


@device
def plus_times(x, y, w):
    """x + w y of two tuples of eight."""
    return (x[0] + w * y[0], x[1] + w * y[1], x[2] + w * y[2], x[3] + w * y[3], x[4] + w * y[4], x[5] + w * y[5], x[6] + w * y[6],
            x[7] + w * y[7])


@device
def dot_eight(x, y):
    """The sum of products of two tuples of eight."""
    return ((x[0] * y[0] + x[1] * y[1]) + (x[2] * y[2] + x[3] * y[3])) + ((x[4] * y[4] + x[5] * y[5]) + (x[6] * y[6] + x[7] * y[7]))


@device
def normed_by_block(values, factors, eps, n, parts, thread, n_threads):
    """rms_norm of a row of n values, of which each thread has eight.

    The warps' sums are added by all warps at once, not one after the other. parts: shared memory with one float32 per warp.
    """
    x, lane = warp_sum(dot_eight(values, values)), thread & WARP - 1
    if lane == 0:
        parts[thread >> WARP_BITS] = x
    sync()
    total = warp_sum(parts[lane] if lane < n_threads // WARP else ZERO)
    f = inverse_root(divide(total, np.float32(n)) + eps)
    return (values[0] * f * factors[0], values[1] * f * factors[1], values[2] * f * factors[2], values[3] * f * factors[3],
            values[4] * f * factors[4], values[5] * f * factors[5], values[6] * f * factors[6], values[7] * f * factors[7])


@device
def pack_eight(packed, scales, sums, thread, there, far, v, n_threads):
    """Round a thread's eight values to the Int8x2 of the one row."""
    pack_four(packed, scales, sums, 0, thread, there, v[0], v[1], v[2], v[3])
    if scales.shape[1] > n_threads >> 3:        # the same in all threads
        pack_four(packed, scales, sums, 0, thread + n_threads, far, v[4], v[5], v[6], v[7])


@device
def weights_of(matrix, at, thread, there, far):
    """The eight weights of the row at a byte that meet a thread's values."""
    a, b, c, d = load_sixteen(matrix, at + 16 * thread) if there else (NO_BITS, NO_BITS, NO_BITS, NO_BITS)
    e, f, g, h = load_sixteen(matrix, at + 16 * (thread + WIDE)) if far else (NO_BITS, NO_BITS, NO_BITS, NO_BITS)
    return (bits_float(a), bits_float(b), bits_float(c), bits_float(d), bits_float(e), bits_float(f), bits_float(g), bits_float(h))


@device
def weighted(outputs, weights, i, there, j, far):
    """A thread's eight values of the weighted sum of rows, two at a time."""
    n, total = np.int32(weights.shape[0]), (ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO)
    for row in range(0, n, 2):
        other = row + 1 if row + 1 < n else row
        a, b = load_eight(outputs[row], i, there, j, far), load_eight(outputs[other], i, there, j, far)
        total = plus_times(total, a, weights[row])
        if row + 1 < n:
            total = plus_times(total, b, weights[other])
    return total


@device
def put_products(product, row, a, b, v, parts, thread):
    """product[row] and the next = the sums of a v and b v over the block."""
    s, t, lane = warp_sum(dot_eight(a, v)), warp_sum(dot_eight(b, v)), thread & WARP - 1
    if lane == 0:
        parts[PARTS + (thread >> WARP_BITS)], parts[2 * PARTS + (thread >> WARP_BITS)] = s, t
    sync()
    there = lane < WIDE // WARP
    s, t = warp_sum(parts[PARTS + lane] if there else ZERO), warp_sum(parts[2 * PARTS + lane] if there else ZERO)
    if thread == 0:
        product[row] = s
        if row + 1 < product.shape[0]:
            product[row + 1] = t


@kernel("f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], i4, b1, f4[:,::1], f4[::1], f4[::1], f4, u1[::1], i8, f4[::1], u4[:,::1], "
        "f4[:,::1], f4[:,::1]", WIDE, dependent=True)
def add_norm_row(out, second, first, x, y, z, n_added, joins, outputs, weights, w, eps, matrix, row_bytes, product, packed, scales, sums):
    """out = rms_norm(x + y + z) and its Int8x2; n_added of the adds are done.

    first = x + y and second = first + z are stored too, by the first block. joins: x, the sum of weights times rows of `outputs`, is
    stored as well. product = matrix out. A thread has its values in registers: all loads are under way at once, each value is read once.
    """
    thread, n_fours, row = cuda.threadIdx.x & WIDE - 1, x.shape[0] >> 2, ROWS * cuda.blockIdx.x
    parts, stores, multiplies = cuda.shared.array(ALL_PARTS, np.float32), row == 0, product.shape[0] > 0
    i, there, j, far = 4 * thread, thread < n_fours, 4 * (thread + WIDE), thread + WIDE < n_fours
    factors = load_eight(w, i, there, j, far)
    a = weights_of(matrix, row * row_bytes, thread, there and multiplies, far and multiplies)
    last = min(row + 1, product.shape[0] - 1)
    b = weights_of(matrix, last * row_bytes, thread, there and multiplies, far and multiplies)
    wait_for_earlier()
    let_later_begin()
    if joins:
        values = weighted(outputs, weights, i, there, j, far)
        store_eight(x, i, there and stores, j, far and stores, values)
    else:
        values = load_eight(x, i, there, j, far)
    if n_added == 1:
        values = plus(values, load_eight(y, i, there, j, far))
        store_eight(first, i, there and stores, j, far and stores, values)
    if n_added == 2:
        added, behind = load_eight(y, i, there, j, far), load_eight(z, i, there, j, far)
        values = plus(values, added)
        store_eight(first, i, there and stores, j, far and stores, values)
        values = plus(values, behind)
        store_eight(second, i, there and stores, j, far and stores, values)
    v = normed_by_block(values, factors, eps, x.shape[0], parts, thread, WIDE)
    if multiplies:      # first: the weights are in registers
        put_products(product, row, a, b, v, parts, thread)
    if stores:
        store_eight(out, i, there, j, far, v)
        pack_eight(packed, scales, sums, thread, there, far, v, WIDE)


def norm_is_wide(added, out, w):
    """Whether add_norm takes these rows: one, short enough, aligned to 16 bytes.

    They are float32 of a multiple of 32 values.
    """
    return len(out) == 1 and out.shape[1] <= MOST and all(a.span[0] % 16 == 0 for a in (*added, out, w))


class Joined(NamedTuple):
    """The chosen experts' outputs [n, width], and their weights [1, n].

    Their sum is the first summand.
    """
    outputs: object
    weights: object


def add_norm(added, out, w, eps, joined, product, made):
    """rms_norm of a sum, and its Int8x2.

    added: [x], [x, y, x + y] or [x, y, x + y, z, x + y + z]; the last one is normed. norm_is_wide() must hold for them. joined: a Joined
    that makes x, or None. product: a row [1, n] and a matrix of F32 that makes it of the norm, or None; then no output may overlap what is
    read, and neither with `joined`.
    """
    x, y, first, z, second = [a[0] for a in added] + [added[0][0]] * (5 - len(added))
    outputs, weights = joined or (scratch("nothing", (1, 1), np.float32),) * 2
    row, matrix = product or (scratch("nothing", (1, 1), np.float32)[:, :0], None)
    data, row_bytes = (matrix.data, matrix.row_bytes) if matrix else (scratch("nothing", (1,), np.uint8), 0)
    add_norm_row(blocks_for(row.shape[1], ROWS), out[0], second, first, x, y, z, (len(added) - 1) // 2, joined is not None, outputs,
                 weights[0], w, eps, data, row_bytes, row[0], *made)
