"""Prompts' attention to chosen rows in wgmma, for GPUs of capability 9.0: rows, queries and weights are one float16 each.

A block has a token and HEADS heads. It walks the token's chosen rows, or all up to its position, in tiles of KEYS, which copies bring while
the tile before is used; as keys and as values they are the same bytes of shared memory. Its two groups of four warps take turns: one makes
a tile's scores and weights, which go through shared memory, and both sum their half of the values' columns. half_rows.py makes the
float16. What comes out is float32, or the rows that a product in wgmma takes (f16/panels.py): then the greatest sum of a head, of both
groups, decides on its row's scale.

What is in shared memory is ordered like this. FULL + 8 i: the copies of stage i are there. EMPTY + 8 i: all warps have used it; then
weights may be overwritten, too. The barrier of the block in each turn: weights and their facts are there.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.chosen.chosen_rows import ROTATED, VALUE
from pydsa.backends.cuda.chosen.half_rows import (HEADS, IMAGE, LAST, PART, ROW_BYTES, WHOLE, are_aligned, facts_of, halved, halved_queries,
                                                  of_both_groups)
from pydsa.backends.cuda.f16.panels import factors_for
from pydsa.backends.cuda.intrinsics.block_sums import abs_bits
from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, float_bits, permuted
from pydsa.backends.cuda.intrinsics.hopper import (arrive, arrive_after_copies, copy_bulk, expect_bytes, fence_async, fence_mbarriers,
                                                   init_mbarrier, make_wgmma_shared, make_wgmma_wait, wait_phase)
from pydsa.backends.cuda.intrinsics.instructions import pack_halves, store_eight, store_sixteen
from pydsa.backends.cuda.intrinsics.shared_memory import (WHOLE_WARP, any_lane, copy_sixteen, folds, load_float, load_floats, power_of_two,
                                                          shared_address, store_float, store_word)
from pydsa.backends.cuda.modes import DENSE, SPARSE
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.current import current
from pydsa.backends.cuda.runtime.launch import blocks_for, is_listing, kernel

CAPABILITY = 9, 0
KEYS, THREADS, WARPS = 64, 256, 8           # keys of a tile
MIN_HEADS = 16                              # with fewer most rows of an image would be padding
MIN_BLOCKS = 16                             # with fewer it costs more to make rows float16, and most processors have nothing to do
TILE = KEYS * ROW_BYTES                     # bytes of a tile; of its nine parts each has 64 numbers of all its rows
WEIGHTS_AT = IMAGE + 2 * TILE               # behind the queries and two stages of rows
FACTS_AT = WEIGHTS_AT + PART                # of each head: what sums shrink by; its greatest score; the sum of its weights
BIAS_AT = FACTS_AT + 3 * 4 * HEADS          # of each key of a stage: 0, or -infinity if it is none
FULL = BIAS_AT + 2 * 4 * KEYS
EMPTY, QUERIES_HERE = FULL + 16, FULL + 32
SHARED = QUERIES_HERE + 8
COLUMNS = VALUE // 2                        # of a group of warps
SCORES, SUMS, PAIRS = KEYS // 2, COLUMNS // 2, COLUMNS // 8      # of a lane; pairs of columns of a head
POWER = np.float32(10)                      # the greatest weight is 2^10: few are subnormal float16
U, ZERO, ONE, MINUS_INFINITY = np.uint32, np.float32(0), np.float32(1), np.float32(-np.inf)
LOG2_E = np.float32(1.4426950408889634)
# descriptors, swizzle of 128 bytes: eight rows of 128 bytes are 1,024; 64 columns of 64 rows are PART
ROWS = np.uint64(1 << 62 | 64 << 32 | 1 << 16)
BY_COLUMNS = np.uint64(1 << 62 | 64 << 32 | (PART >> 4) << 16)

_STEPS = [step // 4 * (PART >> 4) + step % 4 * 2 for step in range(ROW_BYTES // 32)]
multiply_keys, wait_scores = make_wgmma_shared(KEYS, _STEPS, _STEPS, anew=True), make_wgmma_wait(KEYS, 0)
add_values = make_wgmma_shared(COLUMNS, range(0, 8, 2), range(0, 512, 128), by_columns=True)
wait_sums = make_wgmma_wait(COLUMNS, 0)
greatest_of_four, sum_of_four = folds(4)


@device
def row_at(indices, token, place, n, every):
    """The row at a place of a token's choice, or of all; -1 from n on."""
    if place >= n:
        return np.int32(-1)
    return np.int32(place) if every else indices[token, place]


@device
def note_missing(base, stage, row, chunk, first, second):
    """Note which of two rows of a stage are none, for their heads."""
    if chunk == U(0):
        at = base + U(BIAS_AT) + U(4 * KEYS) * U(stage) + U(4) * row
        store_float(at, ZERO if first >= 0 else MINUS_INFINITY)
        store_float(at + U(128), ZERO if second >= 0 else MINUS_INFINITY)


@device
def ask(shared, base, stage, rows, row, chunk, first, second):
    """Begin to copy a thread's share of two rows to a stage.

    That is 16 of each 128 bytes; zeros for rows that are none. The stage's mbarrier knows when they are there.
    """
    to = base + U(IMAGE) + U(TILE) * U(stage) + U(128) * row + ((chunk ^ row & U(7)) << U(4))
    n, n_1 = U(16) if first >= 0 else U(0), U(16) if second >= 0 else U(0)
    at = np.int64(max(first, np.int32(0))) * ROW_BYTES + np.int64(U(16) * chunk)
    at_1 = np.int64(max(second, np.int32(0))) * ROW_BYTES + np.int64(U(16) * chunk)
    for i in range(ROW_BYTES // 128):
        copy_sixteen(to + U(PART * i), rows, at + 128 * i, n)
        copy_sixteen(to + U(PART * i + 128 * 32), rows, at_1 + 128 * i, n_1)
    arrive_after_copies(shared, FULL + 8 * np.int64(stage))


@device
def begin(shared, base, queries, block, thread):
    """Make the mbarriers, ask for the queries, and clear the facts of heads."""
    if thread == U(0):
        for i in range(2):
            init_mbarrier(shared, FULL + 8 * i, U(THREADS))
            init_mbarrier(shared, EMPTY + 8 * i, U(WARPS))
        init_mbarrier(shared, QUERIES_HERE, U(1))
        fence_mbarriers()
        expect_bytes(shared, QUERIES_HERE, U(IMAGE))
        copy_bulk(shared, 0, queries, np.int64(block) * IMAGE, U(IMAGE), shared, QUERIES_HERE)
    if thread < U(HEADS):
        store_float(base + U(FACTS_AT + 4 * HEADS) + U(4) * thread, MINUS_INFINITY)
        store_float(base + U(FACTS_AT + 8 * HEADS) + U(4) * thread, ZERO)


@device
def leave_out(s, at):
    """Scores of keys that are none become -infinity. at: where the biases of a lane's first two are."""
    for i in range(KEYS // 8):
        a, b = load_floats(at + U(32 * i))
        s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3] = s[4 * i] + a, s[4 * i + 1] + b, s[4 * i + 2] + a, s[4 * i + 3] + b


@device
def weigh(s, base, of_row, put, bias_at, some_missing, scale, scale_8, g, c):
    """Scores become weights in shared memory, and facts of two heads go on.

    The products of the scores s are under way.
    """
    top, top_8 = load_float(of_row + U(4 * HEADS)), load_float(of_row + U(4 * HEADS + 32))
    total, total_8 = load_float(of_row + U(8 * HEADS)), load_float(of_row + U(8 * HEADS + 32))
    wait_scores(s, s)
    for i in range(KEYS // 8):
        s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3] = (s[4 * i] * scale, s[4 * i + 1] * scale, s[4 * i + 2] * scale_8,
                                                              s[4 * i + 3] * scale_8)
    if some_missing:
        leave_out(s, bias_at)
    best, best_8 = top, top_8
    for i in range(KEYS // 8):
        best, best_8 = max(best, max(s[4 * i], s[4 * i + 1])), max(best_8, max(s[4 * i + 2], s[4 * i + 3]))
    best, best_8 = greatest_of_four(best), greatest_of_four(best_8)
    zero, zero_8 = best if best > MINUS_INFINITY else ZERO, best_8 if best_8 > MINUS_INFINITY else ZERO
    shrink, shrink_8, low, low_8 = power_of_two(top - zero), power_of_two(top_8 - zero_8), POWER - zero, POWER - zero_8
    added, added_8 = ZERO, ZERO
    for i in range(KEYS // 8):
        a, b = power_of_two(s[4 * i] + low), power_of_two(s[4 * i + 1] + low)
        d, e = power_of_two(s[4 * i + 2] + low_8), power_of_two(s[4 * i + 3] + low_8)
        added, added_8 = added + (a + b), added_8 + (d + e)
        where = put + ((U(i) ^ g) << U(4))
        store_word(where, pack_halves(b, a))
        store_word(where + U(1024), pack_halves(e, d))
    fence_async()
    added, added_8 = sum_of_four(added), sum_of_four(added_8)
    cuda.syncwarp()         # all lanes have read the facts
    if c == U(0):
        store_float(of_row, shrink)
        store_float(of_row + U(32), shrink_8)
        store_float(of_row + U(4 * HEADS), best)
        store_float(of_row + U(4 * HEADS + 32), best_8)
        store_float(of_row + U(8 * HEADS), total * shrink + added)
        store_float(of_row + U(8 * HEADS + 32), total_8 * shrink_8 + added_8)


@device
def shrink_sums(sums, of_row):
    """Multiply a lane's sums by what older weights have shrunk by.

    That is 1 where the head's greatest score is an older one.
    """
    f, f_8 = load_float(of_row), load_float(of_row + U(32))
    if any_lane(U(f != ONE or f_8 != ONE)) != U(0):
        for i in range(0, SUMS, 4):
            sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = sums[i] * f, sums[i + 1] * f, sums[i + 2] * f_8, sums[i + 3] * f_8


@device
def store_head(out, sums, first, h, n_head, token, column, factor):
    """Store a head's columns of a lane: a pair of each eight, which begin at sums[first], first + 4, ..."""
    if h < n_head:
        at = 4 * ((np.int64(token) * n_head + np.int64(h)) * VALUE + np.int64(column))
        for i in range(PAIRS):
            store_eight(out, at + 32 * i, float_bits(sums[4 * i + first] * factor), float_bits(sums[4 * i + first + 1] * factor))


@device
def greatest_of_head(sums, first):
    """The bits of the greatest |sum| of a head's columns, of four lanes.

    Those of NaN are greater than those of numbers.
    """
    bits = np.int32(0)
    for i in range(PAIRS):
        bits = max(bits, max(abs_bits(sums[4 * i + first]), abs_bits(sums[4 * i + first + 1])))
    return greatest_of_four(np.int32(bits))


@device
def store_packed(out, scales, sums, first, h, n_head, token, group, c, bits, over):
    """Store a head's columns of a lane as part of a row of panels.py.

    Its scale is stored, too. Of each pair of columns and that of the lane beside this one goes the first to the even lane, the second to
    the odd one. bits: of the row's greatest |sum|. over: what sums are multiplied by. All lanes of a warp must call.
    """
    factor, scale = factors_for(bits)
    words, which = cuda.local.array(PAIRS, np.uint32), U(0x5410) if c & U(1) == U(0) else U(0x3276)
    for i in range(PAIRS):
        word = pack_halves(sums[4 * i + first + 1] * factor, sums[4 * i + first] * factor) if factor > ZERO else U(0)
        words[i] = permuted(word, U(cuda.shfl_xor_sync(WHOLE_WARP, np.int32(word), 1)), which)
    if h < n_head:
        row = np.int64(token) * n_head + np.int64(h)
        at = 2 * VALUE * row + np.int64(U(2 * COLUMNS) * group + U(16) * c)
        for i in range(0, PAIRS, 4):
            store_sixteen(out, at + 16 * i, words[i], words[i + 1], words[i + 2], words[i + 3])
        if group == U(0) and c == U(0):
            scales[row] = scale * over


def _make_store(packs):
    @device
    def store(out, scales, sums, base, of_row, unit, h, n_head, token, group, row, c):
        """Store a lane's columns of two heads. row: the first one's in a block."""
        total, total_8 = load_float(of_row + U(8 * HEADS)), load_float(of_row + U(8 * HEADS + 32))
        over, over_8 = unit / total if total != ZERO else ZERO, unit / total_8 if total_8 != ZERO else ZERO
        if packs:
            # in place of biases, which nobody reads after the last tile's weights
            bits, bits_8 = of_both_groups(base + U(BIAS_AT), group, row, greatest_of_head(sums, 0), greatest_of_head(sums, 2), c)
            store_packed(out, scales, sums, 0, h, n_head, token, group, c, bits, over)
            store_packed(out, scales, sums, 2, h + U(8), n_head, token, group, c, bits_8, over_8)
        else:
            column = U(COLUMNS) * group + U(2) * c
            store_head(out, sums, 0, h, n_head, token, column, over)
            store_head(out, sums, 2, h + U(8), n_head, token, column, over_8)
    return store


def _make_attend(packs):
    store = _make_store(packs)

    def attend_chosen(out, scales, queries, q_scales, rows, unit, indices, facts, every, n_head, scale):
        """out[t, h] of a token's chosen rows: see above, float32, or packed with scales.

        every: they are all up to its position. scale: times log2(e).
        """
        thread = U(cuda.threadIdx.x)
        shared = cuda.shared.array(0, np.uint8, 1024)
        base, lane, group = shared_address(shared, 0), thread & U(31), thread >> U(7)
        token, n, whole = cuda.blockIdx.y, facts[cuda.blockIdx.y, LAST], facts[cuda.blockIdx.y, WHOLE]
        begin(shared, base, queries, cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x, thread)
        chunk, row, n_tiles = thread & U(7), thread >> U(3), (n + np.int32(KEYS - 1)) >> np.int32(6)
        place = np.int32(row)
        first, second = row_at(indices, token, place, n, every), row_at(indices, token, place + 32, n, every)
        note_missing(base, 0, row, chunk, first, second)
        cuda.syncthreads()
        if n_tiles > 0:
            ask(shared, base, 0, rows, row, chunk, first, second)
            first, second = row_at(indices, token, place + KEYS, n, every), row_at(indices, token, place + KEYS + 32, n, every)
        s, sums = cuda.local.array(SCORES, np.float32), cuda.local.array(SUMS, np.float32)
        for i in range(SUMS):
            sums[i] = ZERO
        g, c, of_warp = lane >> U(2), lane & U(3), U(16) * (thread >> U(5) & U(3))
        h = U(HEADS) * U(cuda.blockIdx.x) + of_warp + g
        of_row, put = base + U(FACTS_AT) + U(4) * (of_warp + g), base + U(WEIGHTS_AT) + U(128) * (of_warp + g) + U(4) * c
        all_scales, most = scale * unit[0], np.int64(n_head - 1)
        scale_h, scale_h_8 = all_scales * q_scales[token, min(np.int64(h), most)], all_scales * q_scales[token, min(np.int64(h) + 8, most)]
        of_queries, of_weights = ROWS | np.uint64(base >> U(4)), ROWS | np.uint64(base + U(WEIGHTS_AT) >> U(4))
        wait_phase(shared, QUERIES_HERE, U(0))
        for tile in range(np.int32(0), n_tiles, np.int32(1)):
            stage, here = tile & np.int32(1), base + U(IMAGE) + U(TILE) * U(tile & np.int32(1))
            wait_phase(shared, FULL + 8 * np.int64(stage), U(tile >> np.int32(1) & np.int32(1)))
            fence_async()
            my_turn = group == U(stage)
            if my_turn:
                multiply_keys(s, of_queries, ROWS | np.uint64(here >> U(4)))
            if tile > 0:
                wait_phase(shared, EMPTY + 8 * np.int64(1 - stage), U(tile - np.int32(1) >> np.int32(1) & np.int32(1)))
            if tile + 1 < n_tiles:
                note_missing(base, 1 - stage, row, chunk, first, second)
                ask(shared, base, 1 - stage, rows, row, chunk, first, second)
                place += np.int32(KEYS)
                first, second = row_at(indices, token, place + KEYS, n, every), row_at(indices, token, place + KEYS + 32, n, every)
            if my_turn:
                weigh(s, base, of_row, put, base + U(BIAS_AT) + U(4 * KEYS) * U(stage) + U(8) * c, KEYS * tile + KEYS > whole, scale_h,
                      scale_h_8, g, c)
            cuda.syncthreads()
            shrink_sums(sums, of_row)
            add_values(sums, of_weights, BY_COLUMNS | np.uint64(here + group * U(4 * PART) >> U(4)))
            wait_sums(sums, sums)
            cuda.syncwarp()
            if lane == U(0):
                arrive(shared, EMPTY + 8 * np.int64(stage))
        store(out, scales, sums, base, of_row, unit[0], h, U(n_head), token, group, of_warp + g, c)
    signature = "u1[::1], f4[::1], u1[::1], f4[:,::1], u1[::1], f4[::1], i4[:,:], i4[:,::1], b1, i4, f4"
    return kernel(signature, THREADS, "attend_chosen_packed" if packs else "attend_chosen", shared=SHARED,
                  specific=CAPABILITY)(attend_chosen)


ATTEND = {packs: _make_attend(packs) for packs in (False, True)}        # whether what comes out is packed -> kernel


def takes_rows(n_tokens, n_head, latents):
    """Whether there are kernels for a cache, and tokens of so many heads.

    While kernels are listed few tokens stand for many.
    """
    n_blocks = n_tokens * blocks_for(n_head, HEADS)
    return (not SIMULATED and n_tokens > 1 and (n_blocks >= MIN_BLOCKS or is_listing()) and n_head >= MIN_HEADS
            and (latents.first, latents.second) == (VALUE, ROTATED) and current().capability == CAPABILITY)


def takes(out, first, second, latents, mode):
    """Whether attend() has kernels for these arguments, and a mode."""
    n_tokens, n_head, n_v = out.shape
    return (mode in (SPARSE, DENSE) and n_v == VALUE and takes_rows(n_tokens, n_head, latents)
            and out.span[1] - out.span[0] == out.nbytes and are_aligned(out, first, second))


def attend(out, first, second, latents, indices, positions, scale):
    """Attention to the rows that indices [T, n] name, or up to positions [T].

    Negative ones are left out wherever they stand. first [T, H, VALUE], second [T, H, ROTATED]: the parts of queries. takes() must hold.
    """
    attend_to(out.flat.view(np.uint8), scratch("nothing", (1,), np.float32), *halved_queries(first, second), latents, indices, positions,
              scale, False)


def attend_packed(made, images, q_scales, latents, indices, scale):
    """Attention of queries that are images to chosen rows.

    made: the Rows (f16/panels.py) that receive the outputs of all tokens' heads.
    """
    attend_to(made.packed.flat, made.scales, images, q_scales, latents, indices, None, scale, True)


def attend_to(out, scales, images, q_scales, latents, indices, positions, scale, packs):
    """Launch what attends to chosen rows, or to those up to positions."""
    n_tokens, n_head = q_scales.shape
    every = indices is None
    facts = facts_of(indices, positions if every else None)
    rows, unit = halved(latents, facts)
    ATTEND[packs]((blocks_for(n_head, HEADS), n_tokens), out, scales, images, q_scales, rows, unit, facts if every else indices, facts,
                  every, n_head, LOG2_E * np.float32(scale))
