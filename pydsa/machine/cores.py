"""How many cores this process may use, of those that the machine has.

Fewer may be allowed: by an affinity mask (taskset, a batch job, the cpuset of a container) or by a control group's quota of CPU time.
Hardware threads of one core share its units of arithmetic, which pydsa's kernels keep busy, so they count as one.
"""
import contextlib
import os
from pathlib import Path

import psutil

from pydsa.machine import control_groups

MOST_THREADS = 512      # that may be asked for, whatever the number of cores


def physical_cores(root="/", allowed=None):
    """The number of physical cores that this process may use, at least 1.

    A quota counts as that many cores, rounded up. root: where the files of Linux begin, and allowed: the numbers of the CPUs that the
    process may use, None for its affinity mask; both for tests. What cannot be read limits nothing; there is no exception.
    """
    root = Path(root)
    allowed = affinity() if allowed is None else allowed
    return max(1, min([_cores(root, allowed) if allowed else _of_machine() or 1, *_quotas(root)]))


def affinity():
    """The CPUs of the calling thread's affinity mask.

    None where the system has no masks.
    """
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):       # macOS, Windows
        return None


def _of_machine():
    """The cores of the machine, or None if nobody knows.

    They are the physical ones, if these are known, and never more than its CPUs.
    """
    physical = None
    with contextlib.suppress(OSError, ValueError, RuntimeError, psutil.Error):
        physical = psutil.cpu_count(logical=False)
    return min((n for n in (physical, os.cpu_count()) if n), default=None)


def cores_of(cpus, root="/"):
    """The cores to which CPUs belong, a list of sets of those CPUs.

    They are in the order of their first CPUs. One whose core is not known is a core by itself. root: where the files of Linux begin.
    """
    return [siblings or {cpu} for cpu, siblings in _groups(Path(root), cpus)]


def _groups(root, cpus):
    """Yield (cpu, siblings) for the first CPU of each core.

    If its core is unknown, siblings is an empty set.
    """
    seen = set()
    for cpu in sorted(cpus):
        if cpu not in seen:
            siblings = _siblings(root, cpu, cpus)
            seen |= siblings
            yield cpu, siblings


def _cores(root, allowed):
    """The number of cores to which the allowed CPUs belong.

    A CPU whose core is not known counts as one, up to the number of cores that the machine has.
    """
    groups = [siblings for _, siblings in _groups(root, allowed)]
    return len(groups) if all(groups) else min(len(groups), _of_machine() or len(groups))


def _siblings(root, cpu, allowed):
    """The allowed CPUs on the core of one of them, with it.

    If that is unknown: an empty set.
    """
    folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):         # the second is its older name
        siblings = in_list(control_groups.lines(folder / name), allowed)
        if cpu in siblings:
            return siblings
    return set()


def in_list(lines, numbers):
    """Those of some numbers that are in a list of Linux, "0-3,8".

    lines: its text. If it is malformed: an empty set.
    """
    with contextlib.suppress(ValueError):
        spans = [_span(part) for text in lines for part in text.split(",")]
        return {n for n in numbers if any(first <= n <= last for first, last in spans)}
    return set()


def _span(text):
    """A part of a list of CPUs, "3" or "0-3", as (first, last)."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _quotas(root, controller="cpu"):
    """The quotas of CPU time, as numbers of CPUs, rounded up."""
    for version, folder in control_groups.folders(controller, root):
        with contextlib.suppress(ValueError, IndexError):       # "max" is no number
            if version == 2:
                quota, period = (int(text) for text in control_groups.lines(folder / "cpu.max")[0].split())
            else:
                quota, period = (int(control_groups.lines(folder / f"cpu.cfs_{name}_us")[0]) for name in ("quota", "period"))
            if quota > 0 and period > 0:        # -1: no quota
                yield -(-quota // period)


USUAL_CACHES = {1: 32 << 10, 2: 1 << 20}       # bytes by level, where the system does not say so


def cache_of_core(level, root="/"):
    """Bytes that a core has for itself of the data cache of a level, 1 or 2.

    Of a cache that cores share each has its part; hardware threads count as one. root: where the files of Linux begin, for tests.
    """
    folder = Path(root) / "sys/devices/system/cpu/cpu0"
    for index in sorted(folder.glob("cache/index*")):
        with contextlib.suppress(ValueError, IndexError, KeyError):
            found, kind, size, sharing = (control_groups.lines(index / name)[0].strip()
                                          for name in ("level", "type", "size", "shared_cpu_list"))
            if found == str(level) and kind != "Instruction":
                n_bytes = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
                cpus = {cpu for part in sharing.split(",") for first, last in [_span(part)] for cpu in range(first, last + 1)}
                return n_bytes // max(1, _cores(Path(root), cpus))
    return USUAL_CACHES[level]
