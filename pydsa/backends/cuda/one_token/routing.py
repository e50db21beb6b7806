"""The choice of one token's experts, by one warp.

Either by a launch of its own (moe.py), or by each block that multiplies with a chosen expert, for itself (int8x2/gemv.py): then no launch
waits for another one.
"""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda.intrinsics.device import WARP, device, exp, warp_max, warp_sum, warp_sync
from pydsa.backends.cuda.intrinsics.division import divide
from pydsa.backends.cuda.intrinsics.instructions import quotient
from pydsa.backends.cuda.runtime.array import scratch


MOST, MOST_GROUPS = 512, 64         # experts, and groups of them, that blocks of products choose from: what their shared memory takes
ARGUMENTS = "f4[:], f4[:], f4[:], i4, i4, i4, b1, f4"       # of kernels, for a Router
FIXED, CHOSEN, TO_CHOOSE = range(3)         # matrices of products: known beforehand, written by an earlier kernel, or chosen by each block
MINUS_INFINITY, ZERO = np.float32(-np.inf), np.float32(0)


class Router(NamedTuple):
    """How one token's experts are chosen.

    The arguments of reference.moe_route but ids, for one row.
    """
    weights: object     # of the chosen experts, which are written
    logits: object
    bias: object
    gating: int
    n_group: int
    n_group_used: int
    norm: bool
    scale: float


def no_router():
    """The arguments of a kernel that chooses no experts."""
    nothing = scratch("nothing", (1,), np.float32)
    return Router(nothing, nothing, nothing, 0, 0, 0, False, ZERO)


def takes(logits, n_group):
    """Whether blocks of products choose from these experts."""
    return logits.shape[0] == 1 and logits.shape[1] <= MOST and n_group <= MOST_GROUPS


@device
def warp_argmax(values, n, lane):
    """Warp-level argmax of n values; the lowest index of equal ones.

    Every lane gets the result.
    """
    best, index = MINUS_INFINITY, np.float32(n)
    for i in range(lane, n, WARP):
        if values[i] > best or index == n:
            best, index = values[i], np.float32(i)
    maximum = warp_max(best)
    return int(-warp_max(-index if best == maximum else MINUS_INFINITY))


@device
def gated(logit, gating, maximum, total):
    """The gating function of a logit.

    gating: 1 is softmax, 2 is sigmoid, otherwise p = logit. maximum, total: of all logits, and of e^(logit - maximum).
    """
    if gating == 2:
        return divide(np.float32(1), np.float32(1) + exp(-logit))
    return divide(exp(logit - maximum), total) if gating == 1 else logit


@device
def score_experts(s, logits, bias, gating, lane):
    """s = the gating function of the logits + bias; -inf instead of NaN.

    Returns the two numbers that gated() takes.
    """
    n_expert, maximum, total = logits.size, MINUS_INFINITY, ZERO
    if gating == 1:
        for e in range(lane, n_expert, WARP):
            maximum = max(maximum, logits[e])
        maximum = warp_max(maximum)
        for e in range(lane, n_expert, WARP):
            total += exp(logits[e] - maximum)
        total = warp_sum(total)
    for e in range(lane, n_expert, WARP):
        value = gated(logits[e], gating, maximum, total) + bias[e]
        s[e] = value if value == value else MINUS_INFINITY
    warp_sync()
    return maximum, total


@device
def limit_groups(s, groups, kept, n_expert, n_group, n_group_used, lane):
    """Mask the scores of all but the best n_group_used groups of experts.

    A group's score is the sum of its two highest. groups, kept: shared memory, one entry per group.
    """
    size = quotient(np.int32(n_expert), np.int32(n_group))
    for g in range(lane, n_group, WARP):
        first, second = MINUS_INFINITY, MINUS_INFINITY
        for e in range(g * size, (g + 1) * size):
            if s[e] > first:
                first, second = s[e], first
            elif s[e] > second:
                second = s[e]
        groups[g] = first + second if size > 1 else first
        kept[g] = 0
    warp_sync()
    for i in range(n_group_used):
        g = warp_argmax(groups, n_group, lane)
        warp_sync()
        if lane == 0:
            groups[g], kept[g] = MINUS_INFINITY, 1
        warp_sync()
    for e in range(lane, n_expert, WARP):
        if kept[quotient(np.int32(e), size)] == 0:
            s[e] = MINUS_INFINITY
    warp_sync()


@device
def normalize_weights(weights, gating, norm, scale):
    """Normalize and scale a token's weights, by one thread.

    Softmax if gating is 3. Then divide by their sum if `norm`.
    """
    n_used, total = weights.size, ZERO
    if gating == 3:
        maximum = MINUS_INFINITY
        for i in range(n_used):
            maximum = max(maximum, weights[i])
        for i in range(n_used):
            weights[i] = exp(weights[i] - maximum)
            total += weights[i]
        for i in range(n_used):
            weights[i] /= total
    if norm:
        total = ZERO
        for i in range(n_used):
            total += weights[i]
        scale /= max(total, np.float32(6.103515625e-5))
    for i in range(n_used):
        weights[i] *= scale


@device
def choose(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale, n, writes, s, groups, kept, lane):
    """Choose n experts of one token, by one warp -> the last of them.

    NaN is the lowest score. writes: whether ids and weights are stored; then n is their number. s, groups, kept: shared memory, an entry
    for each expert, and two for each group.
    """
    n_expert, e = logits.size, 0
    maximum, total = score_experts(s, logits, bias, gating, lane)
    if n_group > 1:
        limit_groups(s, groups, kept, n_expert, n_group, n_group_used, lane)
    for i in range(n):
        e = warp_argmax(s, n_expert, lane)
        warp_sync()
        if lane == 0:
            s[e] = MINUS_INFINITY
            if writes:
                ids[i], weights[i] = e, gated(logits[e], gating, maximum, total)
        warp_sync()
    if writes and lane == 0:
        normalize_weights(weights, gating, norm, scale)
    return e
