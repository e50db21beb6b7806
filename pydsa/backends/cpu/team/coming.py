"""Prefetch what following ops read, while a core waits or only computes.

Memory limits a generated token: what is read while nothing else is costs nothing. A thread that waits for others fetches its share of the
next weights; a task that has its operands in caches fetches some as it goes on. Regions are what comes next: at an address REGIONS pairs of
an address and a number of bytes. They may belong to a step that has ended: a prefetch of memory that is gone does nothing.
"""
from pydsa.backends.cpu.jit import SECOND_LEVEL_CACHE, inner
from pydsa.backends.cpu.vectors.simd import i64_at, prefetch

REGIONS = 3
REGIONS_BYTES = 16 * REGIONS
MOST = SECOND_LEVEL_CACHE // 2      # bytes that a thread fetches: the rest of its cache is for what it works on
PIECE = 512                         # bytes between two looks of a thread that waits


@inner
def regions_size(regions):
    """Count the bytes of regions."""
    n = 0
    for k in range(REGIONS):
        n += i64_at(regions, 16 * k + 8)
    return n


@inner
def fetch(regions, first, n):
    """Prefetch n bytes of regions, from `first` on, as if they were one array."""
    for k in range(REGIONS):
        start, size = i64_at(regions, 16 * k), i64_at(regions, 16 * k + 8)
        here = min(n, size - first)
        for line in range(0, here, 64):
            prefetch(start + first, line)
        n, first = n - max(0, here), max(0, first - size)


@inner
def fetch_share(regions, thread, n_threads, done):
    """Prefetch the next PIECE of a thread's share, if there is one.

    Returns whether there was. done: the bytes of it before. A task of a matrix is read in two places at once (blocks/dots.py). Who begins
    an interval takes its first task, and does not wait before: so no one takes the first share.
    """
    share = thread if thread else n_threads - 1
    for k in range(REGIONS):
        half = i64_at(regions, 16 * k + 8) // (2 * n_threads) // (PIECE // 2) * (PIECE // 2)
        if done < 2 * half:
            start = i64_at(regions, 16 * k) + 2 * share * half + done // 2
            for line in range(0, PIECE // 2, 64):
                prefetch(start, line)
                prefetch(start + half, line)
            return True
        done -= 2 * half
    return False
