"""Write files with messages that say what the user can do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from revnet._files import NotAFileError, replace_file
from revnet.app.errors import MachineError, UserError, first_line

# The place cannot be written to, which says nothing about the machine.
WRONG_PLACE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a file that cannot be written into a message."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"no permission to write {path}: {error.strerror}") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        if isinstance(error, NotAFileError) or error.errno in WRONG_PLACE:
            raise UserError(f"cannot write {path}: {reason}") from error
        raise MachineError(
            f"cannot write {path}: {reason}. What was saved before is as it was."
        ) from error


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when it is complete, or raise with a message."""
    with writing(path), replace_file(path) as file:
        yield file


def check_own_folder(path: Path) -> None:
    """Raise where a folder that a run writes to would be somewhere else, or cannot be made."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"cannot write {path}: it is not a folder of this run. Remove it.")
