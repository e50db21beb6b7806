"""Where compiled kernels are kept: $PYDSA_CACHE_DIR or the user's cache folder, in a folder for each state of their sources.

A file ends with a hash of what stands before it: one that a crash left empty, cut or full of zeros is known, and made again.
"""
import atexit
import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import platformdirs

SEAL = 32       # bytes of the hash at the end of a file
ENOUGH = 1 << 20        # bytes that a folder must be able to take to be worth a try: about one of the larger kernels


class KernelsNotKept(UserWarning):
    """Compiled kernels cannot be kept, so that the next start compiles again."""


def cache_folder(made_by, sources):
    """A folder named by a hash of `made_by` and of the files `sources`.

    made_by is whatever else decides what comes of them. Where none can be written, one that goes away with the process, with a warning.
    """
    digest = hashlib.sha256(made_by.encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    name, root = digest.hexdigest()[:16], "the user's cache folder"
    try:
        root = os.environ.get("PYDSA_CACHE_DIR") or platformdirs.user_cache_dir("pydsa")
        folder = Path(root).absolute() / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if file.write(bytes(ENOUGH)) < ENOUGH:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except (OSError, RuntimeError) as error:        # RuntimeError: a user without a home
        _warn(root, error)
        folder = _temporary(name)
    return folder


def _temporary(name):
    """A folder that goes away with the process.

    One that does not exist if there can be none.
    """
    try:
        temporary = tempfile.mkdtemp(prefix="pydsa-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        folder = Path(temporary) / name
        folder.mkdir()
    except OSError:
        return Path(os.devnull) / name
    return folder


_warned = False


def _warn(folder, error):
    """Warn, once in a process, that kernels are not kept."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"{folder} cannot hold compiled kernels ({getattr(error, 'strerror', None) or error}): they will be compiled anew at "
                      "every start. Set PYDSA_CACHE_DIR to a folder that can be written.", KernelsNotKept, stacklevel=3)


def read(path):
    """What write() has put into a file; None if that is not there, or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    data, seal = data[:-SEAL], data[-SEAL:]
    return data if hashlib.sha256(data).digest() == seal else None


def write(path, data):
    """Keep bytes in a file. Several processes may do so at once.

    A folder that is gone is made again. What cannot be kept, as on a full disk, is no error but a warning, the first time.
    """
    try:
        try:
            _replace(path, data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, data)
    except OSError as error:
        _warn(path.parent.parent, error)


def _replace(path, data):
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data + hashlib.sha256(data).digest())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):      # the folder may be gone
            os.unlink(partial)
        raise


def kept(path, make):
    """The bytes of a file, or those of make(), which it holds from then on."""
    data = read(path)
    if data is None:
        data = make()
        write(path, data)
    return data
