"""Keys and values of heads from latents: products in mma.sync, for all GPUs.

A block makes 2 * WIDE numbers of a head's keys or values for tiles of latents. Images of 64 numbers of latents, and of the weights that
meet them, come by asynchronous copies, STAGES of them under way. A warp has 32 latents and WIDE numbers. Both keys and values are written
as images for attend_mma.py: in tiles of 2^key_bits keys, one image for each 64 numbers.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.flash.heads import turned, word_of
from pydsa.backends.cuda.flash.images import TILE, WIDE
from pydsa.backends.cuda.intrinsics.device import device, mma_f16
from pydsa.backends.cuda.intrinsics.instructions import commit_copies, copies_left, store_sixteen
from pydsa.backends.cuda.intrinsics.shared_memory import copy_sixteen, load_fragments, load_transposed, shared_address
from pydsa.backends.cuda.runtime.launch import kernel

THREADS, STAGES = 256, 3
IMAGE, WEIGHTS = 128 * TILE, 128 * WIDE         # bytes of an image of a tile of latents, and of weights for a half of the warps
STAGE = IMAGE + 2 * WEIGHTS
SUMS, ROW_TILES, COLUMN_PAIRS = WIDE, 2, WIDE // 16      # of a warp
KV_LORA = 256, 512          # for which there are kernels: powers of two
U, ZERO = np.uint32, np.float32(0)
stage_is_there = copies_left(STAGES - 2)


@device
def of_rows(lane):
    """Where a lane's row of 16 rows is in an image, for load_fragments.

    It gets fragments of 16 rows as A has them, of the first 16 numbers. Those of the i-th 16 are at this, exclusive or 32 i. From
    load_transposed it gets fragments of 16 rows as B has them by columns: of the first 8 numbers, then of the next.
    """
    return U(128) * (lane & U(15)) + U(16) * (lane >> U(4) ^ lane & U(7))


@device
def of_columns(lane):
    """The same for B by rows: of 16 numbers of 8 rows, then of the next 8."""
    return U(128) * (U(8) * (lane >> U(4)) + (lane & U(7))) + U(16) * (lane >> U(3) & U(1) ^ lane & U(7))


@device
def add_pair(sums, i, a, b0, b1, b2, b3):
    """sums[i:i + 8] += 16 rows of A times two tiles of 8 columns of B."""
    a0, a1, a2, a3 = a
    sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = mma_f16(a0, a1, a2, a3, b0, b1, sums[i], sums[i + 1], sums[i + 2], sums[i + 3])
    sums[i + 4], sums[i + 5], sums[i + 6], sums[i + 7] = mma_f16(a0, a1, a2, a3, b2, b3, sums[i + 4], sums[i + 5], sums[i + 6],
                                                                 sums[i + 7])


def _make_multiply(of_values):
    @device
    def multiply(sums, rows, weights):
        """sums += an image of a warp's latents times one of its weights.

        rows, weights: addresses of a lane, as of_rows() and of_columns() tell.
        """
        for step in range(4):
            at = U(32) * U(step)
            a, b = load_fragments(rows ^ at), load_fragments((rows ^ at) + U(2048))
            for pair in range(COLUMN_PAIRS):
                if of_values:       # 16 rows of weights, of which each is a number of values
                    b0, b1, b2, b3 = load_fragments((weights ^ at) + U(2048 * pair))
                else:
                    b0, b1, b2, b3 = load_transposed((weights ^ U(32 * pair)) + U(2048) * U(step))
                add_pair(sums, 8 * pair, a, b0, b1, b2, b3)
                add_pair(sums, SUMS // 2 + 8 * pair, b, b0, b1, b2, b3)
    return multiply


@device
def store_sums(out, at, sums, key_bits, n_images, key, lane, repeats):
    """Store a warp's sums as float16, in an image for attend_mma.py.

    at: where the image begins in the first tile of a head's keys. n_images: of a tile. key: the first of 32. repeats: whether another
    warp stores the same. All warps must call: lanes exchange words.
    """
    for m in range(ROW_TILES):
        for half in range(2):
            row = key + 16 * m + 8 * half + (lane >> 2)
            to = at + 128 * np.int64((row >> key_bits << key_bits) * n_images + (row & (1 << key_bits) - 1))
            for q in range(2):
                i = SUMS // 2 * m + 16 * q + 2 * half
                w0, w1, w2, w3 = turned((word_of(sums, i), word_of(sums, i + 4), word_of(sums, i + 8), word_of(sums, i + 12)), lane)
                if not repeats:
                    store_sixteen(out, to + 16 * (4 * q + (lane & 3) ^ lane >> 2), w0, w1, w2, w3)


def images_bits_of(kv_lora):
    """The logarithm of the number of images that a tile of latents has."""
    return (kv_lora // WIDE).bit_length() - 1


def _make_copy_stage(of_values, kv_lora):
    images_bits = images_bits_of(kv_lora)
    last_image = (1 << images_bits) - 1

    @device
    def copy_stage(to, latents, tile, weights, head, image, image_1, n, i, thread):
        """Begin to copy a stage: image i of latents, from a tile on.

        The next tiles are gridDim.z apart. image, image_1: of 64 numbers of keys or values, for which weights come.
        """
        k, at = i & last_image, 16 * np.int64(thread)
        of_latents = ((tile + (i >> images_bits) * cuda.gridDim.z) * np.int64(1 << images_bits) + k) * IMAGE + at
        for j in range(IMAGE // (16 * THREADS)):
            copy_sixteen(to + U(16 * THREADS * j), latents, of_latents + 16 * THREADS * j, U(16))
        if of_values:       # an image has n rows, and those of 64 values are adjacent
            first, second = (k * n + WIDE * image) * np.int64(128), (k * n + WIDE * image_1) * np.int64(128)
        else:               # an image has kv_lora rows
            first, second = (kv_lora * image + WIDE * k) * np.int64(128), (kv_lora * image_1 + WIDE * k) * np.int64(128)
        of_head = head * (2 * kv_lora * n) + at
        for j in range(WEIGHTS // (16 * THREADS)):
            copy_sixteen(to + U(IMAGE + 16 * THREADS * j), weights, of_head + first + 16 * THREADS * j, U(16))
            copy_sixteen(to + U(IMAGE + WEIGHTS + 16 * THREADS * j), weights, of_head + second + 16 * THREADS * j, U(16))
    return copy_stage


def _make_heads(of_values, kv_lora):
    multiply, copy_stage, images_bits = _make_multiply(of_values), _make_copy_stage(of_values, kv_lora), images_bits_of(kv_lora)

    def heads(out, out_head, weights, n, key_bits, latents, n_tiles):
        """Keys or values of a head, 2 * WIDE numbers of them.

        They are of the tiles of latents from blockIdx.z on, every gridDim.z-th. weights: images of k_b or v_b, whose heads have n numbers
        for a key. out_head: bytes of a head in out. Keys are in tiles of 2^key_bits.
        """
        thread, head, shared = U(cuda.threadIdx.x), np.int64(cuda.blockIdx.x), cuda.shared.array(0, np.uint8, 1024)
        lane, warp, n_images, tile = thread & U(31), thread >> U(5), n // WIDE, np.int32(cuda.blockIdx.z)
        image, image_1 = 2 * cuda.blockIdx.y, min(2 * cuda.blockIdx.y + 1, n_images - 1)        # the last half may repeat an image
        place, slot, i = shared_address(shared, 0), np.int32(0), np.int32(0)
        to, first, step = place + U(16) * thread, tile, np.int32(cuda.gridDim.z)
        rows = place + U(4096) * (warp & U(3)) + of_rows(lane)
        of_weights = place + U(IMAGE) + U(WEIGHTS) * (warp >> U(2)) + (of_columns(lane) if of_values else of_rows(lane))
        my_image, repeats = image if warp < U(4) else image_1, warp >= U(4) and image_1 == image
        sums = cuda.local.array(SUMS, np.float32)
        for s in range(STAGES - 1):
            copy_stage(to + U(STAGE * s), latents, first, weights, head, image, image_1, n, np.int32(s), thread)
            commit_copies()
        while tile < n_tiles:
            for s in range(SUMS):
                sums[s] = ZERO
            for k in range(np.int32(0), np.int32(1 << images_bits), np.int32(1)):
                stage_is_there()
                cuda.syncthreads()
                before, later = slot - 1 if slot > 0 else STAGES - 1, np.int32(i + (STAGES - 1))
                if first + (later >> images_bits) * step < n_tiles:     # into the stage that all warps have left
                    copy_stage(to + U(STAGE) * U(before), latents, first, weights, head, image, image_1, n, later, thread)
                commit_copies()
                multiply(sums, rows + U(STAGE) * U(slot), of_weights + U(STAGE) * U(slot))
                slot, i = np.int32(slot + 1 if slot < STAGES - 1 else 0), np.int32(i + 1)
            at, key = head * out_head + np.int64(128) * (my_image << key_bits), tile * TILE + 32 * np.int32(warp & U(3))
            store_sums(out, at, sums, key_bits, n_images, key, np.int32(lane), repeats)
            tile += step
    kind = "values" if of_values else "keys"
    return kernel("u1[::1], i8, u1[::1], i4, i4, u1[::1], i4", THREADS, f"flash_mma_{kind}_{kv_lora}", shared=STAGES * STAGE)(heads)


# kv_lora -> kernels of keys and of values
KERNELS = {kv_lora: (_make_heads(False, kv_lora), _make_heads(True, kv_lora)) for kv_lora in KV_LORA}
