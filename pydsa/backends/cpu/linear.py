"""Matrix products with GGUF weights in place: rows of blocks times tokens.

For a few tokens (gemv), quantized weights are multiplied block by block as stored in the file, each weight byte read once. For many tokens
(gemm), and for other weights, a pair of functions of a Weight is called: `pack` packs activations, `matmul` multiplies unpacked tiles of
rows with them. They are those of f32/linear.py, of int16/linear.py, or with AMX of int8x2/linear.py.
"""
from pydsa.backends.cpu.arrays import address, align
from pydsa.backends.cpu.blocks.block import SUPERBLOCK
from pydsa.backends.cpu.blocks.dots import DOT_TOKENS
from pydsa.backends.cpu.jit import FIRST_LEVEL_CACHE, SECOND_LEVEL_CACHE, call_intp_function, inner
from pydsa.backends.cpu.jobs import MatmulJob, call_kernel
from pydsa.backends.cpu.scratch import task_scratch
from pydsa.backends.cpu.team.op import Stage, op
from pydsa.backends.cpu.vectors import amx
from pydsa.backends.cpu.vectors.simd import store


MIN_TASK_ROWS = 32              # the fewest rows of a task of gemm, if there are many threads
ROWS_IN_CACHE = SECOND_LEVEL_CACHE // 2 // (4 * 512 + SUPERBLOCK)         # unpacked, each with its sums of 512 tokens
# The most rows of a task of gemm, a power of two: activations are fetched once for all of them.
MAX_TASK_ROWS = max(MIN_TASK_ROWS, min(256 if amx.HERE else 128, 1 << ROWS_IN_CACHE.bit_length() - 1))
MIN_TASK_TOKENS = 128           # the fewest tokens of a task of gemm, if there are still more threads: rows are unpacked for each task
LEAST_TASK_BYTES, ALL_TASK_BYTES = 1 << 18, 1 << 24       # of weights for a few tokens: of the largest tasks, and of those of all threads
GEMV_TOKENS = 16                # the most tokens for which blocks are not unpacked, as a Weight's gemv_tokens
BLOCK_TOKENS = 4                # the same for types with tiles, in products in which all tokens have the same weights
TILED_ROWS = 32                 # a multiple of the rows of a task for tiles: all of them pass over a token together
LONG_ROWS = 4                   # the fewest rows of a task for a few tokens: as many are multiplied together without blocks
GEMV_ROWS = 16                  # a cache line of results
GEMV_BYTES = SECOND_LEVEL_CACHE // 4    # of rows over which more tokens than DOT_TOKENS take turns, and of these tokens
DOT_BYTES = FIRST_LEVEL_CACHE * 3 // 4  # of the tokens that pass over a row together, if there are more than four
PANEL_TOKENS = 16              # tokens that are packed at a time, a panel
PIECE = 8192                    # activations that are rounded at a time, a multiple of 256


@inner
def put_addresses(at, first, stride, n):
    """Store first, first + stride, ..., the addresses of n rows; return `at`."""
    for i in range(n):
        store(at, 8 * i, first + i * stride)
    return at


@inner
def uses_gemv(w, n_tokens):
    """Whether blocks are multiplied as stored."""
    return w.dot != 0 and n_tokens <= w.gemv_tokens


@inner
def by_blocks(w, n_tokens):
    """Whether blocks are multiplied as stored with all tokens of a step.

    More than a few of them pass over tiles, for types that have them.
    """
    return uses_gemv(w, n_tokens) and (w.multiply_tiles == 0 or n_tokens <= BLOCK_TOKENS)


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
    """Count the bytes of a token rounded by round_piece.

    An even number of superblocks, as these may be joined in pairs.
    """
    return (n_in + 511) // 512 * (2 * SUPERBLOCK)


@inner
def packed_bytes(w, n_tokens, n_in):
    """Count the bytes of n_tokens tokens, rounded for gemv or packed for gemm."""
    return n_tokens * rounded_bytes(n_in) if by_blocks(w, n_tokens) else count_panels(n_tokens) * panel_bytes(w, n_in)


@inner
def count_pieces(n_in):
    """Count the pieces in which a token is rounded."""
    return (n_in + PIECE - 1) // PIECE


@inner
def round_piece(w, x, n_in, piece, out):
    """Round a piece of a token's n_in activations at the address x.

    They become superblocks, permuted to the order in which w's blocks are multiplied.
    """
    first = piece * PIECE
    call_intp_function(w.round_row, (x + 4 * first, min(PIECE, n_in - first), w.order, out + first // 256 * SUPERBLOCK, SUPERBLOCK))


@inner
def gemv_tokens_together(n_in):
    """Count the rounded tokens that stay in a cache beside rows.

    A multiple of 16.
    """
    return max(PANEL_TOKENS, GEMV_BYTES // rounded_bytes(n_in) // PANEL_TOKENS * PANEL_TOKENS)


@inner
def dot_tokens(w, n_in):
    """Count the tokens for which blocks are decoded once, at most.

    Four of long rows: two rows at a time share their activations, which more tokens would have to fetch from a second-level cache.
    """
    return DOT_TOKENS if w.block > 32 and DOT_TOKENS * rounded_bytes(n_in) <= DOT_BYTES else 4


@inner
def gemv_rows(w, rows, n_rows, n_in, x_at, n_tokens, out_at):
    """Compute out_at[t][r] = row r . rounded token x_at[t], for any number of tokens.

    n_rows rows at an address. A few rows at a time are multiplied with some tokens, so that both are read from caches but once.
    """
    n, row_bytes, most = n_in // w.block, n_in // w.block * w.block_bytes, gemv_tokens_together(n_in)
    together = dot_tokens(w, n_in)
    batch = n_rows if n_tokens <= together else max(1, GEMV_BYTES // (GEMV_ROWS * row_bytes)) * GEMV_ROWS
    for first in range(0, n_tokens, most):
        for r in range(0, n_rows, batch):
            for t in range(first, min(first + most, n_tokens), together):
                call_intp_function(w.dot, (rows + r * row_bytes, min(batch, n_rows - r), n, x_at + 8 * t, min(together, n_tokens - t),
                                           out_at + 8 * t, 4 * r))


@inner
def pack_panel(w, x_at, panel, n_tokens, n_in, out):
    """Pack a panel of n_tokens tokens.

    x_at: where the addresses of their activations are.
    """
    call_intp_function(w.pack, (x_at, panel * PANEL_TOKENS, n_tokens, n_in, out))


@inner
def gemm_rows(w, rows, n_rows, n_in, x, n_packed, first, n_tokens, out_at, thread):
    """Compute out[t][r] = row r . token t, for tokens from `first` on.

    x: n_packed packed tokens. out_at: where the addresses of the outputs of the n_tokens tokens are.
    """
    call_kernel(w.matmul, MatmulJob(
        thread=thread, unpack=w.unpack, block=w.block, block_bytes=w.block_bytes, mins=w.mins, bits=w.bits, one_scale=w.one_scale,
        unpack_tile=w.unpack_tile, multiply_tiles=w.multiply_tiles,
        rows=rows, n_rows=n_rows, row_bytes=n_in // w.block * w.block_bytes, n_in=n_in,
        x=x, n_packed=n_packed, first=first, n_tokens=n_tokens, out_at=out_at))


@inner
def gemv_task_rows(n_rows, row_bytes, n_threads):
    """Count the rows of a task for a few tokens.

    A multiple of GEMV_ROWS, or of LONG_ROWS if so few have as many bytes as a task. row_bytes: of all that is read for a row. Each thread
    has the same number of tasks, as few as there can be: memory is read faster in long stretches, the more so by few threads.
    """
    most = max(LEAST_TASK_BYTES, ALL_TASK_BYTES // n_threads)
    unit = GEMV_ROWS if GEMV_ROWS * row_bytes <= LEAST_TASK_BYTES else LONG_ROWS
    tasks = n_threads * ((n_rows * row_bytes + n_threads * most - 1) // (n_threads * most))
    return (n_rows + tasks * unit - 1) // (tasks * unit) * unit


@inner
def gemm_task_rows(n_rows, n_others, n_threads):
    """Count the rows of a task of gemm.

    n_others: how many matrices like this one there are.
    """
    size = MAX_TASK_ROWS
    while size > MIN_TASK_ROWS and (n_rows + size - 1) // size * n_others < 4 * n_threads:
        size //= 2
    return size


@inner
def gemm_task_tokens(n_tokens, n_tasks, n_threads):
    """Count the tokens of a task of gemm, a multiple of 16.

    All, unless threads would then wait long for the last tasks: each thread has up to `rounds` of them. A part of the tokens costs about a
    twentieth more, as rows are unpacked for each.
    """
    splits, least = 1, (n_tasks + n_threads - 1) // n_threads * 21.0
    for n in range(2, n_tokens // MIN_TASK_TOKENS + 1):
        rounds = (n_tasks * n + n_threads - 1) // n_threads
        if rounds * (20.0 + n) / n < least:
            splits, least = n, rounds * (20.0 + n) / n
    return (n_tokens + PANEL_TOKENS * splits - 1) // (PANEL_TOKENS * splits) * PANEL_TOKENS


# An op's scratch memory: the addresses of all rows of activations, then their packed forms. There may be several matrices, heads, each with
# activations of its own.

@inner
def addresses_bytes(n):
    """Count the bytes of n addresses."""
    return align(8 * n)


@inner
def begin_packing(w, n_head, n_tokens, n_in):
    """Count the tasks of pack_tokens."""
    if by_blocks(w, n_tokens):
        rows = max(1, PIECE // n_in)
        return (n_head * n_tokens + rows - 1) // rows * count_pieces(n_in)
    return n_head * count_panels(n_tokens)


@inner
def pack_tokens(w, x, token_stride, head_stride, n_head, n_tokens, n_in, task):
    """Round or pack some tokens: activations at x, with these strides."""
    x_at, packed = task.scratch, task.scratch + addresses_bytes(n_head * n_tokens)
    if by_blocks(w, n_tokens):
        pieces, rows = count_pieces(n_in), max(1, PIECE // n_in)
        first = task.index // pieces * rows
        for i in range(first, min(first + rows, n_head * n_tokens)):
            source = x + i // n_tokens * head_stride + i % n_tokens * token_stride
            round_piece(w, source, n_in, task.index % pieces, packed + i * rounded_bytes(n_in))
        return
    panels = count_panels(n_tokens)
    h, panel = task.index // panels, task.index % panels
    first, at = panel * PANEL_TOKENS, x_at + 8 * h * n_tokens
    put_addresses(at + 8 * first, x + h * head_stride + first * token_stride, token_stride, min(PANEL_TOKENS, n_tokens - first))
    pack_panel(w, at, panel, n_tokens, n_in, packed + h * packed_bytes(w, n_tokens, n_in))


@inner
def task_sizes(w, n_head, n_out, row_bytes, n_tokens, n_threads):
    """Return the matrices, rows and tokens of a task of multiply_rows."""
    if n_tokens <= w.gemv_tokens:
        rows = gemv_task_rows(n_head * n_out, row_bytes, n_threads)
        if w.multiply_tiles and n_tokens > BLOCK_TOKENS:
            return 1, min(n_out, (rows + TILED_ROWS - 1) // TILED_ROWS * TILED_ROWS), n_tokens
        tokens = gemv_tokens_together(row_bytes // w.block_bytes * w.block)
        return (rows + n_out - 1) // n_out, min(n_out, rows), min(n_tokens, tokens)
    rows = min(n_out, gemm_task_rows(n_out, n_head, n_threads))
    return 1, rows, gemm_task_tokens(n_tokens, (n_out + rows - 1) // rows * n_head, n_threads)


@inner
def begin_rows(w, n_head, n_out, row_bytes, n_tokens, task):
    """Count the tasks of multiply_rows."""
    heads, rows, tokens = task_sizes(w, n_head, n_out, row_bytes, n_tokens, task.n_threads)
    return ((n_head + heads - 1) // heads) * ((n_out + rows - 1) // rows) * ((n_tokens + tokens - 1) // tokens)


@inner
def multiply_rows(w, n_head, n_out, row_bytes, n_tokens, n_in, out, token_stride, head_stride, task):
    """Multiply some rows of some matrices with some tokens."""
    heads, size, tokens = task_sizes(w, n_head, n_out, row_bytes, n_tokens, task.n_threads)
    groups, parts = (n_out + size - 1) // size, (n_head + heads - 1) // heads
    part, r, first = task.index // groups % parts, task.index % groups * size, task.index // (groups * parts) * tokens
    n, tokens = min(size, n_out - r), min(tokens, n_tokens - first)
    memory = task_scratch(task.thread, 16 * tokens)
    for h in range(part * heads, min(n_head, (part + 1) * heads)):
        rows = address(w.data) + (h * n_out + r) * row_bytes
        x = task.scratch + addresses_bytes(n_head * n_tokens) + h * packed_bytes(w, n_tokens, n_in)
        out_at = put_addresses(memory, out + h * head_stride + 4 * r + first * token_stride, token_stride, tokens)
        if by_blocks(w, n_tokens):
            x_at = put_addresses(memory + 8 * tokens, x + first * rounded_bytes(n_in), rounded_bytes(n_in), tokens)
            gemv_rows(w, rows, n, n_in, x_at, tokens, out_at)
        else:
            gemm_rows(w, rows, n, n_in, x, n_tokens, first, tokens, out_at, task.thread)


@inner
def begin_linear(out, w, x, task):
    return begin_packing(w, 1, x.shape[0], x.shape[1])


@inner
def pack_linear(out, w, x, task):
    pack_tokens(w, address(x), x.strides[0], 0, 1, x.shape[0], x.shape[1], task)


@inner
def begin_linear_rows(out, w, x, task):
    return begin_rows(w, 1, w.data.shape[0], w.data.shape[1], x.shape[0], task)


@inner
def multiply_linear(out, w, x, task):
    multiply_rows(w, 1, w.data.shape[0], w.data.shape[1], x.shape[0], x.shape[1], address(out), out.strides[0], 0, task)


def weights_read(out, w, x):
    """The weights, where a step of one token reads all of them once."""
    return w.data if len(x) == 1 else None


def packed_linear(out, w, x):
    """What pack_linear makes of x: the same for weights that take it in the same form."""
    return x.ctypes.data, x.shape, x.strides, w.pack, w.packed_bytes, w.order if by_blocks(w, len(x)) else None


@op(Stage(begin_linear, pack_linear, light=True), Stage(begin_linear_rows, multiply_linear), packed=packed_linear, reads=weights_read)
def linear(out, w, x):
    return addresses_bytes(len(x)) + packed_bytes(w, *x.shape)


@inner
def begin_heads(out, w, x, task):
    return begin_packing(w, x.shape[1], x.shape[0], x.shape[2])


@inner
def pack_heads(out, w, x, task):
    pack_tokens(w, address(x), x.strides[0], x.strides[1], x.shape[1], x.shape[0], x.shape[2], task)


@inner
def begin_head_rows(out, w, x, task):
    return begin_rows(w, x.shape[1], w.data.shape[1], w.data.shape[2], x.shape[0], task)


@inner
def multiply_heads(out, w, x, task):
    n_head, n_out, row_bytes = w.data.shape
    multiply_rows(w, n_head, n_out, row_bytes, x.shape[0], x.shape[2], address(out), out.strides[0], out.strides[1], task)


@op(Stage(begin_heads, pack_heads, light=True), Stage(begin_head_rows, multiply_heads), reads=weights_read)
def head_linear(out, w, x):
    n_tokens, n_head, n_in = x.shape
    return addresses_bytes(n_head * n_tokens) + n_head * packed_bytes(w, n_tokens, n_in)
