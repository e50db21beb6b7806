"""How signals and the standard streams reach the command line.

Ctrl-C ends a command with 130, SIGTERM with 143 and a hangup with 129, each by an exception, so that what was begun is tidied up. Imported
before everything else: it must be light.
"""
import _thread
import contextlib
import io
import math
import os
import signal
import sys
import threading
import time

ENDING = "SIGINT", "SIGTERM", "SIGHUP"
STOPPED = 128 + signal.SIGINT
AT_ONCE = 10        # seconds after Ctrl-C in which an exception is taken for its effect
AGAIN = 0.05        # seconds after which a signal is sent again whose exception was lost
PATIENCE = 1.0      # seconds after which it is looked whether SIGTERM has had its effect


class Terminated(SystemExit):
    """A request to end: SIGTERM, or the terminal is gone."""


_last_interrupt = -math.inf


def _interrupt(number, frame):
    global _last_interrupt
    _last_interrupt = time.monotonic()
    raise KeyboardInterrupt


def _terminate(number, frame):
    error = Terminated(128 + number)
    _thread.start_new_thread(_insist, (number, error))      # threading's own have locks, which whatever was interrupted may hold
    raise error


def _insist(number, error):
    """Send a signal again whose exception was swallowed, and not propagated.

    Python itself clears it where it folds constants, and imports that try something drop it. As long as the main thread unwinds, what it
    tidies up is left in peace.
    """
    main = threading.main_thread().ident
    while True:
        time.sleep(PATIENCE)
        active = sys._current_exceptions().get(main)
        active = active[1] if isinstance(active, tuple) else active         # before Python 3.12
        while active is not None and active is not error:
            active = active.__context__
        if active is None:
            os.kill(os.getpid(), number)
            return


def _lost(args, theirs):
    """Send a signal again that Python dropped.

    It drops exceptions in callbacks and finalizers.
    """
    if issubclass(args.exc_type, (KeyboardInterrupt, Terminated)):
        number = signal.SIGINT if args.exc_type is KeyboardInterrupt else getattr(args.exc_value, "code", 128 + signal.SIGTERM) - 128
        with contextlib.suppress(RuntimeError):     # the interpreter is about to end
            again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
    else:
        theirs(args)


def watch():
    """Let no signal be lost, for the rest of this process.

    A signal that the caller ignores, as `nohup` does, stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    theirs = sys.unraisablehook
    sys.unraisablehook = lambda args: _lost(args, theirs)
    for name in ENDING[1:]:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)


def ignore():
    """From here on the process only ends."""
    for name in ENDING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextlib.contextmanager
def interrupts_held():
    """Ctrl-C takes effect when what this yields is called, or at the end.

    Inside a callback of LLVM Python drops the exception, or leaves what LLVM and numba keep half changed; modules written in C that are
    being imported lose it. The same holds for SIGTERM and SIGHUP where they have a handler.
    """
    theirs = {}
    if threading.current_thread() is threading.main_thread():
        theirs = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in ENDING if hasattr(signal, name)}
    theirs, held = {number: handler for number, handler in theirs.items() if callable(handler)}, []

    def check():
        if held:
            number, frame = held.pop()
            theirs[number](number, frame)
    try:
        for number in theirs:
            signal.signal(number, lambda *args: held.append(args))
        yield check
    finally:
        for number, handler in theirs.items():
            signal.signal(number, handler)
    check()


def interrupted(error):
    """Whether an exception comes from Ctrl-C, perhaps by way of others.

    So does one that follows it at once: modules written in C print the KeyboardInterrupt and raise an ImportError.
    """
    if isinstance(error, Exception) and time.monotonic() - _last_interrupt < AT_ONCE:
        return True
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


class OutputError(OSError):
    """stdout cannot be written: the disk is full, or nobody reads."""


class _Output(io.FileIO):
    """A file whose failed writes can be told from other errors."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(*error.args) from error


class _Messages(io.FileIO):
    """A file whose failed writes are forgotten."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def open_streams():
    """Make the standard streams usable whatever the caller left of them.

    A closed stdin is an empty one; messages to a stderr that cannot be written are dropped; stdout raises OutputError, and stays None if it
    is closed. Numbers 0 to 2 are taken, so that no file that is opened later gets what is written there.
    """
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.dup(number)
    os.close(number)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    elif os.name != "nt":       # a console of Windows is no file
        sys.stderr = _over(_Messages(2, "wb", closefd=False), sys.stderr)
    if sys.stdout is not None and os.name != "nt":
        sys.stdout = _over(_Output(1, "wb", closefd=False), sys.stdout)


def _over(raw, stream):
    """A text stream like another one, over a raw file."""
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering,
                            write_through=stream.write_through)
