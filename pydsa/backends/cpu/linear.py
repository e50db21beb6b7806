"""Products with GGUF weights, in place: rows of blocks times rows of activations.

For a few tokens quantized weights are multiplied block by block as the file stores them, each weight byte read once. For many, and for
other weights, a pair of functions of a Weight does it: `prepare` lays activations out, `times` multiplies unpacked tiles of rows with
them. They are those of float_rows.py, of word_rows.py, or where the CPU has AMX of byte_rows.py.
"""
import numpy as np
from numba import prange

from pydsa.backends.cpu import amx
from pydsa.backends.cpu.microkernels import address, n_threads
from pydsa.backends.cpu.scratch import callers_scratch
from pydsa.jit import call_word_function, inner, kernel
from pydsa.quants.block import CHUNK

GROUP = 256 if amx.HERE else 128        # rows at most that are multiplied with many tokens at a time: activations are fetched once for all
FEW = 3                 # tokens up to which blocks are not unpacked
NEAR = 16               # rows that these tokens take turns on, within a first-level cache
PIECE = 16              # tokens that are laid out at a time


@inner
def addresses(first, stride, n):
    """first, first + stride, ...: where the rows of an array begin."""
    at = np.empty(n, np.int64)
    for i in range(n):
        at[i] = first + i * stride
    return at


@inner
def is_few(w, n_tokens):
    """Whether blocks are multiplied as they lie."""
    return w.dot != 0 and n_tokens <= FEW


@inner
def pieces(n_tokens):
    """The pieces of 16 tokens, the last one of fewer."""
    return (n_tokens + PIECE - 1) // PIECE


@inner
def piece_bytes(w, n_in):
    """What a piece of tokens takes as `prepare` lays it out."""
    return PIECE * ((n_in + 255) // 256) * w.prepared


@inner
def rounded_bytes(n_in):
    """What a token takes as round_input leaves it."""
    return (n_in + 255) // 256 * CHUNK


@inner
def round_input(w, x, n_in, out):
    """A token's n_in activations at the address x as chunks, in the order in which w's blocks are multiplied."""
    call_word_function(w.round_row, (x, n_in, w.order, out, CHUNK))


@inner
def few_rows(w, rows, n_rows, n_in, x, n_tokens, out, out_stride):
    """out[t][r] = row r . rounded token t, for a few tokens: n_rows rows at an address, each read once from memory."""
    n, row_bytes = n_in // w.block, n_in // w.block * w.block_bytes
    together = n_rows if n_tokens == 1 else NEAR
    for r in range(0, n_rows, together):
        for t in range(n_tokens):
            call_word_function(w.dot, (rows + r * row_bytes, min(together, n_rows - r), n, x + t * rounded_bytes(n_in),
                                       out + t * out_stride + 4 * r))


@inner
def prepare(w, x_at, piece, n_tokens, n_in, out):
    """Lay out a piece of n_tokens tokens; at x_at lie the addresses of their activations."""
    call_word_function(w.prepare, (x_at, piece * PIECE, n_tokens, n_in, out))


@inner
def many_rows(w, rows, n_rows, n_in, x, n_tokens, out_at):
    """out_at[t][r] = row r . token t, for tokens laid out at x, and an int64 array of addresses."""
    row_bytes = n_in // w.block * w.block_bytes
    call_word_function(w.times, (
        w.unpack, w.block, w.block_bytes, w.lows, w.bits, rows, n_rows, row_bytes, n_in, x, n_tokens, address(out_at)))


@inner
def rows_a_task(n_rows, few):
    """Rows that a thread takes at a time, the same for each: for a few tokens its share of all, which it reads in one stretch."""
    share = (n_rows + n_threads() - 1) // n_threads()
    if few:
        return max(4, share)
    turns = (share + GROUP - 1) // GROUP
    return ((share + turns - 1) // turns + 15) // 16 * 16


@kernel(parallel=True)
def linear(out, w, x):
    n_out, row_bytes = w.data.shape
    n_tokens, n_in = x.shape
    few = is_few(w, n_tokens)
    room = callers_scratch(n_tokens * rounded_bytes(n_in) if few else pieces(n_tokens) * piece_bytes(w, n_in))
    x_at = addresses(address(x), x.strides[0], n_tokens)
    if few:
        for t in range(n_tokens):
            round_input(w, x_at[t], n_in, room + t * rounded_bytes(n_in))
    else:
        for piece in prange(pieces(n_tokens)):
            prepare(w, address(x_at), piece, n_tokens, n_in, room)
    size = rows_a_task(n_out, few)
    for task in prange((n_out + size - 1) // size):
        r = task * size
        rows, n = address(w.data) + r * row_bytes, min(size, n_out - r)
        if few:
            few_rows(w, rows, n, n_in, room, n_tokens, address(out) + 4 * r, out.strides[0])
        else:
            many_rows(w, rows, n, n_in, room, n_tokens, addresses(address(out) + 4 * r, out.strides[0], n_tokens))


@kernel(parallel=True)
def head_linear(out, w, x):
    n_head, n_out, row_bytes = w.data.shape
    n_tokens, n_in = x.shape[0], x.shape[2]
    few, parts = is_few(w, n_tokens), pieces(n_tokens)
    head_bytes = n_tokens * rounded_bytes(n_in) if few else parts * piece_bytes(w, n_in)
    room = callers_scratch(n_head * head_bytes)
    x_at = np.empty((n_head, n_tokens), np.int64)
    for h in range(n_head):
        for t in range(n_tokens):
            x_at[h, t] = address(x) + h * x.strides[1] + t * x.strides[0]
    size = rows_a_task(n_out, few)
    if n_head >= n_threads():
        size = n_out if few else min(n_out, GROUP)
    groups = (n_out + size - 1) // size
    if few:
        for i in range(n_head * n_tokens):
            round_input(w, x_at[i // n_tokens, i % n_tokens], n_in, room + i * rounded_bytes(n_in))
    else:
        for i in prange(n_head * parts):
            h = i // parts
            prepare(w, address(x_at[h]), i % parts, n_tokens, n_in, room + h * head_bytes)
    for task in prange(n_head * groups):
        h, r = task // groups, task % groups * size
        rows, n = address(w.data) + (h * n_out + r) * row_bytes, min(size, n_out - r)
        target = address(out) + h * out.strides[1] + 4 * r
        if few:
            few_rows(w, rows, n, n_in, room + h * head_bytes, n_tokens, target, out.strides[0])
        else:
            many_rows(w, rows, n, n_in, room + h * head_bytes, n_tokens, addresses(target, out.strides[0], n_tokens))
