"""The control groups of Linux that this process is in, and their files.

Groups set limits of memory and of CPU time, for a container, a service or a batch job. There are two versions, with different files; a
machine may use both at once, for different resources. Nothing here raises an exception: what cannot be read sets no limit.
"""
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Mount(NamedTuple):
    """A hierarchy of groups in the file system."""
    version: int            # 1 or 2
    controllers: list       # the resources of a hierarchy of version 1
    top: PurePosixPath      # the group whose files are at `folder`
    folder: Path


def lines(path):
    """The lines of a file; none if it cannot be read."""
    try:
        return os.fsdecode(path.read_bytes()).strip("\n").split("\n")
    except (OSError, ValueError):
        return []


def folders(controller, root="/"):
    """Yield (version, folder) of each group that this process is in.

    These are its own group and all above it that can be seen; a folder need not exist. version: 1 or 2. controller: the resource, "memory"
    or "cpu". root: where the files of Linux begin, for tests.
    """
    root = Path(root)
    mounts = list(_mounts(root))
    for line in lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        version = 1 if controllers else 2
        if not colon or version == 1 and controller not in controllers.split(","):
            continue
        path = PurePosixPath(path)
        mine = [m for m in mounts if m.version == version and (version == 2 or controller in m.controllers)]
        mine = mine or _usual(version, controllers, controller, root)
        # In a container, what is mounted may begin at its own group while the path is the host's: the top is then all that is known.
        for inside, mount in [(path.relative_to(m.top), m) for m in mine if _holds(m, path)] or [(PurePosixPath(), m) for m in mine]:
            for group in (inside, *inside.parents):
                yield version, mount.folder / group


def _holds(mount, path):
    """Whether the files of a group, a path, are below a Mount's folder."""
    return path.is_relative_to(mount.top) and ".." not in path.relative_to(mount.top).parts


def _mounts(root):
    """The hierarchies that are mounted, as Mounts."""
    for line in lines(root / "proc/self/mountinfo"):
        place, dash, kind = line.partition(" - ")
        place, kind = place.split(" "), kind.split(" ")
        if dash and len(place) > 4 and kind[0] in ("cgroup", "cgroup2"):
            top, folder = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text) for text in place[3:5])     # \040: a space
            yield Mount(2 if kind[0] == "cgroup2" else 1, kind[-1].split(","), PurePosixPath(top), root / folder.lstrip("/"))


def _usual(version, controllers, controller, root):
    """Where hierarchies are by custom, for want of a list of mounts."""
    usual = root / "sys/fs/cgroup"
    names = ["unified", ""] if version == 2 else [controller, controllers]
    return [Mount(version, [controller], PurePosixPath("/"), usual / name) for name in names if os.path.isdir(usual / name)][:1]
