"""Products for prompts in wgmma, for GPUs of capability 9.0: nothing of a weight is lost.

An activation is two float16, 22 bits together (panels.py). A weight of Q4_K or Q5_K is a whole number, q times its sub-block's scale, at
most 1,953, which float16 holds; the sums of a block of 256 are multiplied by its d in float32. Offsets meet sums of 32 activations, as
products of pairs of float16. Weights are the rows of wgmma (A) and stay in registers, where lanes make them of the file's bytes.
Activations are its columns (B): rows of a tile's tokens are gathered into shared memory by copies, STAGES - 1 of 64 numbers each under way.

A block multiplies ROWS rows of weights with at most TOKENS tokens; a warp has 16 rows, a lane two of them, g and g + 8.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.current import current
from pydsa.backends.cuda.device import SIMULATED, device, fma, of_half, to_half
from pydsa.backends.cuda.f16x2.linear import TOKENS
from pydsa.backends.cuda.f16x2.panels import BLOCK, PART_BYTES, STAGE_BYTES, n_first, split, split_columns_q4_k
from pydsa.backends.cuda.hopper import fence_async, make_wgmma, make_wgmma_wait, shared_address
from pydsa.backends.cuda.instructions import (commit_copies, copies_left, copy_sixteen_async, instruction, quotient, read_sixteen,
                                              stream_eight)
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.quants import TYPES


CAPABILITY = 9, 0
ROWS, THREADS, STAGES = 128, 256, 4         # STAGES: a power of two
PART = TOKENS * PART_BYTES                      # bytes of a stage's high float16, which its low ones follow
STAGE = 2 * PART
AT = STAGES * STAGE                             # where, behind the stages, each token's row is; then its scale
SHARED = AT + 8 * TOKENS
PIECES = TOKENS * 8 // THREADS                  # of 16 bytes that a thread copies in each part of a stage
SUMS, WORDS = TOKENS // 2, 16                   # of a lane: sums, and words of A for 64 columns
LOW_PART = np.uint64(PART >> 4)                 # what its descriptor adds to that of the high part
RAW = 16                                        # words of a lane that are not unpacked yet, of two rows, as below
U = np.uint32
ZERO = np.float32(0)
DESCRIPTOR = np.uint64(1 << 62 | 64 << 32 | 1 << 16)        # swizzle of 128 bytes; eight tokens are 1,024 bytes
LOW, HIGH, ONE, HALF_1024 = U(0x000F000F), U(0x00F000F0), U(0x00010001), U(0x64006400)     # 1024 + n, as float16, is 0x6400 | n
SIXTEENTH, MINUS_64 = U(0x2C002C00), U(0xD400D400)

add_pairs, add_sums, wait_sums = make_wgmma(TOKENS, 4, 2), make_wgmma(TOKENS, 4), make_wgmma_wait(TOKENS, WORDS)
new_pairs = make_wgmma(TOKENS, 4, 2, True)
stage_is_here = copies_left(STAGES - 2)
multiply_halves = instruction("mul.rn.f16x2 $0, $1, $2;", "r", "rr")
subtract_halves = instruction("sub.rn.f16x2 $0, $1, $2;", "r", "rr")
fma_halves = instruction("fma.rn.f16x2 $0, $1, $2, $3;", "r", "rrr")


@device
def copy_stage(shared, packed, stage, last, row_bytes, rows, thread):
    """Begin to copy a stage of all tokens, if there is one, pieces swizzled."""
    if stage < last:
        token, piece = thread >> 3, thread & 7
        slot = (stage & STAGES - 1) * STAGE + 128 * token + 16 * (piece ^ token & 7)
        for i in range(PIECES):
            at = np.int64(rows[AT // 4 + token + 32 * i]) * row_bytes + STAGE_BYTES * stage + 16 * piece
            copy_sixteen_async(shared, slot + 128 * 32 * i, packed, at)
            copy_sixteen_async(shared, slot + 128 * 32 * i + PART, packed, at + PART_BYTES)
    commit_copies()


@device
def next_stage(shared, packed, stage, last, row_bytes, rows, thread):
    """Wait for a stage -> the descriptor of its high float16.

    Another one begins to be copied in place of the one before.
    """
    stage_is_here()
    fence_async()
    cuda.syncthreads()
    copy_stage(shared, packed, stage + STAGES - 1, last, row_bytes, rows, thread)
    return np.uint64(U(shared_address(shared, (stage & STAGES - 1) * STAGE)) >> U(4)) | DESCRIPTOR


@device
def twice(n):
    """A whole number as two float16."""
    bits = to_half(np.float32(np.int32(n)))
    return U(bits | bits << 16)


def _make_put(j, fifth):
    """put(words, raw): the weights of the j-th 64 of a block, as words of A.

    raw: for each of two rows eight words: four of the block's beginning, two of the weights' lower four bits, two of their fifth bits (if
    `fifth`), of which each byte has bits 2 j and 2 j + 1.
    """
    shift, bit, bit_1 = U(16 * (j & 1)), U(2 * j), U(2 * j + 1)

    @device
    def scales(first, third):
        if j < 2:
            return twice(first >> shift & U(63)), twice(first >> shift + U(8) & U(63))
        return (twice(third >> shift & U(15) | (first >> shift + U(6) & U(3)) << U(4)),
                twice(third >> shift + U(8) & U(15) | (first >> shift + U(14) & U(3)) << U(4)))

    @device
    def low(w, h, scale):
        whole = w & LOW | (h >> bit & ONE) << U(4) if fifth else w & LOW
        return multiply_halves(subtract_halves(whole | HALF_1024, HALF_1024), scale)

    @device
    def high(w, h, scale):
        whole = w & HIGH | (h >> bit_1 & ONE) << U(8) if fifth else w & HIGH     # sixteen times the weights
        return multiply_halves(fma_halves(whole | HALF_1024, SIXTEENTH, MINUS_64), scale)

    @device
    def put(words, raw):
        for r in range(2):
            scale, scale_1 = scales(raw[8 * r + 1], raw[8 * r + 3])
            w, v, h, k = raw[8 * r + 4], raw[8 * r + 5], raw[8 * r + 6], raw[8 * r + 7]
            words[r], words[2 + r], words[4 + r], words[6 + r] = (
                low(w, h, scale), low(w >> U(8), h >> U(8), scale), low(v, k, scale), low(v >> U(8), k >> U(8), scale))
            words[8 + r], words[10 + r], words[12 + r], words[14 + r] = (
                high(w, h, scale_1), high(w >> U(8), h >> U(8), scale_1), high(v, k, scale_1), high(v >> U(8), k >> U(8), scale_1))
    return put


def _make_loads(fifth):
    first = 48 if fifth else 16         # where the lower four bits begin in a block

    @device
    def load_block(raw, w, at, at_8, c):
        """The beginnings of a block in both rows of a lane, and its fifth bits."""
        raw[0], raw[1], raw[2], raw[3] = read_sixteen(w, at)
        raw[8], raw[9], raw[10], raw[11] = read_sixteen(w, at_8)
        if fifth:
            raw[6], raw[7] = stream_eight(w, at + 16 + 8 * c)
            raw[14], raw[15] = stream_eight(w, at_8 + 16 + 8 * c)

    @device
    def load_weights(raw, w, at, at_8, j, c):
        """A lane's bytes of the j-th 64 weights of a block, in both its rows."""
        raw[4], raw[5] = stream_eight(w, at + first + 32 * j + 8 * c)
        raw[12], raw[13] = stream_eight(w, at_8 + first + 32 * j + 8 * c)
    return load_block, load_weights


@device
def put_offsets(words, at, row, head, c):
    """-dmin m of sub-blocks 2 c and 2 c + 1 of a block, as words of A: the nearest float16, and what they leave."""
    shift = U(16) * (c & U(1))
    b, d = head[2] >> shift, head[3] >> shift
    m = b & U(0x3F3F) if c < U(2) else d >> U(4) & U(0x0F0F) | b >> U(2) & U(0x3030)
    dmin = -of_half(head[0] >> U(16))
    x, y = dmin * np.float32(np.int32(m & U(63))), dmin * np.float32(np.int32(m >> U(8)))
    p, q = to_half(x), to_half(y)
    upper = U(p | q << 16)
    lower = U(to_half(x - of_half(p)) | to_half(y - of_half(q)) << 16)
    words[at + row], words[at + 2 + row], words[at + 4 + row], words[at + 6 + row] = upper, upper, lower, lower


@device
def add_offsets(sums, words, w, at, at_8, block_bytes, n_blocks, c, shared, packed, last, row_bytes, rows, thread):
    """sums += the products of all offsets and sums of activations.

    There is a stage for each four blocks. Beyond the last block the sums of activations are zero.
    """
    for stage in range((n_blocks + 3) // 4):
        there = next_stage(shared, packed, stage, last, row_bytes, rows, thread)
        for part in range(2):
            for i in range(2):
                of = block_bytes * np.int64(min(4 * stage + 2 * part + i, n_blocks - 1))
                put_offsets(words, 8 * i, 0, read_sixteen(w, at + of), c)
                put_offsets(words, 8 * i, 1, read_sixteen(w, at_8 + of), c)
            add_sums(sums, words, there + np.uint64(part) * LOW_PART)
            wait_sums(sums, words)


def _make_multiply(puts, load_block, load_weights):
    put_0, put_1, put_2, put_3 = puts

    @device
    def multiply_block(sums, words, others, raw, w, at, at_8, more, c, shared, packed, stage, last, row_bytes, rows, thread):
        """sums = the products of a block's whole numbers -> d of both rows.

        The block has four stages. words: those of its first 64 weights; then those of the next block's, `more` bytes further. raw: the
        bytes after those.
        """
        there = next_stage(shared, packed, stage, last, row_bytes, rows, thread)
        new_pairs(sums, words, there, there + LOW_PART)
        put_1(others, raw)
        load_weights(raw, w, at, at_8, 2, c)
        wait_sums(sums, words)
        there = next_stage(shared, packed, stage + 1, last, row_bytes, rows, thread)
        add_pairs(sums, others, there, there + LOW_PART)
        put_2(words, raw)
        load_weights(raw, w, at, at_8, 3, c)
        wait_sums(sums, others)
        there = next_stage(shared, packed, stage + 2, last, row_bytes, rows, thread)
        add_pairs(sums, words, there, there + LOW_PART)
        put_3(others, raw)
        d, d_8 = of_half(raw[0]), of_half(raw[8])
        load_block(raw, w, at + more, at_8 + more, c)
        load_weights(raw, w, at + more, at_8 + more, 0, c)
        wait_sums(sums, words)
        there = next_stage(shared, packed, stage + 3, last, row_bytes, rows, thread)
        add_pairs(sums, others, there, there + LOW_PART)
        put_0(words, raw)
        load_weights(raw, w, at + more, at_8 + more, 1, c)
        wait_sums(sums, others)
        return d, d_8
    return multiply_block


@device
def store_sums(out, sums, order, first, n_tokens, scales, row, c):
    """Store a lane's sums times the tokens' scales."""
    for i in range(TOKENS // 8):
        for e in range(2):
            t = 8 * i + 2 * c + e
            if t < n_tokens:
                target, scale = order[first + t], scales[AT // 4 + TOKENS + t]
                if row < out.shape[1]:
                    out[target, row] = sums[4 * i + e] * scale
                if row + 8 < out.shape[1]:
                    out[target, row + 8] = sums[4 * i + 2 + e] * scale


SIGNATURE = "f4[:,:], u1[::1], i8, i4[:], i4[:], i4[:], i4[:], i4, u1[::1], f4[:], i4"


def _make_gemm(name, fifth=False):
    block_bytes, puts, loads = TYPES[name].n_bytes, [_make_put(j, fifth) for j in range(4)], _make_loads(fifth)
    (load_block, load_weights), put, multiply_block = loads, puts[0], _make_multiply(puts, *loads)

    def gemm(out, w, w_bytes, tile_matrix, tile_first, tile_end, order, x_div, packed, x_scales, n_blocks):
        """out[i] = a matrix times row i // x_div of x.

        i is in order[first:end], where first and end are those of a tile. See above.
        """
        thread, chosen = cuda.threadIdx.x, tile_matrix[cuda.blockIdx.y]
        if chosen < 0:
            return
        first, n_tokens = tile_first[cuda.blockIdx.y], tile_end[cuda.blockIdx.y] - tile_first[cuda.blockIdx.y]
        shared, rows = cuda.shared.array(0, np.uint8, 1024), cuda.shared.array(0, np.int32, 1024)
        scales = cuda.shared.array(0, np.float32, 1024)
        if thread < TOKENS:
            source = quotient(order[first + min(thread, n_tokens - 1)], x_div)
            rows[AT // 4 + thread], scales[AT // 4 + TOKENS + thread] = source, x_scales[source]
        cuda.syncthreads()
        before = (n_blocks + 3) // 4
        last, row_bytes = before + 4 * n_blocks, STAGE_BYTES * (before + 4 * n_blocks)
        for stage in range(STAGES - 1):
            copy_stage(shared, packed, stage, last, row_bytes, rows, thread)
        sums, block_sums = cuda.local.array(SUMS, np.float32), cuda.local.array(SUMS, np.float32)
        words, others, raw = cuda.local.array(WORDS, np.uint32), cuda.local.array(WORDS, np.uint32), cuda.local.array(RAW, np.uint32)
        for i in range(SUMS):
            sums[i] = ZERO
        g, c, most = thread >> 2 & 7, thread & 3, out.shape[1] - 1
        row = cuda.blockIdx.x * ROWS + 16 * (thread >> 5) + g
        at = (chosen * np.int64(out.shape[1]) + min(row, most)) * w_bytes
        at_8 = (chosen * np.int64(out.shape[1]) + min(row + 8, most)) * w_bytes
        add_offsets(sums, words, w, at, at_8, block_bytes, n_blocks, U(c), shared, packed, last, row_bytes, rows, thread)
        load_block(raw, w, at, at_8, c)
        load_weights(raw, w, at, at_8, 0, c)
        put(words, raw)
        load_weights(raw, w, at, at_8, 1, c)
        for block in range(n_blocks):
            more = np.int64(block_bytes if block + 1 < n_blocks else 0)
            d, d_8 = multiply_block(block_sums, words, others, raw, w, at, at_8, more, c, shared, packed, before + 4 * block, last,
                                    row_bytes, rows, thread)
            at += more
            at_8 += more
            for i in range(0, SUMS, 4):
                sums[i], sums[i + 1] = fma(d, block_sums[i], sums[i]), fma(d, block_sums[i + 1], sums[i + 1])
                sums[i + 2], sums[i + 3] = fma(d_8, block_sums[i + 2], sums[i + 2]), fma(d_8, block_sums[i + 3], sums[i + 3])
        store_sums(out, sums, order, first, n_tokens, scales, row, c)
    return kernel(SIGNATURE, THREADS, f"wgmma_{name.lower()}", shared=SHARED, specific=CAPABILITY)(gemm)


GEMM = {"Q4_K": _make_gemm("Q4_K"), "Q5_K": _make_gemm("Q5_K", fifth=True)}


def takes(w):
    """Whether there is a kernel for this Weight on the current GPU."""
    return not SIMULATED and w.type in GEMM and current().capability == CAPABILITY


def pack(x):
    """Activations, rows of any strides, as Columns in scratch memory."""
    return split(x, split_columns_q4_k)


def matmul(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of x, for all tiles."""
    n_blocks = w.shape[-1] // BLOCK
    assert x.packed.shape[1] == STAGE_BYTES * (n_first(n_blocks) + 4 * n_blocks)
    GEMM[w.type]((blocks_for(out.shape[1], ROWS), tiles.matrix.size), out, w.data, w.row_bytes, *tiles[:-1], x.packed.flat, x.scales,
                 n_blocks)
