"""Numbers of a recording: what was chosen how often, by whom, and how choices change from token to token.

A row of a recording is a token that ran. Choices are int32 [n_rows, k], positions of keys, with -1 at the end of a row.
"""
import numpy as np

AT_ONCE = 1 << 22       # elements of a block of rows
UNITED = 1 << 14        # rows that are united, at most
BLOCKS = (2, 4, 8, 16, 32, 64)      # neighbouring tokens whose choices are united


def shares(scores, chosen):
    """The softmax of each row's scores over its chosen keys, [n_rows, k].

    Indexers are trained so that this is near the attention of their layer. Keys that are not chosen (chosen < 0) have 0.
    """
    there = chosen >= 0
    scores = np.where(there & np.isfinite(scores), scores, -np.inf).astype(np.float64)
    top = scores.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def tally(chosen, scores, rows, n):
    """How often rows chose each position -> (int64 [n], float64 [n]).

    The second is the sum of their shares(), zeros without scores.
    """
    times, weights = np.zeros(n, np.int64), np.zeros(n)
    for part in _blocks(rows, chosen.shape[1]):
        keys = chosen[part]
        there = keys >= 0
        times += np.bincount(keys[there], minlength=n)
        if scores is not None:
            weights += np.bincount(keys[there], shares(scores[part], keys)[there], n)
    return times, weights


def overlaps(chosen, rows, positions):
    """The share of each row's keys that the token before it chose too.

    rows: those that made a choice, ascending; positions: of all rows. Returns float64 [len(rows)], NaN where the token before made none.
    """
    result, step = np.full(len(rows), np.nan), max(1, AT_ONCE // (2 * chosen.shape[1]))
    for start in range(1, len(rows), step):
        part = rows[start - 1:start + step]
        keys = chosen[part]
        own = (keys[1:] >= 0).sum(axis=1)
        both = own + (keys[:-1] >= 0).sum(axis=1) - _distinct(np.concatenate([keys[:-1], keys[1:]], axis=1))
        next_to = (np.diff(positions[part]) == 1) & (own > 0)
        result[start:start + step] = np.where(next_to, both / np.maximum(own, 1), np.nan)
    return result


def _distinct(keys):
    """How many different keys each row has, int64 [n_rows]; -1 is none."""
    keys = np.sort(keys, axis=1)
    return (keys[:, 0] >= 0) + ((np.diff(keys, axis=1) > 0) & (keys[:, 1:] >= 0)).sum(axis=1)


def unions(chosen, rows, positions):
    """How many keys blocks of neighbouring tokens chose -> {block: float}.

    In multiples of what one of them chose: 1 if all chose the same. rows, positions: as for overlaps(). The mean of all blocks, or of as
    many, evenly taken, as have UNITED rows; sizes without an example are not there.
    """
    found = {}
    for block in BLOCKS:
        starts = np.arange(0, len(rows) - block + 1, block)
        starts = starts[positions[rows[starts + block - 1]] - positions[rows[starts]] == block - 1]
        starts = starts[::-(-len(starts) * block // UNITED) or 1]
        step, values = max(1, AT_ONCE // (block * chosen.shape[1])), []
        for first in range(0, len(starts), step):
            keys = chosen[rows[starts[first:first + step, None] + np.arange(block)]].reshape(-1, block * chosen.shape[1])
            values += (_distinct(keys) * block / np.maximum((keys >= 0).sum(axis=1), 1)).tolist()
        if values:
            found[block] = float(np.mean(values))
    return found


def expert_counts(experts, rows, n_expert):
    """How many of the rows each expert worked for, int64 [n_expert]."""
    ids = experts[rows]
    return np.bincount(ids[ids >= 0], minlength=n_expert)


def effective(counts):
    """The number of experts in effective use, for these counts of their use.

    It is the exponential of the entropy: n, if n of them are used equally; 0 without any use.
    """
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def _blocks(rows, width):
    """Rows in parts of at most AT_ONCE elements."""
    step = max(1, AT_ONCE // max(width, 1))
    return [rows[start:start + step] for start in range(0, len(rows), step)]
