"""Files that replace older ones when they are complete.

A device, a pipe or a directory must not be replaced by a file, nor a model by what was computed with it.
"""
import contextlib
import errno
import os
import stat


def check_replaceable(path, begins=b""):
    """Raise OSError if something is at a path that must not be replaced.

    That is all but regular files, and files that are not empty and begin otherwise than those that are to be written.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "this is no regular file, and would be replaced by one")
    if begins:
        with open(path, "rb") as file:
            start = file.read(len(begins))
        if start and start != begins:
            raise FileExistsError(errno.EEXIST, "another file is there, and would be lost")


@contextlib.contextmanager
def replacing(path, partial):
    """A context that writes the file `partial`, which then replaces path.

    If the context ends with an exception, the file is removed. partial: a Path.
    """
    try:
        yield
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)
        raise
