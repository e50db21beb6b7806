"""What one token's step does in fewer launches: sums, norms and products of gates, rounded at once for the matrices that take them.

A launch takes a GPU as long as a million bytes of weights, and most ops of one token are smaller. Each kernel here does what several ops do
one after the other, to the last bit, and leaves all that they leave.
"""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.device import SIMULATED, block_sum, exp
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.norm import sigmoid_times
from pydsa.backends.cuda.one_token import round_four

THREADS = 8 if SIMULATED else 256
ZERO = np.float32(0)


@kernel("f4[:,:], f4[:,:], f4[:,:], f4[:,:], f4[:,:], f4[:,:], i4, f4[:], f4, u4[:,:], f4[:,:], f4[:,:]", THREADS)
def add_norm_rows(out, second, first, x, y, z, n_added, w, eps, words, scales, sums):
    """first = x + y and second = first + z, of which n_added are done; out = the rms_norm of the last, and its Rounded.

    A block has one row, of a multiple of 32 numbers.
    """
    t, thread, parts, n = cuda.blockIdx.x, cuda.threadIdx.x, cuda.shared.array(32, np.float32), x.shape[1]
    total = ZERO
    for i in range(thread, n, THREADS):
        value = x[t, i]
        if n_added > 0:
            value += y[t, i]
            first[t, i] = value
        if n_added > 1:
            value += z[t, i]
            second[t, i] = value
        total += value * value
    total = block_sum(total, parts, thread, THREADS)
    factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(n) + eps))
    source = second if n_added > 1 else first if n_added > 0 else x
    for begin in range(0, n // 4, THREADS):
        four = begin + thread
        a, b, c, e = ZERO, ZERO, ZERO, ZERO
        if four < n // 4:
            i = 4 * four
            a, b, c, e = (source[t, i] * factor * w[i], source[t, i + 1] * factor * w[i + 1], source[t, i + 2] * factor * w[i + 2],
                          source[t, i + 3] * factor * w[i + 3])
            out[t, i], out[t, i + 1], out[t, i + 2], out[t, i + 3] = a, b, c, e
        round_four(words, scales, sums, t, four, four < n // 4, a, b, c, e)


@kernel("f4[:,:], f4[:,:], f4[:,:], u4[:,:], f4[:,:], f4[:,:]", THREADS)
def silu_mul_rounded(out, gate, up, words, scales, sums):
    """out = gate sigmoid(gate) up, and its Rounded; a thread makes four numbers."""
    t, four = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    there, i = four < out.shape[1] // 4, 4 * four
    a, b, c, e = ZERO, ZERO, ZERO, ZERO
    if there:
        a, b, c, e = (sigmoid_times(gate[t, i], up[t, i]), sigmoid_times(gate[t, i + 1], up[t, i + 1]), sigmoid_times(gate[t, i + 2], up[t, i + 2]),
                      sigmoid_times(gate[t, i + 3], up[t, i + 3]))
        out[t, i], out[t, i + 1], out[t, i + 2], out[t, i + 3] = a, b, c, e
    round_four(words, scales, sums, t, four, there, a, b, c, e)


def add_norm(added, out, w, eps, made):
    """rms_norm of the last sum; added: one array that is normed as it is, or [x, y, x + y] or [x, y, x + y, z, x + y + z]."""
    x, y, first, z, second = added + [added[0]] * (5 - len(added))
    add_norm_rows(out.shape[0], out, second, first, x, y, z, (len(added) - 1) // 2, w, eps, *made)


def silu_mul_round(out, gate, up, made):
    """silu_mul, and its Rounded."""
    silu_mul_rounded((out.shape[0], blocks_for(out.shape[1] // 4, THREADS)), out, gate, up, *made)
