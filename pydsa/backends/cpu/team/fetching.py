"""Ask the system for the weights of the chosen experts, all at once.

A page that is touched before it is in memory is read together with its neighbours, while a thread waits: reads of the drive come one after
the other, and about half of what they bring belongs to experts that were not chosen. madvise(MADV_WILLNEED) asks for the ranges that are
needed and no others, and the drive works on all of them at a time.

A step asks only if the process has read from a drive since the last step began. For a file in memory that costs a look at a word. If then
the weights that every token needs are not in memory either, as after a start, those up to the next choice of experts are asked for as well.
"""
import ctypes
import mmap

import numpy as np
from numba import types

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.team.op import Stage, op

try:
    import resource
except ImportError:     # Windows, where nothing is asked for
    resource = None

CAN_ASK = resource is not None and hasattr(mmap, "MADV_WILLNEED")
USERS = "moe_gate_up", "moe_linear", "moe_down"     # ops with experts' weights, and their ids as the third argument
ENOUGH = 2          # choices for each expert that there is, from which on nearly all are used
MOST = 4 << 30      # bytes that a layer asks for, about: what comes first must not have left memory when it is used
PIECE = 16 << 20    # bytes of weights that are asked for, or read, in one call
PAGE, WILLNEED = mmap.PAGESIZE, getattr(mmap, "MADV_WILLNEED", 0)

_allowed = CAN_ASK                  # whether steps ask at all
_wanted = np.zeros(2, np.int64)     # whether the present step asks for experts, and for the other weights
_blocks_read = 0                    # by this process, when the last step began


def allow(asks):
    """Let steps ask, or not, to compare the two."""
    global _allowed
    _allowed = asks and CAN_ASK


def begin_step(sample=()):
    """Decide whether the step that begins asks for weights -> the answer.

    sample: addresses of pages of weights that every token needs.
    """
    global _blocks_read
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock if _allowed else _blocks_read
    _wanted[0], _blocks_read = blocks != _blocks_read, blocks
    _wanted[1] = _wanted[0] and 4 * _missing(sample) > len(sample)
    return bool(_wanted[0])


def _missing(addresses):
    """How many of some pages are not in memory.

    None where the system does not tell: of a file of somebody else, for example.
    """
    library, there = ctypes.CDLL(None), ctypes.c_ubyte(1)
    if not hasattr(library, "mincore"):
        return 0
    return sum(not library.mincore(ctypes.c_void_p(at), ctypes.c_size_t(1), ctypes.byref(there)) and not there.value & 1
               for at in addresses)


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


@inner
def begin_asking_for_weights(wanted, pieces, task):
    """A task for each piece, or none."""
    return len(pieces) if wanted[1] else 0


@inner
def ask_for_piece(wanted, pieces, task):
    """Ask for a piece of a matrix."""
    at = pieces[task.index, 0]
    first = at // PAGE * PAGE
    _madvise(first, at + pieces[task.index, 1] - first, np.int32(WILLNEED))


@op(Stage(begin_asking_for_weights, ask_for_piece))
def ask_for_weights(wanted, pieces):
    """Ask for pieces of weights, int64 [n, 2], if wanted[1] is 1.

    pieces: their addresses and bytes.
    """
    return 0


ASKING = ask_for_experts, ask_for_weights


def with_requests(groups):
    """Put calls that ask for weights behind those that choose experts.

    groups: lists of pairs (op, args) that run one after the other. They ask for the chosen experts, and for what is needed up to the next
    choice; the first group also asks for what is needed up to the first one. Experts that were chosen elsewhere are asked for in a group of
    its own, before the first that uses them. Where the system cannot be asked, the groups stay as they are.
    """
    if not CAN_ASK:
        yield from groups
        return
    requests = {id(ids): (ask_for_experts, (ids, _wanted, np.array(sorted(parts), np.int64)))
                for ids, parts in expert_parts(groups) if parts}
    stretches = _stretches(groups)
    beside = _requests_of(stretches.pop(0))
    for group in groups:
        used = [args[2] for op, args in group if op.__name__ in USERS]
        late = [requests.pop(id(ids)) for ids in used if id(ids) in requests]
        if late:
            yield late
        yield group + beside
        beside = []
        for ids in (args[0] for op, args in group if op.__name__ == "moe_route"):
            beside += [requests.pop(id(ids))] if id(ids) in requests else []
            beside += _requests_of(stretches.pop(0))
    if beside:
        yield beside


def _requests_of(pieces):
    return [(ask_for_weights, (_wanted, np.array(pieces, np.int64)))] if pieces else []


def _stretches(groups):
    """The pieces of weights that all tokens need, up to each choice."""
    found = [[]]
    for group in groups:
        names = [call[0].__name__ for call in group]
        for name, (_, args) in zip(names, group):
            if name not in (*USERS, "get_rows"):
                found[-1] += pieces_of(args)
        found += [[] for name in names if name == "moe_route"]
    return found


def sample_of(groups, n=16):
    """Addresses of n pages of the weights that all tokens need, or fewer.

    groups: as with_requests() makes them.
    """
    pieces = [piece for group in groups for op, args in group if op is ask_for_weights for piece in args[1].tolist()]
    return [pieces[i * len(pieces) // n][0] // PAGE * PAGE for i in range(min(n, len(pieces)))]


def pieces_of(args):
    """(address, bytes) of the weights of an op, a piece at a time."""
    for w in args:
        if isinstance(w, tuple) and hasattr(w, "block") and w.data.ndim > 1:
            # where experts do not lie side by side, of each
            for block in [w.data] if w.data.flags.c_contiguous else w.data:
                yield from ((block.ctypes.data + at, min(PIECE, block.nbytes - at)) for at in range(0, block.nbytes, PIECE))


def expert_parts(groups):
    """(chosen experts' ids, rows of `parts`) for each choice of experts."""
    found = {}
    for args in (args for group in groups for op, args in group if op.__name__ in USERS):
        found.setdefault(id(args[2]), (args[2], []))[1].extend(parts_of(args))
    return list(found.values())


def parts_of(args):
    """The rows of `parts` for an op's weights."""
    for w in args[3:]:
        if isinstance(w, tuple) and w.data.ndim == 3:
            yield w.data.ctypes.data, w.data.strides[0], w.data.shape[1] * w.data.shape[2], len(w.data)
