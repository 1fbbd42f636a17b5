"""What the command reports in one line instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input cannot be used as it is; the message says what to change. Exit code 2."""


class DataError(UserError):
    """An example cannot be read when its turn comes; of several ranks, only one meets it."""


class MachineError(Exception):
    """The machine has no room, in memory or on the disk; the message says what is lost. Exit 1."""


def check_least(name: str, value: float, least: float) -> None:
    """Raise unless the number given as `--name` is `least` or more; not-a-number is neither."""
    if not value >= least:
        words = f": give at least {least:g}" if least >= 1 else ": give a number above 0"
        if least == 0:
            words = ": give 0 or more"
        raise UserError(f"{_flag(name)} is {value}, which is too small{words}")


def check_most(name: str, value: float, most: float) -> None:
    """Raise unless the number given as `--name` is `most` or less."""
    if not value <= most:
        raise UserError(f"{_flag(name)} is {value}, which is too large")


def count(amount: int, name: str) -> str:
    """Return a number of things, as in "1 byte" or "1,234 bytes"."""
    return f"{amount:,} {name}{'' if amount == 1 else 's'}"


def meant(name: str, known: Iterable[str]) -> str:
    """Return a question for a name that is one of the known, misspelt, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind if it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "weights_only" in str(error):
        # torch's own message advises to execute what the file holds.
        return "it holds more than tensors and numbers"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
