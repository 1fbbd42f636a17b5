"""Takes back what a replay changed, even where an interrupt comes in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Undo:
    """A stack of calls that take back changes, the last change first.

    A change is registered before it is made, and a call may run twice: an interrupt in the middle
    of `run` leaves it on the stack, so that a second `run` completes what the first began.
    """

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def add(self, call: Callable[[], Any]) -> None:
        """Register a call that may run before its change was made, and more than once."""
        self.calls.append(call)

    def run(self) -> None:
        """Take back every change."""
        calls = self.calls
        while calls:
            calls[-1]()
            calls.pop()
