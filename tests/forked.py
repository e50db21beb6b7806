"""Code of tests, in processes forked from one that did the imports.

Most of what a process that uses the CUDA backend would do is to import it. The code may replace the GPU's driver, use up its memory or end.
"""
import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 300       # after which a process is ended
PARENT = f"""
import json, os, signal, sys
import numpy
import pydsa.backends.cuda
import pydsa.cli
import pydsa.model
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
signal.alarm({SECONDS})
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, path in enumerate(request["files"], 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
sys.argv[1:] = request["args"]
sys.stdin = open(0)
exec(request["code"])
"""

REFUSED = '''
def refused(kind, work):
    """The message of the error of this kind that work() raises."""
    try:
        work()
    except PydsaError as error:
        assert type(error) is kind, error
        return str(error)
    raise AssertionError("nothing was refused")
'''


@functools.cache
def _parent(env):
    """The process with these variables of its environment."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(env))

    def end():
        process.stdin.close()
        process.wait()
    atexit.register(end)
    return process


def run(code, *args, **env):
    """Run code as `python -c` does -> its stdout and stderr. It must not fail.

    Where there is no fork it is a process of its own from the start.
    """
    env = {"NUMBA_ENABLE_CUDASIM": "0"} | env
    if not hasattr(os, "fork"):
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS,
                              env=os.environ | {"PYTHONPATH": str(ROOT)} | env)
        status, stdout, stderr = done.returncode, done.stdout, done.stderr
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            parent = _parent(tuple(sorted(env.items())))
            parent.stdin.write(json.dumps({"code": code, "args": args, "files": [str(path) for path in files]}) + "\n")
            parent.stdin.flush()
            answer = parent.stdout.readline()
            assert answer, f"the process that forks has ended: {parent.wait()}"
            status = int(answer)
            stdout, stderr = (path.read_text() for path in files)
    assert status == 0, stdout + stderr
    return stdout, stderr
