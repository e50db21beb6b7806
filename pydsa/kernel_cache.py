"""Where compiled kernels are kept: $PYDSA_CACHE_DIR or the user's cache folder, in a folder for each state of their sources."""
import contextlib
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import platformdirs


def cache_folder(made_by, sources):
    """A folder named by a hash of `made_by`, whatever decides what comes of the sources, and of these files.

    Where none can be written, one that is forgotten afterwards, with a warning.
    """
    digest = hashlib.sha256(made_by.encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    root = os.environ.get("PYDSA_CACHE_DIR") or platformdirs.user_cache_dir("pydsa")
    folder = Path(root) / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="pydsa-"))
        warnings.warn(f"{root} cannot hold compiled kernels ({error.strerror}): they will be compiled anew at every start. "
                      "Set PYDSA_CACHE_DIR to a folder that can be written.", stacklevel=2)
    return folder


def kept(path, make):
    """The bytes of a file; where it cannot be read, those that make() gives, which it holds from then on. Processes may do so at once."""
    with contextlib.suppress(OSError):
        return path.read_bytes()
    data = make()
    with contextlib.suppress(OSError):      # a full disk, for one: then it is made again the next time
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    return data
