"""Threads of parallel regions: how many there are, and how many a region uses."""
import contextlib
import os
import sys
import warnings

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.cores import MOST_THREADS, physical_cores
from pydsa.errors import PydsaError


if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
    # omp enters a parallel region in 1.3 us where workqueue takes 110 us, and two Python threads may enter it together.
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

if "OMP_WAIT_POLICY" not in os.environ:
    # GNU OpenMP's threads wait for each other in a loop of many milliseconds before they sleep. When the cores are shared with other
    # programs, that loop keeps the thread it waits for from running: generation was six times slower. This many rounds bridge the gap
    # between two tokens, and cost nothing on busy cores either.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

numba.get_num_threads()     # starts the threads, and so defines the symbol that n_threads() calls


_cut_off = False        # whether this process was forked after its parent had started GNU OpenMP's threads, which it does not have


def _after_fork():
    global _cut_off
    with contextlib.suppress(ValueError):       # no threads yet
        _cut_off = _cut_off or sys.platform == "linux" and numba.threading_layer() == "omp"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _refuse_after_fork():
    """Raise an error where numba would end the process with a signal."""
    if _cut_off:
        raise PydsaError("This process was forked from one that had loaded a model already, and lacks its threads (OpenMP): load the model "
                         "after the fork, or start the process anew (multiprocessing's \"spawn\").")


def default_threads():
    """One thread for each physical core; fewer if NUMBA_NUM_THREADS says so."""
    return min(physical_cores(), numba.config.NUMBA_NUM_THREADS)


def check_threads(n):
    """The number of threads to use: n, from 1 to MOST_THREADS, or the default for None.

    There may be more than cores. Raises PydsaError for other numbers, and in a process that was forked after its threads were started.
    """
    _refuse_after_fork()
    if n is None:
        return default_threads()
    if not 1 <= n <= MOST_THREADS:
        raise PydsaError(f"threads is {n}, expected an integer from 1 to {MOST_THREADS}.")
    return n


def set_threads(n):
    """Let the kernels that this Python thread calls use n threads."""
    _refuse_after_fork()
    numba.set_num_threads(n)


def warn_of_workqueue():
    """Once a parallel kernel is there, numba has chosen its threads."""
    try:
        layer = numba.threading_layer()
    except ValueError:      # not yet
        return
    if layer == "workqueue":
        warnings.warn("Numba found neither OpenMP nor TBB and uses its workqueue threads, whose every start costs 0.1 ms: "
                      "`pip install tbb`, or OpenMP's library of this system, makes generation faster.", stacklevel=4)


@intrinsic
def n_threads(typingctx):
    """The threads that a parallel region of this kernel will use. numba.get_num_threads would keep the kernel out of the cache."""
    def codegen(context, builder, signature, args):
        word = context.get_value_type(types.intp)       # as numba declares it for its own parallel regions; the function returns an int
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, []), "get_num_threads")
        return builder.sext(builder.trunc(builder.call(function, []), ir.IntType(32)), word)
    return types.intp(), codegen
