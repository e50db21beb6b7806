"""A Ray of this program's own, on this machine: loopback, no dashboard, and nothing is left.

Ray's processes end with the program. What it kept in a folder of its own is removed by a small process that waits for the program's end,
however that comes.
"""
import contextlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

from pydsa.errors import StageError

OBJECT_STORE = 75 << 20     # bytes, the fewest that Ray takes; hidden states go another way
ROOM = 8 << 20              # bytes of files that Ray writes, with much to spare; without them it waits for itself and times out
LONGEST_FOLDER = 40         # characters: Ray puts the paths of sockets, of at most 107, below it
NEEDS = "A model in stages needs Ray, which is not installed: pip install 'pydsa[ray]'."
_TOKEN = secrets.token_hex(32)      # without which Ray's ports answer nobody: of this process, as Ray reads it once
# Ray reads these when it is imported or started, and its processes inherit them.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",       # the node's address is 127.0.0.1, and all ports listen there only
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": _TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",                     # by default workers give way to all other processes
    "RAY_memory_monitor_refresh_ms": "0",           # it would kill stages for pages that the system can drop
    "RAY_enable_metrics_collection": "false"}
# The same for any Ray that this process uses: its messages would go to stdout, among answers, and SIGTERM would be told with a stack.
QUIET = {"RAY_DEDUP_LOGS_SKIP_REGEX": "^", "RAY_SCHEDULER_EVENTS": "0", "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}
# Kills what has files open in the folder, and removes it. Most of Ray's processes end with the program; one that is stopped does not.
SWEEP = r"""
import os, shutil, signal, sys, time
folder, program = sys.argv[1], os.getppid()
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.read(0, 1)
def users():
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            open_files = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
            if int(pid) != program and any(path.startswith(folder + "/") for path in open_files):
                yield int(pid)
        except OSError:
            pass
for attempt in range(50):
    found = list(users())
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    if not found:
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
    time.sleep(0.1)
"""


def import_ray():
    """The module ray; StageError, in one sentence, if it is not installed."""
    try:
        with environment(QUIET), handlers_kept():
            import ray
        logging.getLogger("ray").setLevel(logging.ERROR)
        return ray
    except ModuleNotFoundError as error:
        raise StageError(NEEDS) from error


class LocalRay:
    """A Ray that runs while this object is open.

    Raises StageError if Ray is not installed, cannot be started, or would listen to other machines.
    """

    def __init__(self):
        self._folder = make_folder()
        self._sweeper = subprocess.Popen([sys.executable, "-I", "-S", "-c", SWEEP, self._folder], stdin=subprocess.PIPE,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        self._closed = threading.Event()
        try:
            self._on_a_lasting_thread(self._start)
        except BaseException:
            self.close()
            raise

    def _on_a_lasting_thread(self, work):
        """Call work() on the main thread, or one that lasts until close().

        The system ends Ray's processes with the thread that has started them.
        """
        if threading.current_thread() is threading.main_thread():
            work()
            return
        done, failed = threading.Event(), []

        def run():
            try:
                work()
            except BaseException as error:      # the caller raises it
                failed.append(error)
            done.set()
            self._closed.wait()
        threading.Thread(target=run, name="pydsa starts Ray", daemon=True).start()
        done.wait()
        if failed:
            raise failed[0]

    def _start(self):
        with environment(ENVIRONMENT):
            ray = import_ray()
            try:
                with handlers_kept():
                    ray.init(address="local", num_cpus=0, num_gpus=0, include_dashboard=False, object_store_memory=OBJECT_STORE,
                             log_to_driver=False, logging_level="ERROR", configure_logging=False, _temp_dir=self._folder,
                             _plasma_directory=self._folder)
            except Exception as error:
                raise StageError(f"Ray cannot be started on this machine ({first_line(error)}).") from error
        met = ray.nodes()[0]["NodeManagerAddress"]
        if met not in ("127.0.0.1", "::1"):
            raise StageError(f"Ray was imported before, and would listen at {met} to other machines: load the model before `import ray`, "
                             "or call ray.init() first.")

    def close(self):
        """End Ray's processes, and remove its folder."""
        ray = sys.modules.get("ray")
        with contextlib.suppress(Exception):        # whatever it says: the sweeper ends its processes
            if ray is not None:
                ray.shutdown()
        self._closed.set()
        with contextlib.suppress(OSError):
            self._sweeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._sweeper.wait(10)
        shutil.rmtree(self._folder, ignore_errors=True)


def make_folder():
    """A new folder for Ray's files; StageError if there is no room for them."""
    try:
        parent = tempfile.gettempdir()
        parent = parent if os.name == "nt" or len(parent) + 19 <= LONGEST_FOLDER else "/tmp"
        free = shutil.disk_usage(parent).free
        if free < ROOM:
            raise StageError(f"Ray's files need {ROOM >> 20} MiB in the folder for temporary files, {parent}, and {free >> 10} KiB are "
                             "free there: make room, or name another folder in TMPDIR.")
        return tempfile.mkdtemp(prefix="pydsa-ray-", dir=parent)
    except OSError as error:
        raise StageError(f"There is no folder for Ray's temporary files ({error.strerror or error}); name one in TMPDIR.") from error


def first_line(error):
    """The first line of an error's text, without a full stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip().rstrip(".")


@contextlib.contextmanager
def environment(values):
    """A context with some environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def handlers_kept():
    """A context after which signals are handled as before.

    Ray takes SIGTERM for itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    theirs = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in theirs.items():
            if handler is not None:
                signal.signal(number, handler)
