"""What the command prints: nothing in it can steer the terminal, and no work is lost with it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import textwrap
from contextlib import suppress
from typing import IO, Any

# Control characters but for tab and newline, ends of lines and changes of direction that only
# Unicode knows, and what stands for bytes that are not UTF-8.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    r"""Return a text in which control characters are written out, as `\x1b`.

    Names of files, captions and what a network generates may hold anything, such as sequences
    that clear a terminal, or make it type.
    """
    return _STEERING.sub(_written_out, str(text))


def visible_line(text: object) -> str:
    r"""Return a text as `visible` does, on one line: its tabs and newlines are written out, too."""
    return re.sub("[\t\n]", _written_out, visible(text))


def _written_out(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        # Python's stand-in for a byte that is not UTF-8.
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class Output:
    """A text stream that gives up, once and with a message, when it cannot be written to.

    A closed pipe, a full disk or a terminal that has gone must not end a training.

    Args:
        stream: Where the text goes, such as `sys.stdout`; None is nowhere.
        message: What is said on the standard error when the stream is given up; "" is nothing.
    """

    def __init__(self, stream: IO[str] | None, message: str = "") -> None:
        self._stream = stream
        self._message = message
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text; characters that the stream's encoding lacks are written out."""
        stream = self._stream
        if stream is not None:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            try:
                stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:
                self._give_up(stream, error)
        return len(text)

    def flush(self) -> None:
        """Pass on what has been written."""
        stream = self._stream
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(stream, error)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal that still listens."""
        stream = self._stream
        try:
            return stream is not None and stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, stream: IO[str], error: OSError | ValueError) -> None:
        # Another thread may have met the same.
        if self._stream is None:
            return
        self._stream = None
        # ValueError: somebody has closed the stream.
        self.error = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        if stream in (sys.stdout, sys.stderr):
            # What is still in the stream's buffer would fail again when Python ends.
            with suppress(OSError, ValueError):
                number = stream.fileno()
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
        if self._message:
            complain(f"{self._message}: {self.error.strerror}")


def wrapped(text: str, stream: Any) -> str:
    """Return a line as a terminal shows it without breaking a word, and as it is elsewhere."""
    if stream is None or not stream.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    return textwrap.fill(text, columns, break_long_words=False, break_on_hyphens=False)


def show(text: str) -> OSError | None:
    """Print a text; return why it could not be printed, if it could not."""
    output = Output(sys.stdout)
    output.write(f"{visible(text)}\n")
    output.flush()
    return output.error


def complain(message: str) -> None:
    """Write a line to the standard error, or nowhere if that is closed."""
    output = Output(sys.stderr)
    output.write(f"{wrapped(f'revnet: {visible_line(message)}', output)}\n")
    output.flush()
