"""A one-token step's launches, and which activations are rounded.

fuse.py appends them.
"""
import functools

from pydsa.backends.cuda.int8x2.linear import Int8x2, pack_into, scratch_for_rows
from pydsa.backends.cuda.one_token.order import overlap


class Launches:
    """The launches so far, and which activations have a valid Int8x2."""

    def __init__(self):
        self._calls, self._packed = [], {}      # address, shape, strides of rows -> their Int8x2, their span

    def taken(self):
        """The launches since this was asked last."""
        calls, self._calls = self._calls, []
        return calls

    def add(self, function, *args, written, packs=None, packs_too=None):
        """Append a launch.

        It invalidates the Int8x2 of every array that it writes. packs: rows whose Int8x2 it makes; that becomes its last argument.
        packs_too: more rows, as wide, whose Int8x2 comes behind in the same one.
        """
        for low, high in (array.span for array in written):
            self._packed = {key: (made, span) for key, (made, span) in self._packed.items() if span[1] <= low or high <= span[0]}
        if packs is not None:
            several, key = [packs] if packs_too is None else [packs, packs_too], _key(packs)
            made, begin = scratch_for_rows(sum(map(len, several)), packs.shape[1], key), 0
            for x in several:
                self._packed[_key(x)] = Int8x2(*(part[begin:begin + len(x)] for part in made)), x.span
                begin += len(x)
            args += made,
        self._calls.append(functools.partial(function, *args))

    def packed(self, x):
        """The Int8x2 of rows. Appends a launch that makes it if there is none."""
        if _key(x) not in self._packed:
            self.add(pack_into, x, written=(), packs=x)
        return self._packed[_key(x)][0]

    def packed_with(self, x, other):
        """The Int8x2 of rows and of others behind them; None if it is not one."""
        if _key(x) not in self._packed or _key(other) not in self._packed:
            return None
        parts = list(zip(self._packed[_key(x)][0], self._packed[_key(other)][0]))
        adjacent = all(a.shape[1] == b.shape[1] and a.span[1] == b.span[0] for a, b in parts)
        return Int8x2(*(a.followed_by(b) for a, b in parts)) if adjacent else None


def _key(x):
    return x.span[0], x.shape, x.strides


def touch(some, others):
    """Whether an array of some overlaps one of the others."""
    return any(overlap(a, b) for a in some for b in others)


def one_row(a):
    """Whether an array has one token and can be packed to Int8x2."""
    return a.shape[0] == 1 and a.shape[-1] % 32 == 0
