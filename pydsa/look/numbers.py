"""Numbers of a recording: what was chosen how often, by whom, and how choices change from token to token.

A row of a recording is a token that ran. Choices are int32 [n_rows, k], positions of keys, with -1 at the end of a row.
"""
import numpy as np

AT_ONCE = 1 << 24       # elements of a block of rows
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


def overlaps(chosen, rows, positions, n):
    """The share of each row's keys that the token before it chose too.

    rows: those that made a choice, ascending; positions: of all rows. Returns float64 [len(rows)], NaN where the token before made none.
    """
    result, step = np.full(len(rows), np.nan), max(1, AT_ONCE // n)
    for start in range(1, len(rows), step):
        part = rows[start - 1:start + step]
        bits = marks(chosen[part], n)
        both, own = (bits[1:] & bits[:-1]).sum(axis=1), bits[1:].sum(axis=1)
        next_to = (np.diff(positions[part]) == 1) & (own > 0)
        result[start:start + step] = np.where(next_to, both / np.maximum(own, 1), np.nan)
    return result


def marks(chosen, n):
    """Choices as a table: bool [n_rows, n], where a row chose a position."""
    table = np.zeros((len(chosen), n + 1), bool)
    np.put_along_axis(table, chosen.astype(np.int64), True, axis=1)     # -1 selects the last column
    return table[:, :n]


def unions(chosen, rows, positions, n):
    """How many keys blocks of neighbouring tokens chose -> {block: float}.

    In multiples of what one of them chose: 1 if all chose the same. rows, positions: as for overlaps(). A block without an example is
    not there.
    """
    found = {block: [] for block in BLOCKS}
    if not len(rows):
        return {}
    starts = np.flatnonzero(np.diff(positions[rows], prepend=-2) != 1)
    for start, end in zip(starts, [*starts[1:], len(rows)]):
        for first in range(start, end, BLOCKS[-1]):
            bits = marks(chosen[rows[first:min(first + BLOCKS[-1], end)]], n)
            own = bits.sum(axis=1)
            for block in BLOCKS:
                bits = bits[:len(bits) // 2 * 2]
                bits = bits[::2] | bits[1::2]
                one = own[:len(bits) * block].reshape(-1, block).mean(axis=1)
                found[block] += (bits.sum(axis=1) / np.maximum(one, 1)).tolist()
    return {block: float(np.mean(values)) for block, values in found.items() if values}


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
