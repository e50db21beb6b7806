"""How much memory this process may still take: free memory, and limits below it.

psutil tells what the machine has free. Less may be allowed: by `ulimit -v` and `-d`, or by the control groups of a container, a service or
a batch job, whose processes are killed when they exceed it.
"""
import contextlib
from typing import NamedTuple

import psutil

from pydsa.errors import LESS, OutOfMemoryError
from pydsa.machine import control_groups
from pydsa.options import size

FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
         2: ("memory.max", "memory.current", ("inactive_file", "active_file"))}       # limit, use, and what of that gives way


class Memory(NamedTuple):
    """Bytes that may still be taken, and what sets the limit, in words."""
    n_bytes: int
    source: str


def available(root="/"):
    """The Memory that this process may still take: the least of all limits.

    root: where the files of Linux begin, for tests.
    """
    return min([Memory(psutil.virtual_memory().available, "memory are free"), *limits(root)])


@contextlib.contextmanager
def allocating(what):
    """A context in which a refusal of memory is an OutOfMemoryError."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(f"The system refuses the memory for {what}: less is allowed than is free (ulimit -v, or "
                               f"vm.overcommit_memory); {LESS}.") from error


def limits(root="/"):
    """What the limits of this process leave, a list of Memory."""
    return [*_resource_limits(), *_group_limits(root)]


def _resource_limits():
    """What is left of RLIMIT_AS and of RLIMIT_DATA."""
    try:
        import resource
    except ImportError:     # Windows
        return
    used = psutil.Process().memory_info()
    for name, option, taken in (("RLIMIT_AS", "-v", used.vms), ("RLIMIT_DATA", "-d", getattr(used, "data", None))):
        most = resource.getrlimit(getattr(resource, name))[0]
        if most != resource.RLIM_INFINITY and taken is not None:
            yield Memory(max(0, most - taken), f"memory are left by the limit of {size(most)} (ulimit {option})")


def _group_limits(root):
    """What control groups leave: of this process's group and of all above it."""
    for version, folder in control_groups.folders("memory", root):
        # What is mounted may begin at the container's own group, so that folders of groups above it are missing.
        with contextlib.suppress(OSError, ValueError):
            yield _left(folder, *FILES[version])


def _left(folder, most, used, cached):
    """The Memory that one group leaves; ValueError if it has no limit.

    The cache of files, the mapped weights among it, is counted as used, but gives way.
    """
    most = int((folder / most).read_text())
    if most >= 2**62:
        raise ValueError("this stands for no limit")
    given_back = 0
    with contextlib.suppress(OSError, ValueError):
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        given_back = sum(int(counts.get(name, 0)) for name in cached)
    free = max(0, most - max(0, int((folder / used).read_text()) - given_back))
    return Memory(free, f"memory are left by the limit of {size(most)} of the control group (container, service or batch job)")
