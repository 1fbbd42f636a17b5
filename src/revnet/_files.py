"""Write files whole or not at all, and read only what is a file.

A folder may come from somebody else. So nothing is opened by a name that could have been put
there to lead elsewhere: new files have random names and are created exclusively, links are not
followed by what writes, and pipes and devices are not opened at all.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

# What a killed process may leave in a folder begins so.
PARTIAL_PREFIX = ".revnet-partial-"
# Group and owner may write where the umask lets them; others may not, whatever it says.
_NEW_MODE = 0o664
# Windows has neither of the first two, nor links that anybody can make, nor pipes in folders.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


class NotAFileError(OSError):
    """What should be a file is a folder, a link, a pipe, a device, or too large."""


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that takes the place of `path` when all of it is on the disk.

    If anything goes wrong before, `path` stays as it was and nothing else is left. A link is
    replaced, not followed. The new file has the mode of the old one.

    Raises:
        NotAFileError: something is there that is no file.
        OSError: the file cannot be written.
    """
    mode = _mode_of(path)
    partial = path.with_name(PARTIAL_PREFIX + secrets.token_hex(8))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY
    descriptor = os.open(partial, flags, _NEW_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(descriptor)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _mode_of(path: Path) -> int | None:
    """Return the mode of the file that is to be replaced, or None where there is none."""
    if not path.name:
        raise _not_a_file(path)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        # A link to a device, such as /dev/stdout, is not ours to replace.
        if path.exists() and not path.is_file():
            raise _not_a_file(path)
        return None
    if not stat.S_ISREG(found.st_mode):
        raise _not_a_file(path)
    return stat.S_IMODE(found.st_mode) & 0o777


def append_to_file(path: Path, content: bytes) -> None:
    """Append to a file, or begin it.

    Raises:
        NotAFileError: a link or something else that is no file is there.
        OSError: the file cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_FOLLOW | _NO_WAITING | _BINARY
    try:
        descriptor = os.open(path, flags, _NEW_MODE)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _not_a_file(path) from error
        raise
    with os.fdopen(descriptor, "ab") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_a_file(path)
        file.write(content)


@contextmanager
def open_file(path: Path, most: int | None = None) -> Iterator[BufferedReader]:
    """Yield a file, or what a link to one leads to, for reading.

    Raises:
        NotAFileError: it is something else, or larger than `most` bytes.
        OSError: it cannot be read.
    """
    # Opening a pipe would wait for somebody to write to it, and opening a device may do something.
    _check(path, path.stat(), most)
    descriptor = os.open(path, os.O_RDONLY | _NO_WAITING | _BINARY)
    with os.fdopen(descriptor, "rb") as file:
        _check(path, os.fstat(descriptor), most)
        yield file


def read_file(path: Path, most: int) -> bytes:
    """Return what a file of at most `most` bytes holds; raise as `open_file` does."""
    with open_file(path, most) as file:
        # As much as there is: Python takes memory for as much as it is asked for.
        return file.read(os.fstat(file.fileno()).st_size)


def _check(path: Path, found: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _not_a_file(path)
    if most is not None and found.st_size > most:
        message = f"it is larger than {most:,} bytes"
        raise NotAFileError(errno.EFBIG, message, os.fspath(path))


def _not_a_file(path: Path) -> NotAFileError:
    return NotAFileError(errno.EINVAL, "it is not a file", os.fspath(path))
