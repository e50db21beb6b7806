"""Attention modes: which keys a token attends to, as an integer for kernels.

DENSE: all keys up to the token's position. MASKED: the same with an additive mask. SPARSE: the chosen (top-k) keys.
"""
import numpy as np

from pydsa.backends.cuda.intrinsics.device import device


DENSE, MASKED, SPARSE = range(3)
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


@device
def share_of_keys(n_splits, tile, mode, positions, indices, t):
    """The number of keys of token t, and that of a split of them.

    Splits are whole tiles, except at the end of the keys.
    """
    n = np.int64(indices.shape[1]) if mode == SPARSE else positions[t] + 1
    return n, (n + n_splits * tile - 1) // (n_splits * tile) * tile


@device
def split_of_keys(split, n_splits, tile, mode, positions, indices, t):
    """The number of keys of token t; where a split of them begins and ends.

    See share_of_keys.
    """
    n, share = share_of_keys(n_splits, tile, mode, positions, indices, t)
    return n, split * share, min(n, (split + 1) * share)


@device
def key_and_bias(i, n, mode, indices, mask, t):
    """Key i of token t, and the bias of its logits; -1 and -inf if none.

    There is no key from n on, where the mask is -inf, and where the index is negative.
    """
    key, bias = np.int64(-1), MINUS_INFINITY
    if i < n:
        key, bias = np.int64(indices[t, i]) if mode == SPARSE else i, mask[t, i] if mode == MASKED else ZERO
    if bias == MINUS_INFINITY or key < 0:
        key, bias = np.int64(-1), MINUS_INFINITY
    return key, bias
