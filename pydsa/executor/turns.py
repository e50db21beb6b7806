"""One step at a time, in all of the process.

Kernels share the machine's threads, and the sessions of a model share its buffer.
"""
import contextlib
import os
import threading

from pydsa.errors import PydsaError

_lock, _running_thread = threading.Lock(), None


def _after_fork():
    """A child has none of the threads that may have held the lock."""
    global _lock, _running_thread
    _lock, _running_thread = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def one_step():
    """A context in which a step runs; steps of other threads wait.

    This holds for all models. Raises PydsaError inside of a step of the same thread.
    """
    global _running_thread
    if _running_thread == threading.get_ident():
        raise PydsaError("A model cannot be run from inside a function that a step calls (observe, progress, select, a hook).")
    with _lock:
        _running_thread = threading.get_ident()
        try:
            yield
        finally:
            _running_thread = None
