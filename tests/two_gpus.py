"""Code that runs with two emulated GPUs, in a process of its own.

The emulated driver replaces that of the GPUs (tests/ptx); with SIMULATED as environment it is Numba's simulator.
"""
from pathlib import Path

import forked

ROOT = Path(__file__).parent.parent
SETUP = """
import gc
import itertools
import sys
import numpy as np
from pydsa.backends import gpus
simulated = gpus.SIMULATED
if not simulated:
    from cuda.bindings.driver import CUresult
    from tests.ptx.driver import install
    driver = install(1 << 22, 2)
from pydsa.backends import cuda, host, transfers
from pydsa.errors import OutOfMemoryError, PydsaError

def empty_arena(i):
    return not driver.arenas[i].allowed.any()
"""


def run(code, *args, **env):
    return forked.run(SETUP + forked.REFUSED + code, *args, **env)[0]


SIMULATED = {"NUMBA_ENABLE_CUDASIM": "1", "PYDSA_SIMULATED_GPUS": "2"}
