"""GEMV of a matrix a head, and the indexer's scores, in one launch.

Neither needs the other. Blocks of the products come first, as in gemv.py; those behind them score keys as in indexer.py.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.int8x2.gemv import GEMV, MOST_BLOCKS, SIGNATURE, THREADS, WARPS, arguments, grid_of
from pydsa.backends.cuda.int8x2.indexer import TILE_U32, make_score
from pydsa.backends.cuda.intrinsics.device import SIMULATED, device
from pydsa.backends.cuda.intrinsics.instructions import let_later_begin, wait_for_earlier
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


HEAD_TILES = 4                          # whose queries fit into a block's shared memory, beside what gemv has there
QUERY_U32, HEADS, SUMS = HEAD_TILES * TILE_U32, 8 * HEAD_TILES, 4 * THREADS
MOST_OF_A_HEAD = 2                      # blocks, so that those of 128 heads leave room on an H100 for those that score
SCORES = "f4[:,:], u4[:,::1], f4[:,:], u1[::1], i8, i4, i8[:], f4"
TYPES = () if SIMULATED else ("Q8_0", "Q5_0")       # of k_b in files of Q8_0 and Q4_K_M: its rows are no multiple of 256
score_keys = make_score(WARPS, HEAD_TILES)


def _make(name):
    product = device(GEMV[name].function)

    def gemv_scores(out, w, second_out, second_w, third_out, third_w, fourth_out, fourth_w, row_bytes, ids, x_div, single_row, chosen,
                    shift, split, packed, scales, sums, mode, made, source, other, single_made, single_source, single_other, gain, eps,
                    n_splits, keys, n_chosen, positions, rounds, to_packed, to_scales, to_sums, weights, logits, bias, gating, n_group,
                    n_group_used, norm, scale, scores, queries, head_weights, key_data, key_bytes, width, position, score_scale):
        """Products of gemv.py; blocks whose y is past the ids score keys."""
        panel = cuda.shared.array(QUERY_U32, np.uint32, 16)
        staged_weights = cuda.shared.array(HEADS, np.float32)
        partial = cuda.shared.array(SUMS, np.float32)
        if cuda.blockIdx.y < ids.size:
            product(out, w, second_out, second_w, third_out, third_w, fourth_out, fourth_w, row_bytes, ids, x_div, single_row, chosen,
                    shift, split, packed, scales, sums, mode, made, source, other, single_made, single_source, single_other, gain, eps,
                    n_splits, keys, n_chosen, positions, rounds, to_packed, to_scales, to_sums, weights, logits, bias, gating, n_group,
                    n_group_used, norm, scale)
        else:
            block = (cuda.blockIdx.y - ids.size) * cuda.gridDim.x + cuda.blockIdx.x
            wait_for_earlier()
            let_later_begin()
            score_keys(scores, queries, head_weights, key_data, key_bytes, width, position, 0, score_scale, False, 0, block,
                       (cuda.gridDim.y - ids.size) * cuda.gridDim.x, panel, staged_weights, partial, cuda.threadIdx.x & THREADS - 1)
    return kernel(f"{SIGNATURE}, {SCORES}", THREADS, f"gemv_scores_{name.lower()}", blocks=4, dependent=True)(gemv_scores)


GEMV_SCORES = {name: _make(name) for name in TYPES}


def gemv_scores(out, w, x, tiles, scores, queries, keys, positions, scale):
    """out[y] = matrix y of w times row y of x; and scores of one token.

    See gemv.gemv() and indexer.score().
    """
    n_in = 32 * x.scales.shape[1]
    grid = grid_of([out], n_in, tiles.matrix.size, MOST_OF_A_HEAD)
    n_blocks = min(blocks_for(scores.shape[1], THREADS), MOST_BLOCKS)       # a thread has a key
    in_all = grid.blocks[0], grid.blocks[1] + blocks_for(n_blocks, grid.blocks[0]), 1
    GEMV_SCORES[w.type](in_all, *arguments([out], [w], x, tiles, grid, n_in), scores, *queries, keys.data.flat, keys.data.shape[1],
                        keys.first, positions, scale)
