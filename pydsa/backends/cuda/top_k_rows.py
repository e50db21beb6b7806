"""Top-k of many rows: a block a row, whose scores are read two or three times.

As top_k.py: a radix select on the bits of the floats, of equal scores the lowest index first. Digits of twelve bits are counted until the
keys that are chosen for sure, and those that may be, fit into a list in shared memory. They are put there in the order of the row, and the
rest happens there.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.device import SIMULATED, device
from pydsa.backends.cuda.intrinsics.instructions import instruction
from pydsa.backends.cuda.intrinsics.shared_memory import WHOLE_WARP, anew, shared_address, store_word
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import kernel
from pydsa.backends.cuda.top_k_one import ALL, LOWEST, NAN, NONE, ordered


THREADS, WARPS, ROOM = 512, 16, 8192    # ROOM: keys of the list
THREADS_BITS = THREADS.bit_length() - 1
BITS = 12                               # of a digit
BINS = 1 << BITS                        # eight a thread
PER_THREAD = 8                          # scores that a thread loads at once
PER_BLOCK = PER_THREAD * THREADS
FEW = 16                                # rows, of which long ones are rather divided among blocks (top_k.py)
SHORT = 2 * PER_BLOCK                   # scores of a row that is not divided
# Bytes of shared memory: bins, keys of the list, their places; sums of warps, twice; what find_digit finds.
KEYS, PLACES, TOTALS = 4 * BINS, 4 * (BINS + ROOM), 4 * (BINS + 2 * ROOM)
TURN = 4 * WARPS                        # from one half of the sums to the other
FOUND = TOTALS + 2 * TURN
SHARED = FOUND + 16
U, N = np.uint32, np.int32
EQUAL = N(1 << 16)                      # the unit of the upper of two packed counters
ALL_BITS = U(32)

load_score = instruction("ld.global.f32 $0, [$1];", "f", "g", fixed=True)
load_four_scores = instruction("ld.global.v4.f32 {$0,$1,$2,$3}, [$4];", "ffff", "g", fixed=True)
store_place = instruction("st.global.u32 [$0], $1;", "", "gr", fixed=True)
load_word = instruction("ld.shared.u32 $0, [$1];", "r", "r", fixed=True)
load_four_words = instruction("ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", "rrrr", "r", fixed=True)
store_four_words = instruction("st.shared.v4.u32 [$0], {$1,$2,$3,$4};", "", "rrrrr", fixed=True)
count_one = instruction("red.shared.add.u32 [$0], 1;", "", "r", fixed=True)


@device
def prefix(x, totals, thread):
    """The sum of x, int32, of all threads before this one, and of all.

    A barrier must come between two calls with the same totals, beside that in here.
    """
    lane, s, x = thread & 31, x, N(x)
    s = x
    for step in (1, 2, 4, 8, 16):
        below = N(cuda.shfl_up_sync(WHOLE_WARP, s, step))
        if lane >= step:
            s = N(s + below)
    if lane == 31:
        store_word(U(totals + U(4) * U(thread >> 5)), U(s))
    cuda.syncthreads()
    before, total, warp = N(0), N(0), thread >> 5
    for i in range(WARPS // 4):
        a, b, c, d = load_four_words(U(totals + U(16 * i)))
        before = N(before + (N(a) if 4 * i < warp else N(0)) + (N(b) if 4 * i + 1 < warp else N(0)) + (
            N(c) if 4 * i + 2 < warp else N(0)) + (N(d) if 4 * i + 3 < warp else N(0)))
        total = N(total + N(a) + N(b) + N(c) + N(d))
    return N(before + s - x), total


@device
def clear_bins(shared, thread):
    """Set all bins to zero."""
    for i in range(BINS // 4 // THREADS):
        store_four_words(U(shared + U(16) * U(thread + THREADS * i)), NONE, NONE, NONE, NONE)
    cuda.syncthreads()


@device
def find_digit(shared, room, thread):
    """The bin of the room-th key, from the highest bin on, is `found`.

    found: in shared memory, the bin, how many of its keys are chosen, and how many it has. Returns the number of all keys; where that is
    not above `room`, nothing is found.
    """
    at = U(shared + U(4 * BINS - 32) - U(32) * U(thread))
    h, g, f, e = load_four_words(at)
    d, c, b, a = load_four_words(U(at + U(16)))
    mine = N(a + b + c + d + e + f + g + h)
    before, total = prefix(mine, U(shared + U(TOTALS)), thread)
    left = N(room - before)
    if total > room and N(0) < left and left <= mine:
        digit = U(U(BINS - 1) - U(8) * U(thread))
        for n in (a, b, c, d, e, f, g, h):
            if left > N(0):
                store_word(U(shared + U(FOUND)), digit)
                store_word(U(shared + U(FOUND + 4)), U(left))
                store_word(U(shared + U(FOUND + 8)), n)
            left = N(left - N(n))
            digit = U(digit - U(1))
    cuda.syncthreads()
    return total


@device
def load_some(values, j, scores, at, left):
    """values[j:j + 4] = four scores, of which `left` are there, and NaN.

    at: their first byte. What follows the last score of a row may not be written yet.
    """
    values[j], values[j + 1], values[j + 2], values[j + 3] = NAN, NAN, NAN, NAN
    if left >= N(4):
        values[j], values[j + 1], values[j + 2], values[j + 3] = load_four_scores(scores, at)
    elif left > N(0):
        values[j] = load_score(scores, at)
        if left > N(1):
            values[j + 1] = load_score(scores, at + 4)
        if left > N(2):
            values[j + 2] = load_score(scores, at + 8)


@device
def load_scores(values, scores, row, base, i, apart, n):
    """A thread's eight of the next PER_BLOCK scores, from `base` on.

    They are four from place i on, and four `apart` from these; NaN past the end. row: the byte at which the row begins, a multiple of 16.
    """
    at = row + np.int64(4) * i
    if N(base + N(PER_BLOCK)) <= n:     # the same in all threads
        values[0], values[1], values[2], values[3] = load_four_scores(scores, at)
        values[4], values[5], values[6], values[7] = load_four_scores(scores, at + 4 * apart)
    else:
        load_some(values, 0, scores, at, N(n - i))
        load_some(values, 4, scores, at + 4 * apart, N(n - i - N(apart)))


@device
def count_row(values, scores, row, n, least, known_bits, shift, mask, shared, thread):
    """Count a digit, at `shift`, of some of a row's keys.

    They are those whose known bits are those of `least`.
    """
    for base in range(N(0), n, N(PER_BLOCK)):
        load_scores(values, scores, row, base, N(base + N(4) * N(thread)), PER_BLOCK // 2, n)
        for j in range(PER_THREAD):
            key = ordered(values[j])
            if (key > LOWEST) & ((key ^ least) & known_bits == U(0)):
                count_one(U(shared + U(4) * U(key >> shift & mask)))
    cuda.syncthreads()


@device
def above_bit(n):
    """The mask of bits n and higher; of none if n is 32."""
    return U(ALL << (n & U(31))) if n < ALL_BITS else NONE


@device
def narrow(values, scores, row, n, k, shared, thread):
    """Find so many digits that what may be chosen fits into the list.

    Returns the digits found, below which all bits are zero; the place of the last one; how many keys with these digits are chosen. If all
    keys are, that is the lowest key, and none of it.
    """
    least, shift, room = NONE, ALL_BITS, k
    while shift > U(0):
        clear_bins(shared, thread)
        known_bits, digits = above_bit(shift), min(shift, U(BITS))
        shift = U(shift - digits)
        count_row(values, scores, row, n, least, known_bits, shift, U((U(1) << digits) - U(1)), shared, thread)
        if find_digit(shared, room, thread) <= room:        # only in the first round
            least, shift, room = LOWEST, U(0), N(0)
            break
        least, room = U(least | load_word(U(shared + U(FOUND))) << shift), N(load_word(U(shared + U(FOUND + 4))))
        held = N(k - room + N(load_word(U(shared + U(FOUND + 8)))))
        cuda.syncthreads()
        if held <= N(ROOM):
            break
    return least, shift, room


@device
def list_row(values, scores, row, n, least, shift, limit, shared, thread):
    """List keys and places of those above the digits of `least`, in order.

    And of the first `limit` with these digits. Returns how many there are.
    """
    top, turn, above, equal = U(least >> shift), U(shared + U(TOTALS)), N(0), N(0)
    for base in range(N(0), n, N(PER_BLOCK)):
        i, mine = N(base + N(PER_THREAD) * N(thread)), N(0)
        load_scores(values, scores, row, base, i, 4, n)
        for j in range(PER_THREAD):
            key = ordered(values[j])
            mine = N(mine + (N(1) if key >> shift > top else EQUAL if (key >> shift == top) & (key > LOWEST) else N(0)))
        before, total = prefix(mine, turn, thread)
        turn = U(U(2) * U(shared + U(TOTALS)) + U(TURN) - turn)
        if mine != N(0):
            here, same, by = N(above + (before & (EQUAL - N(1)))), N(equal + (before >> 16)), anew(shift)
            for j in range(PER_THREAD):
                key = ordered(values[j])
                higher, level = key >> by > top, (key >> by == top) & (key > LOWEST)
                if higher | level & (same < limit):
                    to = U(shared + U(4) * U(here + min(same, limit)))
                    store_word(U(to + U(KEYS)), key)
                    store_word(U(to + U(PLACES)), U(i + N(j)))
                here, same = N(here + (N(1) if higher else N(0))), N(same + (N(1) if level else N(0)))
        above, equal = N(above + (total & (EQUAL - N(1)))), N(equal + (total >> 16))
    cuda.syncthreads()
    return N(above + min(equal, limit))


@device
def finish(m, least, shift, room, shared, thread):
    """Find the digits that are left, among the m keys of the list.

    Returns the threshold, and how many keys that equal it are chosen.
    """
    while shift > U(0):
        clear_bins(shared, thread)
        known_bits, digits = above_bit(shift), min(shift, U(BITS))
        shift, mask = U(shift - digits), U((U(1) << digits) - U(1))
        for i in range(N(thread), m, N(THREADS)):
            key = load_word(U(shared + U(KEYS) + U(4) * U(i)))
            if (key ^ least) & known_bits == U(0):
                count_one(U(shared + U(4) * U(key >> shift & mask)))
        cuda.syncthreads()
        if find_digit(shared, room, thread) <= room:        # all that are left: they are above what is just below them
            least, room, shift = U(least - U(1)), N(0), U(0)
        else:
            least, room = U(least | load_word(U(shared + U(FOUND))) << shift), N(load_word(U(shared + U(FOUND + 4))))
        cuda.syncthreads()
    return least, room


@device
def write_chosen(out, to, k, m, least, room, shared, thread):
    """Write the places of chosen keys, then -1.

    Chosen are the list's keys above `least`, and the first `room` that equal it. to: the byte of out at which the row begins.
    """
    share = N((m + N(THREADS - 1)) >> THREADS_BITS)
    first = N(share * N(thread))
    end, mine = min(N(first + share), m), N(0)
    for i in range(first, end, N(1)):
        key = load_word(U(shared + U(KEYS) + U(4) * U(i)))
        mine = N(mine + (N(1) if key > least else EQUAL if key == least else N(0)))
    before, total = prefix(mine, U(shared + U(TOTALS)), thread)
    here, same = N(before & (EQUAL - N(1))), N(before >> 16)
    for i in range(first, end, N(1)):
        key = load_word(U(shared + U(KEYS) + U(4) * U(i)))
        if (key > least) | (key == least) & (same < room):
            store_place(out, to + np.int64(4) * N(here + min(same, room)), load_word(U(shared + U(PLACES) + U(4) * U(i))))
        here, same = N(here + (N(1) if key > least else N(0))), N(same + (N(1) if key == least else N(0)))
    for i in range(N((total & (EQUAL - N(1))) + min(N(total >> 16), room) + N(thread)), k, N(THREADS)):
        store_place(out, to + np.int64(4) * i, U(0xFFFFFFFF))


@kernel("i4[:,:], i4, i8, f4[:,:], i8, i8[:], b1", THREADS, blocks=2, shared=SHARED)
def choose_of_each(out, start, out_pitch, scores, pitch, positions, causal):
    """out[start + t] = the top-k of row t of scores.

    A row begins so many bytes after the one before. causal: row t ends with positions[start + t].
    """
    shared, values = shared_address(cuda.shared.array(0, np.uint8, 128), 0), cuda.local.array(PER_THREAD, np.float32)
    thread, t, k = N(cuda.threadIdx.x & THREADS - 1), cuda.blockIdx.x & 0x7FFFFFFF, N(out.shape[1])
    n, row = N(scores.shape[1]), t * pitch
    if causal:
        n = N(min(np.int64(n), positions[start + t] + 1))
    least, shift, room = narrow(values, scores, row, n, k, shared, thread)
    limit = N(ROOM) if shift > U(0) else room       # what may be chosen fits, as far as it is known
    m = list_row(values, scores, row, n, least, shift, limit, shared, thread)
    least, room = finish(m, least, shift, room, shared, thread)
    write_chosen(out, (start + t) * out_pitch, k, m, least, room, shared, thread)


def takes(scores, k):
    """Whether choose_rows takes scores [rows, n] for k chosen ones."""
    n_rows, n = scores.shape
    return (not SIMULATED and (n_rows >= FEW or n_rows > 1 and n <= SHORT) and k <= ROOM and scores.strides[1] == 4
            and scores.strides[0] % 16 == 0 and scores.span[0] % 16 == 0)


def choose_rows(out, scores, positions=None, start=0):
    """out[start + t] = the top-k of row t of scores, float32 [rows, n].

    With positions, only of scores up to positions[start + t]. takes() must hold.
    """
    causal = positions is not None
    assert out.strides[1] == 4
    choose_of_each(len(scores), out, start, out.strides[0], scores, scores.strides[0],
                   positions if causal else scratch("nothing", (1,), np.int64), causal)
