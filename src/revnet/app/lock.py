"""One training at a time writes to a run folder."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from revnet.app.errors import UserError
from revnet.app.writing import writing

try:
    import fcntl
except ImportError:
    # Windows has no such locks: there two trainings into one folder are the user's care.
    fcntl = None  # type: ignore[assignment]

NAME = ".revnet-lock"
# Some network file systems have no locks either.
_UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other trainings, which are told the number of this process.

    The system releases the lock of a process that ends, however it ends: the file that is left
    locks nothing.

    Raises:
        UserError: another training holds the folder.
    """
    if fcntl is None:
        yield
        return
    path = folder / NAME
    with writing(path):
        descriptor = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Return a descriptor of the lock file, which is this process's until it is closed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"cannot write {path}: it is not a file. Remove it.")
            _lock(descriptor, path)
            # Whoever held the lock before may have removed the file since it was opened.
            with suppress(FileNotFoundError):
                if os.path.samestat(found, path.lstat()):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = re.fullmatch(rb"([0-9]{1,10})\n", os.pread(descriptor, 16, 0))
        who = f"process {holder[1].decode()}" if holder else "another process"
        raise UserError(
            f"{path.parent} is in use by {who}, which trains there: wait for its end, or choose "
            f"another --out"
        ) from None
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
