"""Matrix products with GGUF weights in place: rows of blocks times tokens.

For a few tokens (gemv), quantized weights are multiplied block by block as stored in the file, each weight byte read once. For many tokens
(gemm), and for other weights, a pair of functions of a Weight is called: `pack` packs activations, `matmul` multiplies unpacked tiles of
rows with them. They are those of f32/linear.py, of int16/linear.py, or with AMX of int8x2/linear.py.
"""
import numpy as np
from numba import prange

from pydsa.backends.cpu import amx
from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.blocks.block import SUPERBLOCK
from pydsa.backends.cpu.jit import call_intp_function, inner, kernel
from pydsa.backends.cpu.jobs import MatmulJob, call_kernel
from pydsa.backends.cpu.scratch import caller_scratch
from pydsa.backends.cpu.threads import n_threads


MAX_TASK_ROWS = 256 if amx.HERE else 128        # the most rows of a task of gemm: activations are fetched once for all of them
GEMV_TOKENS = 3                 # the most tokens for which blocks are not unpacked
GEMV_ROWS = 16               # rows over which these tokens take turns, within a first-level cache
PANEL_TOKENS = 16              # tokens that are packed at a time, a panel


@inner
def addresses(first, stride, n):
    """Return first, first + stride, ...: the addresses of n rows."""
    at = np.empty(n, np.int64)
    for i in range(n):
        at[i] = first + i * stride
    return at


@inner
def uses_gemv(w, n_tokens):
    """Whether blocks are multiplied as stored."""
    return w.dot != 0 and n_tokens <= GEMV_TOKENS


@inner
def count_panels(n_tokens):
    """Count the panels of 16 tokens; the last one may have fewer."""
    return (n_tokens + PANEL_TOKENS - 1) // PANEL_TOKENS


@inner
def panel_bytes(w, n_in):
    """Count the bytes of a panel of tokens packed by `pack`."""
    return PANEL_TOKENS * ((n_in + 255) // 256) * w.packed_bytes


@inner
def rounded_bytes(n_in):
    """Count the bytes of a token rounded by round_input."""
    return (n_in + 255) // 256 * SUPERBLOCK


@inner
def round_input(w, x, n_in, out):
    """Round a token's n_in activations at the address x to superblocks.

    They are permuted to the order in which w's blocks are multiplied.
    """
    call_intp_function(w.round_row, (x, n_in, w.order, out, SUPERBLOCK))


@inner
def gemv_rows(w, rows, n_rows, n_in, x, n_tokens, out, out_stride):
    """Compute out[t][r] = row r . rounded token t, for a few tokens.

    n_rows rows at an address, each read once from memory.
    """
    n, row_bytes = n_in // w.block, n_in // w.block * w.block_bytes
    batch = n_rows if n_tokens == 1 else GEMV_ROWS
    for r in range(0, n_rows, batch):
        for t in range(n_tokens):
            call_intp_function(w.dot, (rows + r * row_bytes, min(batch, n_rows - r), n, x + t * rounded_bytes(n_in),
                                       out + t * out_stride + 4 * r))


@inner
def pack(w, x_at, panel, n_tokens, n_in, out):
    """Pack a panel of n_tokens tokens.

    x_at holds the addresses of their activations.
    """
    call_intp_function(w.pack, (x_at, panel * PANEL_TOKENS, n_tokens, n_in, out))


@inner
def gemm_rows(w, rows, n_rows, n_in, x, n_tokens, out_at):
    """Compute out_at[t][r] = row r . token t, for packed tokens at x.

    out_at: an int64 array of addresses.
    """
    call_kernel(w.matmul, MatmulJob(
        unpack=w.unpack, block=w.block, block_bytes=w.block_bytes, mins=w.mins, bits=w.bits,
        rows=rows, n_rows=n_rows, row_bytes=n_in // w.block * w.block_bytes, n_in=n_in, x=x, n_tokens=n_tokens, out_at=address(out_at)))


@inner
def rows_per_task(n_rows, gemv):
    """Count the rows of a task, the same for each.

    For a few tokens: a thread's share of all rows, which it reads in one stretch.
    """
    share = (n_rows + n_threads() - 1) // n_threads()
    if gemv:
        return max(4, share)
    turns = (share + MAX_TASK_ROWS - 1) // MAX_TASK_ROWS
    return ((share + turns - 1) // turns + 15) // 16 * 16


@kernel(parallel=True)
def linear(out, w, x):
    n_out, row_bytes = w.data.shape
    n_tokens, n_in = x.shape
    gemv = uses_gemv(w, n_tokens)
    scratch = caller_scratch(n_tokens * rounded_bytes(n_in) if gemv else count_panels(n_tokens) * panel_bytes(w, n_in))
    x_at = addresses(address(x), x.strides[0], n_tokens)
    if gemv:
        for t in range(n_tokens):
            round_input(w, x_at[t], n_in, scratch + t * rounded_bytes(n_in))
    else:
        for panel in prange(count_panels(n_tokens)):
            pack(w, address(x_at), panel, n_tokens, n_in, scratch)
    size = rows_per_task(n_out, gemv)
    for task in prange((n_out + size - 1) // size):
        r = task * size
        rows, n = address(w.data) + r * row_bytes, min(size, n_out - r)
        if gemv:
            gemv_rows(w, rows, n, n_in, scratch, n_tokens, address(out) + 4 * r, out.strides[0])
        else:
            gemm_rows(w, rows, n, n_in, scratch, n_tokens, addresses(address(out) + 4 * r, out.strides[0], n_tokens))


@kernel(parallel=True)
def head_linear(out, w, x):
    n_head, n_out, row_bytes = w.data.shape
    n_tokens, n_in = x.shape[0], x.shape[2]
    gemv, panels = uses_gemv(w, n_tokens), count_panels(n_tokens)
    head_bytes = n_tokens * rounded_bytes(n_in) if gemv else panels * panel_bytes(w, n_in)
    scratch = caller_scratch(n_head * head_bytes)
    x_at = np.empty((n_head, n_tokens), np.int64)
    for h in range(n_head):
        for t in range(n_tokens):
            x_at[h, t] = address(x) + h * x.strides[1] + t * x.strides[0]
    size = rows_per_task(n_out, gemv)
    if n_head >= n_threads():
        size = n_out if gemv else min(n_out, MAX_TASK_ROWS)
    groups = (n_out + size - 1) // size
    if gemv:
        for i in range(n_head * n_tokens):
            round_input(w, x_at[i // n_tokens, i % n_tokens], n_in, scratch + i * rounded_bytes(n_in))
    else:
        for i in prange(n_head * panels):
            h = i // panels
            pack(w, address(x_at[h]), i % panels, n_tokens, n_in, scratch + h * head_bytes)
    for task in prange(n_head * groups):
        h, r = task // groups, task % groups * size
        rows, n = address(w.data) + (h * n_out + r) * row_bytes, min(size, n_out - r)
        target = address(out) + h * out.strides[1] + 4 * r
        if gemv:
            gemv_rows(w, rows, n, n_in, scratch + h * head_bytes, n_tokens, target, out.strides[0])
        else:
            gemm_rows(w, rows, n, n_in, scratch + h * head_bytes, n_tokens, addresses(target, out.strides[0], n_tokens))
