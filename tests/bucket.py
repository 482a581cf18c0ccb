"""A file system as a mounted bucket has it: nothing is locked, nothing is renamed, a file is there when it is closed.

What TensorStore does in C++ is not reached: it renames files, which mounts of buckets do by a copy.
"""

import errno
import fcntl
import os


def mount(monkeypatch):
    """From now on, in this process."""

    def cannot(*args, **_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(args[0]))

    for module, name in ((os, "rename"), (os, "replace"), (os, "link"), (fcntl, "lockf"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, cannot)
