"""Products for prompts in wgmma, with one float16 an activation.

They are for GPUs of capability 9.0. Weights are the rows of wgmma (A) and stay in registers: lanes make float16 of the file's bytes
(tiles.py, ../eights), a chunk of 64 columns at a time, while the chunk before is multiplied. Scales and offsets are folded into them.
Activations are its columns (B): rows of a tile's tokens are gathered into shared memory by copies, some stages of 64 numbers ahead.

Weights of any scale fit: a row has a power of two as factor, chosen for its first weights so that there is room for weights 2^6 times
greater; those 2^22 times smaller are not subnormal yet. Where still greater ones come, the factor changes, and the sums so far with it.

A block multiplies ROWS rows of weights with 64, 128 or 256 tokens; a warp has 16 rows, a lane two of them, g and g + 8. The tiles of
linear.py have at most 128 tokens. A block of 256 takes two tiles, where all are of one matrix; one of 64 a tile or half of one.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.eights.eight import U
from pydsa.backends.cuda.f16.panels import STAGE_BYTES
from pydsa.backends.cuda.f16.tiles import KINDS, WHOLE_WARP, inverse, set_factor
from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, load_four_u32
from pydsa.backends.cuda.intrinsics.hopper import fence_async, make_wgmma, make_wgmma_wait
from pydsa.backends.cuda.intrinsics.instructions import commit_copies, copies_left, copy_sixteen_async, quotient
from pydsa.backends.cuda.intrinsics.shared_memory import shared_address
from pydsa.backends.cuda.runtime.current import current
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


CAPABILITY = 9, 0
ROWS, THREADS = 128, 256
TILE = 128                                      # tokens of a tile, at most
STAGES = {64: 8, 128: 8, 256: 4}                # tokens of a block -> stages in shared memory, a power of two
RESIDENT = {64: 2, 128: 1, 256: 1}              # blocks that fit into a processor at a time
COST = {64: 0.22, 128: 0.37, 256: 0.48}         # what a block's product takes, as prototypes did on an H200, in any unit
PROCESSORS = 132
PART = 128                                      # tokens whose sums are stored in one loop
WORDS = 16                                      # of a lane: words of A for a chunk
DESCRIPTOR = np.uint64(1 << 62 | 64 << 32 | 1 << 16)        # swizzle of 128 bytes; eight tokens are 1,024 bytes
ZERO, ONE, NEVER = np.float32(0), np.float32(1), np.float32(-1)


@device
def copy_two(shared, slot, packed, here, a, b):
    """Copy pieces of two tokens, 32 apart.

    Their rows are a and b, in units of 16 bytes.
    """
    copy_sixteen_async(shared, slot, packed, here + 16 * np.int64(a))
    copy_sixteen_async(shared, slot + 4096, packed, here + 16 * np.int64(b))


@device
def copy_four(shared, slot, packed, here, rows):
    """Copy pieces of four tokens, each 32 after the one before."""
    a, b, c, d = rows
    copy_two(shared, slot, packed, here, a, b)
    copy_two(shared, slot + 8192, packed, here, c, d)


def _make_stages(tokens):
    """The functions that copy and wait for stages of so many tokens."""
    stages, stage_bytes, n_pieces = STAGES[tokens], STAGE_BYTES * tokens, tokens // 32
    at_rows = stages * stage_bytes // 4         # where, behind the stages, each token's row is, in units of 16 bytes
    next_is_here, first_is_here = copies_left(stages - 3), copies_left(stages - 2)

    @device
    def copy_stage(stage, to):
        """Begin to copy a stage of all tokens, if there is one, pieces swizzled.

        to: shared memory, the packed activations, the number of stages, what is behind them in shared memory, the thread.
        """
        shared, packed, last, rows, thread = to
        if stage < last:
            token, piece = thread >> 3, thread & 7
            slot = (stage & stages - 1) * stage_bytes + 128 * token + 16 * (piece ^ token & 7)
            here, first = STAGE_BYTES * np.int64(stage) + 16 * piece, at_rows + n_pieces * token
            if n_pieces == 2:
                a, b = rows[first], rows[first + 1]     # before all copies, each of which would wait for loads before it
                copy_two(shared, slot, packed, here, a, b)
            elif n_pieces == 4:
                copy_four(shared, slot, packed, here, load_four_u32(rows, first))
            else:
                four, others = load_four_u32(rows, first), load_four_u32(rows, first + 4)
                copy_four(shared, slot, packed, here, four)
                copy_four(shared, slot + 16384, packed, here, others)
        commit_copies()

    @device
    def wait_for_first():
        first_is_here()
        fence_async()
        cuda.syncthreads()

    @device
    def wait_for_next(stage, to):
        """Wait for stage + 1 while `stage` is multiplied.

        Another one begins to be copied in place of stage - 1, whose product all threads have waited for.
        """
        next_is_here()
        fence_async()
        cuda.syncthreads()
        copy_stage(stage + stages - 1, to)

    @device
    def descriptor_of(shared, stage):
        return np.uint64(U(shared_address(shared, (stage & stages - 1) * stage_bytes)) >> U(4)) | DESCRIPTOR
    return copy_stage, wait_for_first, wait_for_next, descriptor_of, at_rows


def _make_place(kind):
    period_bytes, other = kind.period_bytes, kind.second

    @device
    def place(period, n_periods, short):
        """Where in a row a period begins, and how far its second block is.

        Beyond the row's end, the last period again. short: whether that has one block only.
        """
        here = min(period, n_periods - 1)
        return np.int64(here) * period_bytes, 0 if short and here == n_periods - 1 else other
    return place


def _make_scale(tokens):
    def of_part(part):
        @device
        def scale(sums, factors):
            for j in range(min(PART, tokens) // 8):
                i = part // 2 + 4 * j
                sums[i], sums[i + 1] = sums[i] * factors[4], sums[i + 1] * factors[4]
                sums[i + 2], sums[i + 3] = sums[i + 2] * factors[5], sums[i + 3] * factors[5]
        return scale
    return in_parts(of_part, tokens)


def in_parts(make, tokens):
    """The function that calls make(0), and make(PART) for more tokens.

    Both take sums, and others. Longer loops NVVM would not unroll, and then keep sums in memory.
    """
    first, second, two = make(0), make(tokens - PART), tokens > PART

    @device
    def both(sums, *others):
        first(sums, *others)
        if two:
            second(sums, *others)
    return both


def _make_step(kind, tokens, u, place, functions):
    n, load, bound, fill, set_heads = kind.n_words, kind.load, kind.bound, kind.fill, kind.set_heads
    (later, made), (still_later, loaded) = divmod(u + 1, kind.n_chunks), divmod(u + 2, kind.n_chunks)       # periods, chunks of them
    add_sums, wait_sums, scale = make_wgmma(tokens, 4), make_wgmma_wait(tokens, WORDS), _make_scale(tokens)
    wait_for_next, descriptor_of = functions

    @device
    def step(sums, words, others, raw, factors, chunk, period, here, stages):
        """Multiply a chunk, which is in words.

        Meanwhile the next one is unpacked into others, and the bytes of that after it are loaded. period: the one with which a round of
        steps begins. here, stages: see gemm below.
        """
        w, row, row_8, n_periods, short, c = here
        add_sums(sums, words, descriptor_of(stages[0], chunk))
        wait_for_next(chunk, stages)
        at, second = place(period + later, n_periods, short)
        changed = False
        if made == 0:
            most, most_8 = bound(raw, 0, row + at, second, c), bound(raw, n, row_8 + at, second, c)
            changed = cuda.any_sync(WHOLE_WARP, most > factors[2] or most_8 > factors[3])
            if changed:
                set_factor(factors, 0, most)
                set_factor(factors, 1, most_8)
            set_heads(raw, 0, row + at, second, c, factors[0])
            set_heads(raw, n, row_8 + at, second, c, factors[1])
        fill(others, 0, raw, 0, row + at, second, made, c, factors[0])
        fill(others, 1, raw, n, row_8 + at, second, made, c, factors[1])
        at, second = place(period + still_later, n_periods, short)
        load(raw, 0, w, row + at, second, loaded, c)
        load(raw, n, w, row_8 + at, second, loaded, c)
        wait_sums(sums, words)
        if changed:
            scale(sums, factors)
    return step


def _make_begin(kind, place):
    n, load, bound, fill, set_heads = kind.n_words, kind.load, kind.bound, kind.fill, kind.set_heads
    later, loaded = divmod(1, kind.n_chunks)

    @device
    def begin(words, raw, factors, here):
        """Unpack the first chunk, and load the second."""
        w, row, row_8, n_periods, short, c = here
        factors[0], factors[1], factors[2], factors[3] = ONE, ONE, NEVER, NEVER
        at, second = place(0, n_periods, short)
        load(raw, 0, w, row + at, second, 0, c)
        load(raw, n, w, row_8 + at, second, 0, c)
        set_factor(factors, 0, bound(raw, 0, row + at, second, c))
        set_factor(factors, 1, bound(raw, n, row_8 + at, second, c))
        set_heads(raw, 0, row + at, second, c, factors[0])
        set_heads(raw, n, row_8 + at, second, c, factors[1])
        fill(words, 0, raw, 0, row + at, second, 0, c, factors[0])
        fill(words, 1, raw, n, row_8 + at, second, 0, c, factors[1])
        at, second = place(later, n_periods, short)
        load(raw, 0, w, row + at, second, loaded, c)
        load(raw, n, w, row_8 + at, second, loaded, c)
    return begin


def _make_span(tokens):
    @device
    def span(tile_matrix, tile_first, tile_end, how):
        """The matrix of this block, or -1, and where its tokens begin and end.

        how: of 64 tokens, how many blocks a tile has, 1 or 2: if 1, tiles of more tokens are left out; of 128, up to how many tokens a tile
        is left out; else nothing.
        """
        y = cuda.blockIdx.y
        if tokens == 256:
            return tile_matrix[2 * y], tile_first[2 * y], tile_end[min(2 * y + 1, tile_end.size - 1)]
        tile = quotient(y, how) if tokens == 64 else y
        chosen = tile_matrix[tile]
        if chosen < 0:
            return np.int32(-1), np.int32(0), np.int32(0)
        first, end = tile_first[tile], tile_end[tile]
        if tokens == 128:
            return np.int32(-1) if end - first <= how else chosen, first, end
        begin = first + tokens * (y - tile * how)
        left_out = begin >= end or how == 1 and end - first > tokens
        return np.int32(-1) if left_out else chosen, np.int32(begin), np.int32(min(end, begin + tokens))
    return span


def _make_store(tokens, at_rows):
    def of_part(part):
        @device
        def store(sums, out, factors, order, first, n_tokens, scales, row, c):
            """Store a lane's sums times the tokens' scales, over the rows' factors."""
            f, f_8 = inverse(factors[0]), inverse(factors[1])
            for i in range(min(PART, tokens) // 8):
                for e in range(2):
                    t = part + 8 * i + 2 * c + e
                    if t < n_tokens:
                        target, scale = order[first + t], scales[at_rows + tokens + t]
                        if row < out.shape[1]:
                            out[target, row] = sums[part // 2 + 4 * i + e] * f * scale
                        if row + 8 < out.shape[1]:
                            out[target, row + 8] = sums[part // 2 + 4 * i + 2 + e] * f_8 * scale
        return store
    return in_parts(of_part, tokens)


SIGNATURE = "f4[:,:], u1[::1], i8, i4[:], i4[:], i4[:], i4[:], i4, u1[::1], f4[:], i4, i4, b1, i4"


def _make_gemm(name, kind, tokens):
    copy_stage, wait_for_first, *functions, at_rows = _make_stages(tokens)
    place, span, store, n_first = _make_place(kind), _make_span(tokens), _make_store(tokens, at_rows), STAGES[tokens] - 1
    steps = [_make_step(kind, tokens, u, place, functions) for u in range(max(2, kind.n_chunks))]
    begin, (step_0, step_1), (step_2, step_3), n_steps = _make_begin(kind, place), steps[:2], steps[-2:], len(steps)
    n_pieces, n_sums, n_raw, prepare, n_periods_of_round = (
        tokens // 32, tokens // 2, 2 * kind.n_words, kind.prepare, n_steps // kind.n_chunks)

    def gemm(out, w, w_bytes, tile_matrix, tile_first, tile_end, order, x_div, packed, x_scales, last, n_periods, short, how):
        """out[i] = a matrix times row i // x_div of x.

        i is in order[first:end], which span() tells. A row of w has n_periods periods, of which the last has one block of two if `short`.
        One of x has `last` stages.
        """
        thread = cuda.threadIdx.x & THREADS - 1
        chosen, first, end = span(tile_matrix, tile_first, tile_end, how)
        if chosen < 0:
            return
        n_tokens = end - first
        shared, rows = cuda.shared.array(0, np.uint8, 1024), cuda.shared.array(0, np.int32, 1024)
        scales = cuda.shared.array(0, np.float32, 1024)
        if thread < tokens:
            source = quotient(order[first + min(thread, n_tokens - 1)], x_div)
            place = at_rows + n_pieces * (thread & 31) + (thread >> 5)      # those of a thread's copies are side by side
            rows[place], scales[at_rows + tokens + thread] = source * (last * (STAGE_BYTES // 16)), x_scales[source]
        prepare(thread, THREADS)
        cuda.syncthreads()
        stages = shared, packed, last, rows, thread
        for stage in range(n_first):
            copy_stage(stage, stages)
        sums, factors = cuda.local.array(n_sums, np.float32), cuda.local.array(6, np.float32)
        words, others, raw = cuda.local.array(WORDS, np.uint32), cuda.local.array(WORDS, np.uint32), cuda.local.array(n_raw, np.uint32)
        for i in range(n_sums):
            sums[i] = ZERO
        most = out.shape[1] - 1
        row = cuda.blockIdx.x * ROWS + 16 * (thread >> 5) + (thread >> 2 & 7)
        here = (w, (chosen * np.int64(out.shape[1]) + min(row, most)) * w_bytes,
                (chosen * np.int64(out.shape[1]) + min(row + 8, most)) * w_bytes, n_periods, short, U(thread & 3))
        begin(words, raw, factors, here)
        wait_for_first()
        period = np.int32(0)
        for chunk in range(np.int32(0), np.int32(last), np.int32(n_steps)):
            step_0(sums, words, others, raw, factors, chunk, period, here, stages)
            step_1(sums, others, words, raw, factors, chunk + 1, period, here, stages)
            if n_steps == 4:
                step_2(sums, words, others, raw, factors, chunk + 2, period, here, stages)
                step_3(sums, others, words, raw, factors, chunk + 3, period, here, stages)
            period = np.int32(period + n_periods_of_round)
        store(sums, out, factors, order, first, n_tokens, scales, row, thread & 3)
    shared = 4 * at_rows + 8 * tokens
    return kernel(SIGNATURE, THREADS, f"f16_{tokens}_{name.lower()}", blocks=RESIDENT[tokens], shared=shared, specific=CAPABILITY)(gemm)


GEMM = {(name, tokens): _make_gemm(name, kind, tokens) for name, kind in KINDS.items() for tokens in STAGES}


def takes(w):
    """Whether there is a kernel for this Weight on the current GPU."""
    return not SIMULATED and w.type in KINDS and current().capability == CAPABILITY


def are_heads(n_matrices, n_tiles, n_tokens):
    """Whether tiles are those of heads (linear.head_tiles).

    Heads have equally many tokens each. A list of experts' tiles (moe.pair_tiles) has room for one more of each expert, or of each token if
    there are fewer.
    """
    return n_tokens % n_matrices == 0 and n_tiles == n_matrices * blocks_for(n_tokens // n_matrices, TILE)


def launches(n_rows, n_tiles, n_tokens, even, plain):
    """The launches of a product: [(tokens of a block, blocks for its tiles, `how`)], see span().

    even: all tiles of a matrix but the last have TILE of its n_tokens tokens; else n_tiles tiles have n_tokens in all. plain: there is one
    matrix only.
    """
    if not even:
        return [(64, n_tiles, 1)] + ([(128, n_tiles, 64)] if n_tokens > 64 else [])
    if not plain:
        return [(64, n_tiles, 1) if n_tokens <= 64 else (128, n_tiles, 0)]

    def cost(tokens):
        blocks = blocks_for(n_rows, ROWS) * blocks_for(n_tokens, tokens)
        return blocks_for(blocks, PROCESSORS) * COST[tokens], tokens
    tokens = min(STAGES, key=cost)
    return [(tokens, blocks_for(n_tokens, tokens), 2 if tokens == 64 else 0)]


def matmul(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of x, for all tiles."""
    kind, n, n_tiles, n_tokens = KINDS[w.type], w.shape[-1], tiles.matrix.size, tiles.order.size
    plain = len(w.shape) == 2
    even = plain or are_heads(w.shape[0], n_tiles, n_tokens)
    for tokens, blocks, how in launches(out.shape[1], n_tiles, n_tokens // w.shape[0] if even and not plain else n_tokens, even, plain):
        GEMM[w.type, tokens]((blocks_for(out.shape[1], ROWS), blocks), out, w.data, w.row_bytes, *tiles[:-1], x.packed.flat, x.scales,
                             x.packed.shape[1] // STAGE_BYTES, blocks_for(n, 64 * kind.n_chunks), n % 64 != 0, how)
