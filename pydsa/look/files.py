"""Files that pages and pictures are written to: what is not theirs is never replaced."""
import contextlib
import os

from pydsa.errors import PydsaError

MARKS = {".html": b"<!-- pydsa look:", ".png": b"pydsa look"}       # near the beginning of each file


def check(path, ending):
    """Raise PydsaError if replace() would fail, before a long run.

    ending: a key of MARKS, with which the name must end.
    """
    path = os.fspath(path)
    if os.path.splitext(path)[1].lower() != ending:
        raise PydsaError(f"{path}: the name must end in {ending}.")
    try:
        with open(path, "rb") as file:
            mine = MARKS[ending] in file.read(4096)
    except FileNotFoundError:
        mine = True
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise _cannot_write(path, error) from error
    if not mine:
        raise PydsaError(f"{path}: this file is not of pydsa look and would be lost, expected another name (-o), or none.")
    try:
        with _part(path):
            pass
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error


def replace(path, ending, data):
    """Write bytes to a file, which has the old ones until it is complete.

    path, ending: as for check().
    """
    path = os.fspath(path)
    check(path, ending)
    try:
        with _part(path) as (name, file):
            file.write(data)
            file.close()
            os.replace(name, path)
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextlib.contextmanager
def _part(path):
    """A new file beside a path, which is gone at the end."""
    name = f"{path}.{os.getpid()}.part"
    try:
        with open(name, "xb") as file:
            yield name, file
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.remove(name)


def _cannot_write(path, error):
    return PydsaError(f"{path}: the file cannot be written ({getattr(error, 'strerror', None) or error}).")
