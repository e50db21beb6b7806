"""Keys and values of heads from latents: products in wgmma of capability 9.0.

A block has ROWS rows of a head's weights in shared memory and multiplies them with tiles of latents, of which bulk copies fetch images of
64 numbers, STAGES of them under way. It writes images for attend.py: of keys in tiles of 2^key_bits, one for each 64 numbers; of values,
which lie by columns, one for each 64 keys.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.flash.images import GAIN, TILE, pack_halves
from pydsa.backends.cuda.intrinsics.device import device
from pydsa.backends.cuda.intrinsics.hopper import (arrive, copy_bulk, expect_bytes, fence_mbarriers, init_mbarrier, make_wgmma_shared,
                                                   make_wgmma_wait, steps_of_rows, wait_phase)
from pydsa.backends.cuda.intrinsics.instructions import quotient, store_sixteen
from pydsa.backends.cuda.intrinsics.shared_memory import shared_address
from pydsa.backends.cuda.runtime.launch import kernel

CAPABILITY = 9, 0
KV_LORA, TILE_BYTES = 512, 2 * 512 * TILE      # numbers of a latent, bytes of a tile of them
ROWS, THREADS, WARPS, STAGES = 128, 256, 8, 5
BLOCKS = 528                                # that are wanted: each copies its weights first, and one fits into a multiprocessor
IMAGES = KV_LORA // 64                      # of a tile of latents, and of weights
IMAGE = 128 * TILE                          # bytes
WEIGHT_BYTES = IMAGES * IMAGE               # of a block
BARS = WEIGHT_BYTES + STAGES * IMAGE        # where mbarriers are: of full stages, of empty ones, of weights
EMPTY, OF_WEIGHTS = BARS + 8 * STAGES, BARS + 16 * STAGES
SHARED = OF_WEIGHTS + 16
SUMS = ROWS // 2
U, ZERO = np.uint32, np.float32(0)
WHOLE_WARP = np.uint32(0xFFFFFFFF)
BY_ROWS = np.uint64(1 << 62 | 64 << 32 | 1 << 16)           # descriptor: swizzle of 128 bytes; eight rows are 1,024 bytes
BY_COLUMNS = np.uint64(1 << 62 | 64 << 32 | 128 * KV_LORA >> 4 << 16)       # the same for columns; an image of 64 has KV_LORA rows

ALONG_ROWS, DOWN_ROWS = steps_of_rows(4, 0), [128 * step for step in range(4)]      # 16 rows are 2,048 bytes
add_keys = make_wgmma_shared(ROWS, ALONG_ROWS, DOWN_ROWS, by_columns=True)
add_values = make_wgmma_shared(ROWS, ALONG_ROWS, ALONG_ROWS)
wait_sums = make_wgmma_wait(ROWS, 0)


@device
def from_lane(word, step):
    """A word of the lane whose number differs in the bit `step`."""
    return U(cuda.shfl_xor_sync(WHOLE_WARP, np.int32(word), step))


@device
def turned(words, lane):
    """Four words of four lanes: lane i of them gets the i-th words of all."""
    odd, upper = lane & 1 > 0, lane & 2 > 0
    a, b = from_lane(words[0] if odd else words[1], 1), from_lane(words[2] if odd else words[3], 1)
    a0, a1 = a if odd else words[0], words[1] if odd else a
    b0, b1 = b if odd else words[2], words[3] if odd else b
    x, y = from_lane(a0 if upper else b0, 2), from_lane(a1 if upper else b1, 2)
    return (x, y, b0, b1) if upper else (a0, a1, x, y)


@device
def word_of(sums, i):
    """Two sums as float16."""
    return pack_halves(sums[i + 1] * GAIN, sums[i] * GAIN)


@device
def store_row(out, at, next_image, sums, row, first, lane):
    """Store a lane's row of sums as float16 in two images of 64 numbers.

    at: of the row in the first one. first: 0, or 1 to store the second one only.
    """
    for q in range(4):
        i = 16 * q + 2 * row
        w0, w1, w2, w3 = turned((word_of(sums, i), word_of(sums, i + 4), word_of(sums, i + 8), word_of(sums, i + 12)), lane)
        if q >= 2 * first:
            piece = 4 * (q & 1) + (lane & 3) ^ lane >> 2
            store_sixteen(out, at + (q >> 1) * next_image + 16 * piece, w0, w1, w2, w3)


@device
def begin(shared, weights, at, next_image, latents, tile, n, thread):
    """Set up mbarriers, and begin to copy weights and the first stages.

    at: where the first image of weights begins. tile: of the first latents. n: the number of stages there are.
    """
    if thread == 0:
        for i in range(STAGES):
            init_mbarrier(shared, BARS + 8 * i, U(1))
            init_mbarrier(shared, EMPTY + 8 * i, U(WARPS))
        init_mbarrier(shared, OF_WEIGHTS, U(1))
        fence_mbarriers()
        expect_bytes(shared, OF_WEIGHTS, U(WEIGHT_BYTES))
        for i in range(IMAGES):
            copy_bulk(shared, IMAGE * i, weights, at + next_image * i, U(IMAGE), shared, OF_WEIGHTS)
        for i in range(min(STAGES, n)):
            copy_stage(shared, i, latents, tile * np.int64(TILE_BYTES) + IMAGE * i)
    cuda.syncthreads()
    wait_phase(shared, OF_WEIGHTS, U(0))


@device
def copy_stage(shared, slot, latents, at):
    """Begin to copy an image of latents."""
    expect_bytes(shared, BARS + 8 * slot, U(IMAGE))
    copy_bulk(shared, WEIGHT_BYTES + IMAGE * slot, latents, at, U(IMAGE), shared, BARS + 8 * slot)


def _make_store_tile(of_values):
    @device
    def store_tile(out, sums, tile, of_head, n, key_bits, first, group, skipped, warp, lane):
        """Store the sums of a tile of latents.

        of_head: where the head begins. first: the number of the first of two images.
        """
        for half in range(2):
            r = 16 * warp + (lane >> 2) + 8 * half
            if of_values:
                at, step = (2 * np.int64(tile) * n + ROWS * group + r) * 128, 128 * n
            else:
                key = np.int64(tile) * TILE + r
                row = (key >> key_bits << key_bits) * (n // 64) + (first << key_bits) + (key & (1 << key_bits) - 1)
                at, step = 128 * row, 128 << key_bits
            store_row(out, of_head + at, step, sums, half, skipped, lane)
    return store_tile


def _make_heads(of_values):
    store_tile = _make_store_tile(of_values)

    @device
    def first_of(weights, latents, group):
        """Descriptors of the first products of a group of four warps."""
        if of_values:
            return BY_ROWS | np.uint64(weights + 8192 * group >> 4), BY_ROWS | np.uint64(latents >> 4)
        return BY_ROWS | np.uint64(latents + 8192 * group >> 4), BY_COLUMNS | np.uint64(weights >> 4)

    @device
    def multiply(sums, weights, latents, k, slot):
        """sums += the k-th image of weights times the one in a stage."""
        if of_values:
            add_values(sums, weights + np.uint64(k * (IMAGE >> 4)), latents + np.uint64(slot * (IMAGE >> 4)))
        else:
            add_keys(sums, latents + np.uint64(slot * (IMAGE >> 4)), weights + np.uint64(k * (8192 >> 4)))

    def heads(out, out_head, weights, n, key_bits, latents, n_tiles):
        """Keys or values of a head, ROWS numbers of them.

        They are of the tiles of latents from blockIdx.z on, every gridDim.z-th. weights: images of k_b or v_b, whose heads have n numbers
        for a key. out_head: bytes of a head in out. Keys are in tiles of 2^key_bits.
        """
        thread, head, shared = cuda.threadIdx.x, np.int64(cuda.blockIdx.x), cuda.shared.array(0, np.uint8, 1024)
        lane, warp, first = thread & 31, thread >> 5, 2 * cuda.blockIdx.y
        if of_values:
            at, next_image = head * (2 * KV_LORA * n) + cuda.blockIdx.y * IMAGE, 128 * n
        else:
            first = min(first, n // 64 - 2)         # the last block may repeat an image
            at, next_image = head * (2 * KV_LORA * n) + first * (128 * KV_LORA), IMAGE
        mine = quotient(n_tiles - cuda.blockIdx.z + cuda.gridDim.z - 1, cuda.gridDim.z)
        begin(shared, weights, at, next_image, latents, cuda.blockIdx.z, IMAGES * mine, thread)
        place = shared_address(shared, 0)
        a, b = first_of(np.int64(place), np.int64(place + U(WEIGHT_BYTES)), warp >> 2)
        of_weights, of_latents = (a, b) if of_values else (b, a)
        sums, i, skipped = cuda.local.array(SUMS, np.float32), 0, 2 * cuda.blockIdx.y - first
        for j in range(mine):
            tile = cuda.blockIdx.z + j * cuda.gridDim.z
            for s in range(SUMS):
                sums[s] = ZERO
            for k in range(IMAGES):
                slot, before = i % STAGES, (i + STAGES - 1) % STAGES
                wait_phase(shared, BARS + 8 * slot, U(i // STAGES & 1))
                multiply(sums, of_weights, of_latents, k, slot)
                later = i + STAGES - 1
                if thread == 0 and i > 0 and later < IMAGES * mine:      # into the stage that both groups of warps have left
                    wait_phase(shared, EMPTY + 8 * before, U((i - 1) // STAGES & 1))
                    copy_stage(shared, before, latents, (cuda.blockIdx.z + later // IMAGES * cuda.gridDim.z) * np.int64(TILE_BYTES)
                               + IMAGE * (later % IMAGES))
                wait_sums(sums, sums)
                if lane == 0:
                    arrive(shared, EMPTY + 8 * slot)
                i += 1
            store_tile(out, sums, tile, head * out_head, n, key_bits, first, cuda.blockIdx.y, skipped, warp, lane)
    return kernel("u1[::1], i8, u1[::1], i4, i4, u1[::1], i4", THREADS, "flash_values" if of_values else "flash_keys", shared=SHARED,
                  specific=CAPABILITY)(heads)


KERNELS = {KV_LORA: (_make_heads(False), _make_heads(True))}     # kv_lora -> kernels of keys and of values
