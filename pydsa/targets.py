"""What may be at a path where a file is to be written: a device, a pipe or a directory must not be replaced by one."""
import errno
import os
import stat


def check_replaceable(path):
    """Raise OSError if something other than a regular file is at a path."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "this is no regular file, and would be replaced by one")
