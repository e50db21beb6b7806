"""Ask the system for the weights of the chosen experts, all at once.

A page that is touched before it is in memory is read together with its neighbours, while a thread waits: reads of the drive come one after
the other, and about half of what they bring belongs to experts that were not chosen. madvise(MADV_WILLNEED) asks for the ranges that are
needed and no others, and the drive works on all of them at a time.

A step asks only if the process has read from a drive since the last step began. For a file in memory that costs a look at a word.
"""
import mmap

import numpy as np
from numba import types

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.op import Stage, op

try:
    import resource
except ImportError:     # Windows, where nothing is asked for
    resource = None

CAN_ASK = resource is not None and hasattr(mmap, "MADV_WILLNEED")
USERS = "moe_gate_up", "moe_linear", "moe_down"     # ops with experts' weights, and their ids as the third argument
ENOUGH = 2          # choices for each expert that there is, from which on nearly all are used
MOST = 4 << 30      # bytes that a layer asks for, about: what comes first must not have left memory when it is used
PAGE, WILLNEED = mmap.PAGESIZE, getattr(mmap, "MADV_WILLNEED", 0)

_allowed = CAN_ASK                  # whether steps ask at all
_wanted = np.zeros(1, np.int64)     # whether the present step asks
_blocks_read = 0                    # by this process, when the last step began


def allow(asks):
    """Let steps ask, or not, to compare the two."""
    global _allowed
    _allowed = asks and CAN_ASK


def begin_step():
    """Decide whether the step that begins asks for weights -> the answer."""
    global _blocks_read
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock if _allowed else _blocks_read
    _wanted[0], _blocks_read = blocks != _blocks_read, blocks
    return bool(_wanted[0])


_madvise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))


@inner
def begin_asking(ids, wanted, parts, task):
    """A task for each expert's part of each matrix, or none.

    Where nearly all experts are chosen, they are read ahead (reading_ahead.py), in large pages, which are faster to use later.
    """
    return len(parts) * parts[0, 3] if wanted[0] and ids.size < ENOUGH * parts[0, 3] else 0


@inner
def ask(ids, wanted, parts, task):
    """Ask for an expert's part of a matrix, if it is chosen.

    Tasks are in the order of the file. Where the system refuses, the part is read when it is touched.
    """
    n_expert, total = parts[0, 3], 0
    k, e = task.index // n_expert, task.index % n_expert
    for i in range(len(parts)):
        total += ids.size * parts[i, 2]
    if e * total >= n_expert * MOST:
        return
    for t in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            if ids[t, i] == e:
                at = parts[k, 0] + e * parts[k, 1]
                first = at // PAGE * PAGE
                _madvise(first, at + parts[k, 2] - first, np.int32(WILLNEED))
                return


@inner
def nothing(ids, wanted, parts, task):
    """Begin a stage without tasks, or run one."""
    return 0


# The last stages of a group's ops share an interval: with as many stages as moe_gate_up it asks in the interval of that one's first.
@op(Stage(begin_asking, ask), *[Stage(nothing, nothing, light=True)] * 3)
def ask_for_experts(ids, wanted, parts):
    """Ask for the experts ids [n_tokens, n_used] if wanted[0] is 1.

    parts: int64 [n, 4], for each matrix its address, the bytes from one expert to the next, the bytes of one, and the number of experts.
    """
    return 0


def with_requests(groups):
    """Put calls that ask for experts behind those that choose them.

    groups: lists of pairs (op, args) that run one after the other. Experts that were chosen elsewhere are asked for in a group of its own,
    before the first that uses them. Where the system cannot be asked, the groups stay as they are.
    """
    requests = {id(ids): (ask_for_experts, (ids, _wanted, np.array(sorted(parts), np.int64)))
                for ids, parts in expert_parts(groups) if parts} if CAN_ASK else {}
    behind = []
    for group in groups:
        chosen = [args[0] for op, args in group if op.__name__ == "moe_route"]
        used = [args[2] for op, args in group if op.__name__ in USERS]
        late = [requests.pop(id(ids)) for ids in used if id(ids) in requests]
        if late:
            yield late
        yield group + behind
        behind = [requests.pop(id(ids)) for ids in chosen if id(ids) in requests]
    if behind:
        yield behind


def expert_parts(groups):
    """(chosen experts' ids, rows of `parts`) for each choice of experts."""
    found = {}
    for args in (args for group in groups for op, args in group if op.__name__ in USERS):
        found.setdefault(id(args[2]), (args[2], []))[1].extend(_parts(args))
    return list(found.values())


def _parts(args):
    """The rows of `parts` for an op's weights."""
    for w in args[3:]:
        if isinstance(w, tuple) and w.data.ndim == 3:
            yield w.data.ctypes.data, w.data.strides[0], w.data.shape[1] * w.data.shape[2], len(w.data)
