"""The PTX machine's model of what goes on while a kernel runs: each wait, fence and barrier that is left out is found.

Copies arrive as late as allowed in one run, as early as allowed in another. The kernels are those of asynchronous_kernels.py, which runs in
a process of its own.
"""
import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

UNDER_WAY, NOT_ORDERED = "which a copy under way will write", "reads .* that another thread has written, with no barrier between"
ACCESSED, PRODUCT = "will write .* that another thread has accessed", "writes shared .* which a product under way reads"
# change -> what is said if copies are late, and if they are early (where that differs); None: nothing, and results are right
EXPECTED = {
    "groups": [None],
    "groups: no wait": [UNDER_WAY],
    "groups: wait for one less": [UNDER_WAY],
    "groups: no commit": [UNDER_WAY],
    "groups: no barrier after the wait": [NOT_ORDERED],
    "groups: no barrier after the reads": [ACCESSED],
    "ring": [None],
    "ring: no fence of mbarriers": ["no fence.mbarrier_init"],
    "ring: no barrier after init": ["which another thread has initialized, with no barrier"],
    "ring: no wait for what is read": [UNDER_WAY, NOT_ORDERED],
    "ring: no wait for those who read": [ACCESSED],
    "ring: wait asks once": [UNDER_WAY, None],          # the copy has come when it asks
    "ring: wrong parity": [UNDER_WAY, "waits for ever"],
    "ring: bytes are not expected": [UNDER_WAY, NOT_ORDERED],
    "ring: fewer bytes are expected": ["waits for ever"],
    "ring: readers do not tell": ["of which some are elsewhere"],       # they wait for ever for lane 0, and that for them
    "ring: lanes are not waited for": [ACCESSED],
    "product": [None],
    "product: no fence of shared memory": ["with no fence.proxy.async since"],
    "product: no barrier after the fence": [NOT_ORDERED],
    "product: no fence of registers": ["no wgmma.fence"],
    "product: no commit": [PRODUCT],
    "product: no wait": [PRODUCT],
    "product: one is under way": [PRODUCT],
    "product: registers are read before the wait": ["reads %.*, which a product under way has"],
    "dependent": [None],
    "dependent: no wait": [NOT_ORDERED],
    "dependent: does not wait at all": ["ends with no griddepcontrol.wait"],
    "dependent: writes before the wait": ["writes global memory .* that another thread has accessed"],
    "dependent: as a constant": ["as a constant, but it was written since"],
    "chain": [None],
    "chain: the middle is hasty": ["as a constant, but it was written since"],
    "recorded": [None],
    "recorded: no wait": [NOT_ORDERED],
    "recorded: no wait, an event between": [None],      # which makes it a plain launch
}


@functools.cache
def found():
    done = subprocess.run([sys.executable, "-m", "tests.asynchronous_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_left_out_is_found(name):
    for said, expected in zip(found()[name], EXPECTED[name] * 2):
        assert said is True if expected is None else isinstance(said, str) and re.search(expected, said), said


def test_all_changes_are_expected():
    assert list(found()) == list(EXPECTED)
