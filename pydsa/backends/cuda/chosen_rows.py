"""What the kernels of one token's attention to chosen rows share: their parameters, and what a block does.

A block has some chosen rows and HEADS heads. It asks for all its rows at once, rounds its queries meanwhile, and uses the rows twice from
shared memory: as keys, and as values. So it waits for memory twice: for the numbers of its rows, then for the rows.

Rows are as the caches of DeepSeek's models have them: VALUE numbers that are key and value, and ROTATED ones that are only key.

Parameters of the kernels, all arrays flat: sums [splits, n_head, VALUE], of values times weights, not yet divided; stats [splits, n_head,
2], the greatest score times log2(e), -inf if there is no key, and the sum of weights; q [n_head, WIDTH]; data, the cache's bytes;
row_bytes; indices, the chosen rows, negative where there is none; n_head; scale, times log2(e).
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.device import device
from pydsa.backends.cuda.instructions import all_copies, commit_copies
from pydsa.backends.cuda.launch import kernel
from pydsa.backends.cuda.shared_memory import shared_address, store_float

HEADS = 32                      # of a block
VALUE, ROTATED = 512, 64        # numbers of a row's two parts
WIDTH = VALUE + ROTATED
SLICES = 4                      # warps that share a score, each with a part of the numbers
SIGNATURE = "f4[::1], f4[::1], f4[::1], u1[::1], i8, i4[::1], i4, f4"
U, ZERO, MINUS_INFINITY = np.uint32, np.float32(0), np.float32(-np.inf)


class Shape:
    """Where what is in a block's shared memory, in bytes from its beginning.

    keys: the rows of a block, 64 or 32. A row has eight threads. row, query, weights: bytes of a row, of a rounded query with its scales,
    and of one of two planes of a head's weights. Pitches are odd multiples of 16 bytes: fragments are loaded without bank conflicts.
    """

    def __init__(self, keys, row, query, weights):
        self.keys, self.threads, self.row = keys, 8 * keys, row
        self.pitch, self.q_pitch, self.weight_pitch = (16 * (-(-n // 16) | 1) for n in (row, query, weights))
        self.score_pitch = 4 * keys + 32
        self.queries = keys * self.pitch
        self.scores = self.queries + HEADS * self.q_pitch
        self.weights = self.scores + SLICES * HEADS * self.score_pitch
        self.bias = self.weights + 2 * HEADS * self.weight_pitch
        self.factors = self.bias + 4 * keys
        self.size = self.factors + 4 * HEADS


def make_ask(shape, copy, unit):
    """The function that starts a block's copies, of `unit` bytes each."""
    keys, pitch, bias, units = shape.keys, shape.pitch, shape.bias, shape.row // unit

    @device
    def ask(base, data, row_bytes, indices, split, thread):
        """Start the copies of a block's rows; zeros stand for those that are not."""
        row, part, key = thread >> U(3), np.int64(thread & U(7)), np.int64(-1)
        place = np.int64(split) * keys + np.int64(row)
        if place < indices.shape[0]:
            key = np.int64(indices[place & 0x7FFFFFFF])
        source, n = max(key, np.int64(0)) * row_bytes + unit * part, U(unit) if key >= 0 else U(0)
        to = base + row * U(pitch) + U(unit) * U(part)
        for i in range((units + 7) // 8):
            if 8 * i + 7 < units or 8 * i + part < units:
                copy(to + U(8 * unit * i), data, source + 8 * unit * i, n)
        commit_copies()
        if part == 0:
            store_float(base + U(bias) + U(4) * row, ZERO if key >= 0 else MINUS_INFINITY)
    return ask


def make_attend(storage, shape, copy, unit, round_queries, scores, softmax, add_values):
    """The kernel of a cache's storage: its steps, on the rows of a Shape."""
    ask, lanes, warps = make_ask(shape, copy, unit), shape.keys // 4, shape.keys // 4

    def attend(sums, stats, q, data, row_bytes, indices, n_head, scale):
        """Sums of values and statistics of a block's chosen rows: see chosen_rows.py."""
        thread, split, head = U(cuda.threadIdx.x), cuda.blockIdx.x, HEADS * cuda.blockIdx.y
        base = shared_address(cuda.shared.array(0, np.uint32))
        ask(base, data, row_bytes, indices, split, thread)
        round_queries(base, q, head, n_head, thread)
        all_copies()
        cuda.syncthreads()
        scores(base, thread >> U(5), thread & U(31))
        cuda.syncthreads()
        row, n_rows = np.int64(split) * n_head + head, n_head - head
        h = np.int64(thread // U(lanes))
        softmax(base, scale, stats, 2 * (row + h), h < n_rows, thread)
        cuda.syncthreads()
        for column in range(thread >> U(5), VALUE // 32, warps):
            add_values(base, sums, row, n_rows, U(32) * U(column), thread & U(31))
    name = f"attend_one_{storage}{'' if shape.keys == 64 else '_narrow'}"
    return kernel(SIGNATURE, shape.threads, name, shared=shape.size)(attend)
