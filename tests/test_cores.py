"""How many threads there are: cores, quotas of CPU time, -t and -tb.

The trees of files are those that Linux shows on machines, and in containers, of several kinds.
"""
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from helpers import write_files

import pydsa
from pydsa import PydsaError, bench, words
from pydsa.backends.cpu.team import threads
from pydsa.cli import main
from pydsa.machine import control_groups
from pydsa.machine.cores import MOST_THREADS, cache_of_core, physical_cores

V1_LIST, V2_LIST = "thread_siblings_list", "core_cpus_list"


def topology(root, siblings, name=V2_LIST):
    """Write the siblings of each CPU, {cpu: list as text}."""
    write_files(root / "sys/devices/system/cpu", {f"cpu{cpu}/topology/{name}": text for cpu, text in siblings.items()})


def no_smt(root):
    topology(root, {cpu: str(cpu) for cpu in range(8)})


def quotas(root, version, **groups):
    """Write the quotas of groups, whose names have __ for slashes."""
    for name, (quota, period) in groups.items():
        files = {"cpu.max": f"{quota} {period}"} if version == 2 else {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period}
        write_files(root / "sys/fs/cgroup" / name.strip("_").replace("__", "/"), files)


# Caches

@pytest.mark.parametrize("size, sharing, n_bytes", [
    ("1024K", "0", 1 << 20), ("2M", "0,4", 2 << 20), ("2048K", "0-3,4-7", 2 << 18), ("4096K", "0-7", 1 << 20), ("some", "0", 1 << 20),
    ("512K", "", 1 << 20), ("512K", "0", 1 << 19)])
def test_second_level_cache(tmp_path, size, sharing, n_bytes):
    """Its part of a core: siblings, here of CPU n and n + 4, share a core."""
    topology(tmp_path, {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    kinds = {0: ("1", "Data", "48K", "0,4"), 1: ("2", "Instruction", "3M", "0"), 2: ("2", "Unified", size, sharing)}
    files = {f"index{i}/{name}": text + "\n" for i, texts in kinds.items()
             for name, text in zip(("level", "type", "size", "shared_cpu_list"), texts)}
    write_files(tmp_path / "sys/devices/system/cpu/cpu0/cache", files)
    assert cache_of_core(2, tmp_path) == n_bytes
    assert cache_of_core(1, tmp_path) == 48 << 10


def test_unknown_caches_have_the_usual_sizes(tmp_path):
    assert [cache_of_core(level, tmp_path) for level in (1, 2)] == [32 << 10, 1 << 20]


# Cores

@pytest.mark.parametrize("name", [V1_LIST, V2_LIST])
@pytest.mark.parametrize("allowed, n", [(range(8), 4), (range(4), 4), ([0, 4], 1), ([1, 2, 5], 2), ([6], 1)])
def test_siblings_count_once(tmp_path, name, allowed, n):
    topology(tmp_path, {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}, name)
    assert physical_cores(tmp_path, set(allowed)) == n


@pytest.mark.parametrize("siblings, n", [({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, 2), ({cpu: "0-3" for cpu in range(4)}, 1),
                                         ({0: "0-1,3", 1: "0-1,3", 2: "2", 3: "0-1,3"}, 2)])
def test_lists_of_cpus(tmp_path, siblings, n):
    """SMT of four threads too, and what a big machine would not hold in a set."""
    topology(tmp_path, siblings)
    assert physical_cores(tmp_path, {0, 1, 2, 3}) == n
    topology(tmp_path, {0: "0-99999999999999"})
    assert physical_cores(tmp_path, {0, 1, 2, 3}) == 1


def test_offline_cpus(tmp_path):
    """They have no topology, and are in no mask."""
    topology(tmp_path, {0: "0", 2: "2,6", 6: "2,6"})
    write_files(tmp_path / "sys/devices/system/cpu", {"cpu4/online": 0})
    assert physical_cores(tmp_path, {0, 2, 6}) == 2


@pytest.mark.parametrize("text", ["", "many", "1", "0-x", "-", "0,", "\ufffd"])
def test_lists_that_say_nothing_fall_back_to_the_older_name(tmp_path, text):
    topology(tmp_path, {0: text, 1: text})
    topology(tmp_path, {0: "0-1", 1: "0-1"}, V1_LIST)
    assert physical_cores(tmp_path, {0, 1}) == 1


def test_without_a_topology_the_cores_of_the_machine_are_the_most(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    assert [physical_cores(tmp_path, set(range(n))) for n in (16, 8, 3)] == [8, 8, 3]
    topology(tmp_path, {0: "0-1", 1: "0-1"})
    assert physical_cores(tmp_path, {0, 1, 2}) == 2     # the third may be any core's
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    assert physical_cores(tmp_path, set(range(20))) == 16


def fails(error):
    def function(*args, **kwargs):
        raise error
    return function


@pytest.mark.parametrize("physical, logical, n", [(4, 8, 4), (None, 8, 8), (16, 8, 8), (4, None, 4), (None, None, 1), (0, 2, 2)])
def test_systems_without_affinity_masks(tmp_path, monkeypatch, physical, logical, n):
    """... such as macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: logical)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: physical)
    assert physical_cores(tmp_path) == n


@pytest.mark.parametrize("error", [FileNotFoundError("/proc/cpuinfo"), NotImplementedError("platform"), psutil.AccessDenied(1)])
def test_what_psutil_cannot_tell(tmp_path, monkeypatch, error):
    monkeypatch.setattr(os, "sched_getaffinity", fails(OSError(22, "Invalid argument")), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(psutil, "cpu_count", fails(error))
    assert physical_cores(tmp_path) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there are no affinity masks")
def test_this_machine():
    allowed = len(os.sched_getaffinity(0))
    assert 1 <= physical_cores() <= allowed
    code = ("import os; from pydsa.machine.cores import physical_cores; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]); "
            "print(physical_cores())")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


# Quotas

@pytest.mark.parametrize("quota, n", [((150000, 100000), 2), ((50000, 100000), 1), ((100000, 100000), 1), ((900000, 100000), 8),
                                      (("max", 100000), 8), ((1000, 1000000), 1), ((0, 100000), 8), ((100000, 0), 8), ((-1, 100000), 8)])
@pytest.mark.parametrize("version, line, group", [(2, "0::/", ""), (1, "4:cpu,cpuacct:/", "cpu"), (1, "3:cpuacct,cpu:/", "cpuacct,cpu")])
def test_a_quota_is_rounded_up(tmp_path, quota, n, version, line, group):
    no_smt(tmp_path)
    write_files(tmp_path, {"proc/self/cgroup": line})
    quotas(tmp_path, version, **{group: quota})
    assert physical_cores(tmp_path, set(range(8))) == n


def test_a_quota_and_siblings(tmp_path):
    """The least counts."""
    topology(tmp_path, {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    write_files(tmp_path, {"proc/self/cgroup": "0::/"})
    quotas(tmp_path, 2, **{"": (600000, 100000)})
    assert physical_cores(tmp_path, set(range(8))) == 4
    assert physical_cores(tmp_path, {0, 4}) == 1


def test_every_group_above_counts(tmp_path):
    """... the group of the process, one in the middle without a file, and the topmost."""
    no_smt(tmp_path)
    write_files(tmp_path, {"proc/self/cgroup": "0::/a/b/c"})
    quotas(tmp_path, 2, a=(300000, 100000), a__b__c=("max", 100000))
    assert physical_cores(tmp_path, set(range(8))) == 3
    quotas(tmp_path, 2, a__b__c=(150000, 100000), a__other=(1, 100000))
    assert physical_cores(tmp_path, set(range(8))) == 2


def test_both_versions_at_once(tmp_path):
    """Each controller is in one of them: the other has none of its files."""
    no_smt(tmp_path)
    write_files(tmp_path, {"proc/self/cgroup": "9:name=systemd:/x\n5:cpu,cpuacct:/x/y\n4:memory:/x\n0::/x"})
    (tmp_path / "sys/fs/cgroup/unified/x").mkdir(parents=True)
    quotas(tmp_path, 1, cpu__x=(250000, 100000), cpu__x__y=(-1, 100000), memory__x=(1, 100000))
    assert physical_cores(tmp_path, set(range(8))) == 3


MOUNTS = """\
22 1 254:0 / / rw - ext4 /dev/root rw
32 31 0:29 /kube/pod\\0401/box /groups\\040of/cpu rw,relatime shared:5 master:1 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 /kube/pod\\0401/box /groups\\040of/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:29 /other /groups\\040of/others rw - cgroup cgroup rw,cpu,cpuacct
nonsense - cgroup
- cgroup2
"""


@pytest.mark.parametrize("path, folders", [
    ("/kube/pod 1/box/job/step", ["cpu/job/step", "cpu/job", "cpu"]),       # what a container does not see above it is left out
    ("/kube/pod 1/box", ["cpu"]), ("/other/job", ["others/job", "others"]),
    ("/elsewhere", ["cpu", "others"]), ("/kube/pod 1/box/../..", ["cpu", "others"])])       # only what is mounted is known
def test_where_groups_are_mounted(tmp_path, path, folders):
    write_files(tmp_path, {"proc/self/cgroup": f"3:cpu,cpuacct:{path}", "proc/self/mountinfo": MOUNTS})
    assert list(control_groups.folders("cpu", tmp_path)) == [(1, tmp_path / "groups of" / folder) for folder in folders]


@pytest.mark.parametrize("lines", ["", "nonsense", "0:", "0::", "::\n:", "1:cpu", "0::/a\nx"])
@pytest.mark.parametrize("quota", ["", "much", "1.5 2", "100000", "\0", "1 2 3", "9" * 5000 + " 1"])
def test_what_is_malformed_sets_no_limit(tmp_path, lines, quota):
    no_smt(tmp_path)
    write_files(tmp_path, {"proc/self/cgroup": lines, "proc/self/mountinfo": lines, "sys/fs/cgroup/cpu.max": quota,
                           "sys/fs/cgroup/a/cpu.max": quota, "sys/fs/cgroup/cpu/cpu.cfs_quota_us": quota})
    assert physical_cores(tmp_path, set(range(8))) == 8


def test_files_that_are_not_text(tmp_path):
    no_smt(tmp_path)
    for name in "sys/devices/system/cpu/cpu1/topology/core_cpus_list", "proc/self/cgroup", "proc/self/mountinfo":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"0::/\xff\xfe\n\x00")
    assert physical_cores(tmp_path, {0, 1}) in (1, 2)       # the machine's number, at most


# Threads

def test_the_default_number_of_threads(monkeypatch):
    monkeypatch.setattr(threads, "physical_cores", lambda allowed: 6)
    monkeypatch.setattr(threads.numba.config, "NUMBA_NUM_THREADS", 16)
    assert threads.check_threads(None) == threads.default_threads() == 6
    monkeypatch.setattr(threads.numba.config, "NUMBA_NUM_THREADS", 2)       # as the environment's
    assert threads.check_threads(None) == 2
    assert [threads.check_threads(n) for n in (1, 7, MOST_THREADS)] == [1, 7, MOST_THREADS]     # also more than cores
    for n in 0, -1, MOST_THREADS + 1:
        with pytest.raises(PydsaError, match=f"threads is {n}, expected an integer from 1 to 512"):
            threads.check_threads(n)


@pytest.mark.parametrize("backend", ["cpu.jit", "cuda.runtime.launch"])
def test_processes_that_compile_are_as_many_as_cores(monkeypatch, backend):
    if backend == "cuda.runtime.launch" and importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed")
    module = importlib.import_module(f"pydsa.backends.{backend}")
    asked = []
    monkeypatch.setattr(module, "compile_jobs", lambda jobs, folder, n, report, check: asked.append(n))
    monkeypatch.setattr(module, "physical_cores", lambda: 3)
    for most in 16, 2:
        monkeypatch.setattr(module.numba.config, "NUMBA_NUM_THREADS", most)
        module.compile_all([])
    assert asked == [3, 2]


@pytest.fixture
def asked(monkeypatch):
    """The numbers of threads that steps ask for; none is set."""
    numbers = []
    monkeypatch.setattr(pydsa.backends.cpu, "set_threads", numbers.append)
    return numbers


def test_steps_of_one_token_and_of_several(small_model, asked):
    model = pydsa.load(small_model(), n_ctx=64, kv_type="f32", n_ubatch=4, threads=3, threads_batch=7)
    assert (model.threads, model.threads_batch) == (3, 7)
    session = model.session()
    for step, expected in [(lambda: session.prefill(np.arange(9)), [7, 7, 3]), (lambda: session.decode(1), [3]),
                           (lambda: session.prefill([1]), [3]), (lambda: session.logits([1, 2, 3]), [7]),
                           (lambda: session.timed([1, 2]), [7]), (lambda: list(session.generate([4, 5], 3, None)), [7, 3, 3])]:
        asked.clear()
        step()
        assert asked == expected


@pytest.mark.parametrize("given, used", [((5, None), (5, 5)), ((None, 5), (1, 5)), ((None, None), (1, 1))])
def test_prompts_have_as_many_threads_as_generation(small_model, asked, monkeypatch, given, used):
    """... unless another number is given."""
    monkeypatch.setattr(threads, "physical_cores", lambda allowed: 1)
    model = pydsa.load(small_model(), n_ctx=64, kv_type="f32", threads=given[0], threads_batch=given[1])
    assert (model.threads, model.threads_batch) == used


def test_other_devices_choose_for_themselves(small_model):
    model = pydsa.load(small_model(), n_ctx=64, device="reference", threads=2, threads_batch=3)
    assert (model.threads, model.threads_batch) == (None, None)


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["threads", "threads_batch"])
@pytest.mark.parametrize("n", [0, -1, 513, 2**40, 1.5, "2", True])
def test_numbers_that_are_refused(small_model, device, name, n):
    with pytest.raises(PydsaError, match=f"^{name} is {n!r}, expected an integer from 1 to 512.$"):
        pydsa.load(small_model(), device=device, **{name: n})


# The command line

def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.mark.parametrize("args, message", [
    (["-t", "0"], "threads is 0, expected an integer from 1 to 512"), (["-t", "-1"], "threads is -1"),
    (["-tb", "0"], "threads_batch is 0"), (["--threads-batch=-4"], "threads_batch is -4"), (["-tb", "513"], "threads_batch is 513"),
    (["-tb", "x"], "'x' is not a valid integer"), (["-t", str(10**30)], "threads is 1000000000000000000000000000000, expected")])
@pytest.mark.parametrize("command", [["run", "-p", "x"], ["bench"], ["trace", "-p", "x"]])
def test_mistaken_numbers_end_with_a_sentence(small_model, command, args, message):
    result = run(*command, *args, "-m", small_model())
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr and result.stdout == ""


def test_the_commands_hand_both_numbers_on(small_model, asked):
    common = ("-m", small_model(), "-t", 3, "-tb", 7, "--kv-type", "f32")
    assert run("trace", "-p", "ab", "-c", 64, *common).exit_code == 0 and asked == [7]
    asked.clear()
    assert run("run", "--raw", "-p", "ab", "-n", 2, "-c", 64, *common).exit_code == 0 and asked == [7, 3]


def test_bench_measures_the_limit_with_the_threads_of_the_step(small_model, asked, monkeypatch):
    measured = []
    monkeypatch.setattr(bench, "_ceilings", lambda backend, n: measured.append(n))
    common = ("-m", small_model(), "-t", 3, "-tb", 7, "--kv-type", "f32", "-p", "8,1", "-n", 2, "-r", 1)
    rows = json.loads(run("bench", "-o", "json", *common).stdout)
    assert {(row["n_threads"], row["n_threads_batch"]) for row in rows} == {(3, 7)} and measured == [3]
    assert asked == [7] * 2 + [3] * 2 + [3] * 4         # each test twice: pp8, pp1, tg2
    measured.clear()
    run("bench", "--ops", *common)
    assert measured == [7, 3, 3]


def test_the_table_has_both_only_where_they_differ(small_model, asked):
    common = ("bench", "-m", small_model(), "--kv-type", "f32", "-p", 2, "-n", 0, "-r", 1)
    head, _, row = run(*common, "-t", 3, "-tb", 7).stdout.splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (head, row))))
    assert (cells["threads"], cells["threads batch"]) == ("3", "7")
    for args in ["-t", 3], ["-t", 3, "-tb", 3], ["--device", "reference"]:
        assert "threads |" in (table := run(*common, *args).stdout) and "threads batch" not in table and "None" not in table
    assert [words.threads(*n) for n in ((1, 1), (2, 2), (1, 8))] == ["1 thread", "2 threads", "1 thread (8 for prompts)"]


def test_prompts_on_two_threads_and_generation_on_one(small_model):
    """... which another number of threads does not change."""
    def logits(**counts):
        session = pydsa.load(small_model(), n_ctx=64, kv_type="f32", **counts).session()
        return np.array([session.prefill(np.arange(20)), session.decode(5)])
    one, other = logits(threads=1), logits(threads=1, threads_batch=2)
    assert np.array_equal(one, other)
