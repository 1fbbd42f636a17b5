"""Generators and arrays: objects written in C that are read, and written again, as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from operator import attrgetter, methodcaller
from typing import Any

from .._torch import is_capturing, is_faking
from .undo import Undo

# Of bytes. To copy a larger array in each call would take longer than the step.
_LARGEST = 1 << 16

_Read = Callable[[Any], Any]
_Write = Callable[[Any, Any], Any]


class Whole:
    """A generator or an array as it was.

    Args:
        original: the object.
        read: returns a copy of what it holds.
        write: gives it that again.
    """

    __slots__ = ("original", "state", "_read", "_write")

    def __init__(self, original: Any, read: _Read, write: _Write) -> None:
        self.original = original
        self._read, self._write = read, write
        self.state = read(original)

    def restore(self, undo: Undo) -> None:
        """Give the object what it held, until `undo` runs."""
        undo.add(partial(self._write, self.original, self._read(self.original)))
        self._write(self.original, self.state)


def whole_of(value: Any) -> Whole | None:
    """Return what a generator or an array holds; None for other objects, and for a large one."""
    access = _access(type(value))  # type: ignore[arg-type]
    if access is None or is_faking() or is_capturing():
        return None
    return None if access is _ARRAY and _is_fixed(value) else Whole(value, *access)


@cache
def _access(kind: Any) -> tuple[_Read, _Write] | None:
    # By name, since NumPy need not be there.
    return _ACCESS.get(f"{kind.__module__}.{kind.__qualname__}")


def _is_fixed(array: Any) -> bool:
    return array.nbytes > _LARGEST or not array.flags.writeable


def _overwrite(array: Any, contents: Any) -> None:
    array[...] = contents


def _exchange(generator: Any, state: Any) -> None:
    generator.bit_generator.state = state


def _set_state(generator: Any, state: Any) -> None:
    generator.set_state(state)


_ARRAY: tuple[_Read, _Write] = methodcaller("copy"), _overwrite
_ACCESS: dict[str, tuple[_Read, _Write]] = {
    "torch._C.Generator": (methodcaller("get_state"), _set_state),
    "random.Random": (methodcaller("getstate"), lambda value, state: value.setstate(state)),
    "numpy.ndarray": _ARRAY,
    "numpy.random.mtrand.RandomState": (methodcaller("get_state"), _set_state),
    "numpy.random._generator.Generator": (attrgetter("bit_generator.state"), _exchange),
}
