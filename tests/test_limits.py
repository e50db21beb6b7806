"""Limits of memory: of control groups, of ulimit, and what comes of them."""
import subprocess
import sys

import numpy as np
import psutil
import pytest
from helpers import write_files

from pydsa import OutOfMemoryError

from pydsa.backends import host
from pydsa.executor.plan import check_memory
from pydsa.machine import limits

GIB = 2**30


def group_limits(root):
    return sorted(limit.n_bytes / GIB for limit in limits._group_limits(root))


V2 = {"memory.max": 4 * GIB, "memory.current": 3 * GIB,
      "memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {GIB // 2}\nfile {9 * GIB}"}
V1 = {"memory.limit_in_bytes": 4 * GIB, "memory.usage_in_bytes": 3 * GIB,
      "memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file {GIB // 2}"}


def test_every_group_of_the_path_counts(tmp_path):
    """... the one in the middle has no limit, the topmost no files, and the cache of files is given back."""
    write_files(tmp_path, {"proc/self/cgroup": "0::/a/b/c"})
    write_files(tmp_path / "sys/fs/cgroup/a", V2)
    write_files(tmp_path / "sys/fs/cgroup/a/b", {"memory.max": "max", "memory.current": 1})
    write_files(tmp_path / "sys/fs/cgroup/a/b/c", {"memory.max": 2 * GIB, "memory.current": 3 * GIB})
    assert group_limits(tmp_path) == [0, 2.5]


def test_the_first_version(tmp_path):
    write_files(tmp_path, {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x/y\n1:name=systemd:/x\n0::/"})
    write_files(tmp_path / "sys/fs/cgroup/memory/x/y", {"memory.limit_in_bytes": 0x7FFFFFFFFFFFF000, "memory.usage_in_bytes": 1})
    write_files(tmp_path / "sys/fs/cgroup/memory/x", V1)
    assert group_limits(tmp_path) == [2.5]


def test_a_path_that_only_the_host_knows(tmp_path):
    """In a container the root of what is mounted is its own group."""
    write_files(tmp_path, {"proc/self/cgroup": "4:memory:/docker/0123"})
    write_files(tmp_path / "sys/fs/cgroup/memory", V1)
    assert group_limits(tmp_path) == [2.5]
    write_files(tmp_path, {"proc/self/cgroup": "0::/../other"})
    write_files(tmp_path / "sys/fs/cgroup", V2)
    assert group_limits(tmp_path) == [2.5]


def test_a_container_in_which_groups_are_nested(tmp_path):
    """What is below the container's own group is found too."""
    write_files(tmp_path, {
        "proc/self/cgroup": "0::/docker/0123/job",
        "proc/self/mountinfo": "41 31 0:38 /docker/0123 /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate"})
    write_files(tmp_path / "sys/fs/cgroup/job", V2)
    assert group_limits(tmp_path) == [2.5]


@pytest.mark.parametrize("files", [{}, {"proc/self/cgroup": "nonsense\n::\n0::"}, {"proc/self/cgroup": "0::/"},
                                   {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "much"}])
def test_no_limit(tmp_path, files):
    write_files(tmp_path, files)
    assert group_limits(tmp_path) == [] and limits.available(tmp_path).n_bytes <= psutil.virtual_memory().total


def test_the_least_limit_is_named(tmp_path, monkeypatch):
    write_files(tmp_path, {"proc/self/cgroup": "0::/"})
    write_files(tmp_path / "sys/fs/cgroup", V2 | {"memory.max": 2 * GIB})
    least = limits.available(tmp_path)
    assert least.n_bytes == GIB // 2
    monkeypatch.setattr(limits, "available", lambda: least)
    with pytest.raises(OutOfMemoryError, match=r"The model would take 1.0 GiB, but 512.0 MiB of memory are left by the limit of 2.0 GiB of "
                       r"the control group .*smaller context \(-c\)"):
        check_memory(GIB, "The model")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits of Linux")
@pytest.mark.parametrize("name, option", [("AS", "-v"), ("DATA", "-d")])
def test_ulimit(name, option):
    code = f"""
import resource
import numpy
from pydsa.errors import OutOfMemoryError
from pydsa.executor.plan import check_memory
from pydsa.machine import limits
resource.setrlimit(resource.RLIMIT_{name}, (4 << 30, 4 << 30))
least = limits.available()
assert 0 < least.n_bytes <= 4 << 30 and "{option}" in least.source, least
check_memory(1 << 20, "a little")
try:
    check_memory(5 << 30, "much")
except OutOfMemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"by the limit of 4.0 GiB (ulimit {option}); ask for a smaller context" in done.stdout


def test_what_the_system_refuses():
    """Where no limit is told, as with vm.overcommit_memory=2."""
    with pytest.raises(OutOfMemoryError, match="The system refuses the memory for intermediate values"):
        host.empty((2**60,), np.uint8)
