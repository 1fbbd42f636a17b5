"""What a replay reads in place of recorded containers, and how originals are put back."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from types import CellType
from typing import Any

from torch import Tensor

from .contents import FUNCTIONS, attributes_of, blank, function_with
from .objects import Container, Large, Objects
from .tensors import TensorState


class Copies:
    """What one replay reads in place of the recorded values.

    Args:
        objects: as the call found them.
        replaced: by `id` of the state, the tensors that it reads in place of others.
        originals: by `id` of the record, the containers that hold what they held. Afterwards, of
            these, those that a replay reads themselves.
    """

    __slots__ = ("originals", "_made", "_replaced")

    def __init__(
        self, objects: Objects, replaced: dict[int, Tensor], originals: dict[int, Any]
    ) -> None:
        self._replaced = replaced
        self._made: dict[int, Any] = {}
        self.originals = originals
        if objects.containers:
            stale: list[Any] = [
                container
                for container in objects.containers.values()
                if container.changed or id(container) not in originals
            ]
            stale += [state for state in objects.tensors.values() if id(state) in replaced]
            for container in (*stale, *objects.containing(stale)):
                originals.pop(id(container), None)

    def replaces(self, value: Any) -> bool:
        """Check whether a replay reads something else than the original."""
        if value.__class__ is Container:
            return id(value) not in self.originals
        return id(value) in self._replaced

    def make(self, value: Any) -> Any:
        """Return what the replay reads in place of a recorded value."""
        kind = value.__class__
        if kind is TensorState:
            return self._replaced.get(id(value), value.tensor)
        if kind is Large:
            return value.original
        if kind is not Container:
            return value
        if id(value) in self.originals:
            return self.originals[id(value)]
        if id(value) not in self._made:
            self._build(value)
        return self._made[id(value)]

    def free(self) -> None:
        """Free the copies, at the end of the replay: weak references keep none of them."""
        self._made.clear()

    def _build(self, container: Container) -> None:
        kind = container.kind
        if issubclass(kind, tuple | frozenset) or (kind in FUNCTIONS and kind is not CellType):
            items = [self.make(item) for item in container.items]
            # One of its items may hold it, and have built it.
            if id(container) in self._made:
                return
            copy = self._made[id(container)] = _fixed(container, items)
        else:
            copy = self._made[id(container)] = _blank(container)
            keys = [self.make(key) for key in container.keys or ()]
            items = [self.make(item) for item in container.items]
            _fill(copy, keys, items)
        for name, item in container.attributes.items():
            # Also where the class is frozen.
            object.__setattr__(copy, name, self.make(item))


def _fixed(container: Container, items: list[Any]) -> Any:
    """Return a copy of a container that holds the same objects for good."""
    if container.kind in FUNCTIONS:
        return function_with(container.kind, container.options, items)
    base: Any = tuple if issubclass(container.kind, tuple) else frozenset
    return base.__new__(container.kind, items)


def _blank(container: Container) -> Any:
    copy = blank(container.kind)
    if isinstance(copy, deque):
        deque.__init__(copy, (), container.options)
    elif isinstance(copy, defaultdict):
        defaultdict.__init__(copy, container.options)
    return copy


def _fill(copy: Any, keys: list[Any], items: list[Any]) -> None:
    """Give a new container its items, past the methods of its class."""
    if isinstance(copy, OrderedDict):
        for key, item in zip(keys, items, strict=True):
            OrderedDict.__setitem__(copy, key, item)
    elif isinstance(copy, dict):
        dict.update(copy, zip(keys, items, strict=True))
    elif isinstance(copy, list):
        list.extend(copy, items)
    elif isinstance(copy, bytearray):
        bytearray.extend(copy, items)
    elif isinstance(copy, set):
        set.update(copy, items)
    elif isinstance(copy, deque):
        deque.extend(copy, items)
    elif isinstance(copy, CellType) and items:
        copy.cell_contents = items[0]


def refill(container: Container, originals: dict[int, Any]) -> None:
    """Give an original its recorded contents again, where a replay changed them.

    Args:
        container: one of those that nobody changed.
        originals: by `id` of the record, all of those.
    """

    def original(value: Any) -> Any:
        if value.__class__ is Container:
            return originals[id(value)]
        return value.original if value.__class__ in (TensorState, Large) else value

    present = originals[id(container)]
    if container.same(present):
        return
    keys = [original(key) for key in container.keys or ()]
    items = [original(item) for item in container.items]
    if isinstance(present, list | set | dict | deque | bytearray):
        bases: tuple[Any, ...] = (list, set, OrderedDict, dict, deque, bytearray)
        next(base for base in bases if isinstance(present, base)).clear(present)
    elif isinstance(present, CellType) and not items:
        del present.cell_contents
    _fill(present, keys, items)
    if container.attributes:
        for name in attributes_of(present).keys() - container.attributes.keys():
            object.__delattr__(present, name)
        for name, item in container.attributes.items():
            object.__setattr__(present, name, original(item))
