"""Files and folders that are whole or absent: made under another name, then given their own.

That takes one rename, where the file system knows it. A mounted bucket may rename nothing: there a file is written anew
under its name, where it appears when it is closed, and a folder file by file, the one that says that it is whole last.
"""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable
from typing import IO

# What a copy would meet as well, having cut the file that is there.
_DENIED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOENT)


def write(path: pathlib.Path, fill: Callable[[IO[bytes]], object]) -> None:
    """A file, on the disk before its name is."""
    torn = path.with_name(f"{path.name}.tmp")
    with torn.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    appear(torn, path)


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """As `write`."""
    write(path, lambda file: file.write(data))


def write_text(path: pathlib.Path, text: str) -> None:
    """As `write`, in UTF-8."""
    write_bytes(path, text.encode())


def appear(torn: pathlib.Path, path: pathlib.Path, *, last: str = "") -> None:
    """Give a finished file or folder its name; a file that has it is replaced, a folder that has it must be empty.

    Args:
        last: the file of a folder without which nobody takes it for whole.

    Raises:
        OSError: a folder of that name holds something; or what the file system says of files that it does not write.
    """
    try:
        torn.replace(path)
    except OSError as error:
        if error.errno in _DENIED:
            raise
        if not torn.is_dir():
            shutil.copyfile(torn, path)
            torn.unlink()
        elif path.is_dir() and any(path.iterdir()):
            raise
        else:
            move_files(torn, path, last=last)


def move_files(torn: pathlib.Path, path: pathlib.Path, *, last: str = "") -> None:
    """The files of one folder into another, `last` at the end; where a kill came between, what is left of them."""
    files = sorted(file.relative_to(torn) for file in torn.rglob("*") if not file.is_dir())
    for file in sorted(files, key=lambda file: file == pathlib.Path(last)):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        appear(torn / file, path / file)
    shutil.rmtree(torn)


def folders_can_be_renamed(where: pathlib.Path) -> bool:
    """Whether they can be in this folder, by trying it; True where nothing can be tried."""
    one, other = (where / f".{uuid.uuid4().hex}" for _ in range(2))
    try:
        one.mkdir(parents=True)
        (one / "file").touch()
    except OSError:
        return True
    try:
        one.rename(other)
    except OSError:
        return False
    finally:
        for folder in (one, other):
            shutil.rmtree(folder, ignore_errors=True)
    return True
