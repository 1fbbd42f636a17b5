"""Streams that are read on the way through a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any


class Taps:
    """Reads the streams of one pass after some of its steps.

    Only what `read` returns stays of them: float and fixed streams alike are ordinary tensors of
    the graph there.

    Args:
        positions: how many steps of the program come before each reading.
        read: gives what the caller gets from all streams.
    """

    def __init__(self, positions: Sequence[int], read: Callable[..., Any]) -> None:
        self.positions = positions
        self.read = read
        self._waiting = sorted(set(positions))
        self._found: dict[int, Any] = {}

    def waits_before(self, index: int) -> bool:
        """Check whether the streams are to be read before step `index`."""
        return bool(self._waiting) and self._waiting[0] <= index

    def reach(self, index: int, streams: Sequence[Any]) -> None:
        """Read the streams as they are before step `index`, where that was asked for.

        Steps may have been left out, so that they are also those of some earlier positions.
        """
        while self.waits_before(index):
            self._found[self._waiting.pop(0)] = self.read(*streams)

    def results(self) -> list[Any]:
        """Return what was read, in the order in which it was asked for."""
        return [self._found[position] for position in self.positions]


def positions_of(taps: Sequence[int], count: int, steps: int, name: str) -> list[int]:
    """Return the positions behind some blocks.

    Args:
        taps: their indices, negative ones from the end.
        count: how many blocks there are.
        steps: of one block.
        name: what errors call a block.

    Raises:
        IndexError: there is no such block.
        TypeError: an index is no integer.
    """
    try:
        taps = list(map(index, taps))
    except TypeError:
        raise TypeError(f"taps={taps!r}: expected the indices of some {name}s") from None
    for tap in taps:
        if not -count <= tap < count:
            raise IndexError(f"taps: there is no {name} {tap} among {count}")
    return [(tap % count + 1) * steps for tap in taps]
