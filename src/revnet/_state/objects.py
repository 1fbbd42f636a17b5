"""Containers and plain objects as they were, and copies of them for a replay.

What a step reaches through keywords and attributes is a graph of containers: lists, dicts, sets,
dataclasses, plain objects, of any depth, that may share parts or hold themselves. `Objects` takes
it down, each container and each tensor once. `Copies` builds from it what a replay reads: a
container that nobody changed is handed out itself, any other as a copy, so that identity between
them is that of the call and the originals are never touched.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from itertools import cycle
from operator import is_, length_hint
from typing import Any

from torch import Tensor, nn

from .._errors import ReversibleError
from .contents import (
    ATOMS,
    FUNCTIONS,
    contents_of,
    is_constant,
    is_container,
    length_of,
    options_of,
)
from .tensors import TensorState
from .wholes import Whole, whole_of

# A container of more leaves is kept by reference: to copy it in each call would cost more than the
# step.
LARGEST = 1000

# Containers of which no copy can be made, where they are none that were written in Python.
_UNCOPIED: Any = (Iterator, Mapping, Sequence, Set, ValuesView)


class Container:
    """One container, or function, as it was.

    It keeps the identity of the container and no reference: what the container holds later may be
    a graph that holds this record, a cycle through C++ that nothing collects.

    Attributes:
        identity: the `id` of the container.
        keys: of a mapping.
        items, attributes: their values: atoms themselves, `Container`, `TensorState` or `Large` for
            others, as keys are, too.
        changed: whether the call changed it.
        plain: whether it holds nothing but atoms.
    """

    __slots__ = ("identity", "kind", "keys", "items", "attributes", "changed", "options", "plain")

    def __init__(self, original: Any) -> None:
        self.identity = id(original)
        self.kind = type(original)
        self.changed = self.plain = False
        self.keys: list[Any] | None = None
        self.items: list[Any] = []
        self.attributes: dict[str, Any] = {}
        self.options = options_of(original)

    def same(self, original: Any) -> bool:
        """Check that the container holds what it held."""
        # Nothing is taken down of the containers that are most frequent.
        if self.plain and self.kind is list:
            return len(original) == len(self.items) and all(map(is_, original, self.items))
        if self.plain and self.kind is dict:
            return (
                len(original) == len(self.items)
                and all(map(is_, original, self.keys or ()))
                and all(map(is_, original.values(), self.items))
            )
        return self.matches(*contents_of(original))

    def matches(self, keys: list[Any] | None, items: list[Any], attributes: dict[str, Any]) -> bool:
        """Check that these are the contents that were recorded."""
        if len(items) != len(self.items) or attributes.keys() != self.attributes.keys():
            return False
        if keys is not None and (self.keys is None or not all(map(stands_for, self.keys, keys))):
            return False
        if issubclass(self.kind, set | frozenset):
            # A set has no order of its own, and its items compare by value.
            return {_identity(item) for item in items} == {_identity(item) for item in self.items}
        return all(map(stands_for, self.items, items)) and all(
            stands_for(value, attributes[name]) for name, value in self.attributes.items()
        )

    def parts(self) -> Iterator[Any]:
        """Go through the containers and tensors that it holds."""
        if self.plain:
            return
        for part in (*(self.keys or ()), *self.items, *self.attributes.values()):
            if part.__class__ is Container or part.__class__ is TensorState:
                yield part


class Large:
    """A container that is kept by reference, as it was: its identity and its length."""

    __slots__ = ("original", "length")

    def __init__(self, original: Any) -> None:
        self.original = original
        self.length = length_of(original)

    def same(self) -> bool:
        """Check that as many items are in it as then."""
        return length_of(self.original) == self.length


def _identity(value: Any) -> int:
    if value.__class__ is Container:
        identity: int = value.identity
        return identity
    return id(value.original if value.__class__ in (TensorState, Large) else value)


def stands_for(recorded: Any, present: Any) -> bool:
    """Check whether a recorded value stands for this object, whatever is in it now."""
    if recorded is present:
        return True
    if recorded.__class__ is Container:
        return bool(recorded.identity == id(present))
    if recorded.__class__ is TensorState or recorded.__class__ is Large:
        return present is not None and recorded.original is present
    return False


class Iteration:
    """An iterator as it was: what a call takes from it, its replay would not find."""

    __slots__ = ("original", "progress")

    def __init__(self, original: Any) -> None:
        self.original = original
        self.progress = _progress(original)

    def moved(self) -> bool:
        """Check whether something was taken from it since, or nothing tells so."""
        return isinstance(self.original, cycle) or bool(_progress(self.original) != self.progress)


def _progress(value: Any, depth: int = 4) -> Any:
    frame = getattr(value, "gi_frame", None)
    # A generator has a frame until it ends, `itertools.count` says where it is, and others, such as
    # `zip`, take from iterators and count by what they refer to.
    found = [length_hint(value, -1), frame and frame.f_lasti, repr(value)]
    if frame is None and depth:
        for part in gc.get_referents(value):
            iterators = part if isinstance(part, tuple) else (part,)
            found += [_progress(x, depth - 1) for x in iterators if isinstance(x, Iterator)]
    return found


class _TooLargeError(Exception):
    """A container has more leaves than are copied."""


class Objects:
    """The containers and tensors that some values reach, each once."""

    __slots__ = (
        "containers",
        "tensors",
        "large",
        "iterations",
        "wholes",
        "modules",
        "eager",
        "_left",
    )

    def __init__(self) -> None:
        self.containers: dict[int, Container] = {}
        self.tensors: dict[int, TensorState] = {}
        self.large: dict[int, Large] = {}
        self.iterations: list[Iteration] = []
        self.wholes: dict[int, Whole] = {}
        self.modules: list[nn.Module] = []
        # Whether tensors that earlier calls wrote to are copied at once.
        self.eager = True
        self._left = 0

    def take_all(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return what stands for each of some values, by their names."""
        return {
            name: self._tensor(value, False) if value.__class__ is Tensor else self.take(value)
            for name, value in values.items()
        }

    def take_keywords(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the same for values to which nobody writes; what has no copy stays as it is."""
        taken = {}
        for name, value in values.items():
            try:
                taken[name] = self.take(value, keyword=True)
            except TypeError:
                taken[name] = value
        return taken

    def take(self, value: Any, keyword: bool = False) -> Any:
        """Return what stands for a value; `value` itself where that never changes.

        Args:
            value: anything.
            keyword: whether the step was given it, so that nobody writes to its tensors.

        Raises:
            TypeError: a keyword that can be read only once, or of which no copy can be made.
        """
        if not is_container(value.__class__):
            return self._take(value, keyword)
        self._left = LARGEST
        before = len(self.containers), len(self.tensors)
        try:
            return self._take(value, keyword)
        except _TooLargeError:
            for found, length in zip((self.containers, self.tensors), before, strict=True):
                for key in list(found)[length:]:  # type: ignore[call-overload]
                    del found[key]  # type: ignore[attr-defined]
            large = self.large[id(value)] = Large(value)
            return large

    def _take(self, value: Any, keyword: bool) -> Any:
        if type(value) in ATOMS:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, keyword)
        if not is_container(value.__class__):
            self._check(value, keyword)
            return value
        known = self.containers.get(id(value)) or self.large.get(id(value))
        if known is not None:
            return known
        if type(value) in FUNCTIONS and is_constant(value):
            owner = getattr(value, "__self__", None)
            if isinstance(owner, nn.Module):
                self.modules.append(owner)
            return value
        # Counted first: to list what a large one holds would take longer than the step.
        self._left -= length_of(value)
        if self._left < 0:
            raise _TooLargeError
        keys, items, attributes = contents_of(value)
        plain = ATOMS.issuperset(map(type, (*items, *attributes.values(), *(keys or ()))))
        if plain and type(value) in (tuple, frozenset):
            return value
        # Entered before its items, which may hold it.
        container = self.containers[id(value)] = Container(value)
        container.keys, container.items, container.attributes = keys, items, attributes
        container.plain = plain
        if not plain:
            self._fill(container, keyword and type(value) not in FUNCTIONS)
        return container

    def _fill(self, container: Container, keyword: bool) -> None:
        """Let a container hold what stands for its contents, in place of these themselves."""
        take = self._take
        if container.keys is not None:
            container.keys = [take(key, keyword) for key in container.keys]
        container.items = [take(item, keyword) for item in container.items]
        container.attributes = {
            name: take(item, keyword) for name, item in container.attributes.items()
        }

    def _check(self, value: Any, keyword: bool) -> None:
        """Note what can be read as a whole; raise or watch where something is read only once."""
        whole = whole_of(value)
        if whole is not None:
            self.wholes[id(value)] = whole
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        elif isinstance(value, Iterator) and not keyword:
            self.iterations.append(Iteration(value))
        elif keyword and isinstance(value, _UNCOPIED):
            raise TypeError(type(value).__name__)

    def _tensor(self, tensor: Tensor, keyword: bool) -> Any:
        state = self.tensors.get(id(tensor))
        if state is None:
            state = self.tensors[id(tensor)] = TensorState(tensor, keyword, self.eager)
        elif keyword:
            state.keyword = True
        else:
            state.protect(self.eager)
        return state

    def containing(self, parts: Sequence[Any]) -> list[Container]:
        """Return the containers that hold one of these parts, directly or through others."""
        if not parts:
            return []
        holders: dict[int, list[Container]] = {}
        for container in self.containers.values():
            for part in container.parts():
                holders.setdefault(id(part), []).append(container)
        found: dict[int, Container] = {}
        waiting = list(parts)
        while waiting:
            for holder in holders.get(id(waiting.pop()), ()):
                if id(holder) not in found:
                    found[id(holder)] = holder
                    waiting.append(holder)
        return list(found.values())

    def locate(self, values: Iterable[tuple[Any, Any]]) -> dict[int, Any]:
        """Return the originals of the containers that hold what they held, by `id` of the record.

        Args:
            values: pairs of a recorded value and of what is in its place now.
        """
        originals: dict[int, Any] = {}
        changed: set[int] = set()
        waiting = list(values)
        while waiting:
            recorded, present = waiting.pop()
            if recorded.__class__ is not Container or recorded.identity != id(present):
                continue
            if id(recorded) in originals or id(recorded) in changed:
                continue
            if recorded.plain:
                if recorded.same(present):
                    originals[id(recorded)] = present
                else:
                    changed.add(id(recorded))
                continue
            keys, items, attributes = contents_of(present)
            if not recorded.matches(keys, items, attributes):
                changed.add(id(recorded))
                continue
            originals[id(recorded)] = present
            if issubclass(recorded.kind, set | frozenset):
                present_items = {id(item): item for item in items}
                items = [present_items[_identity(item)] for item in recorded.items]
            waiting += zip(recorded.items, items, strict=True)
            waiting += zip(recorded.keys or (), keys or (), strict=True)
            waiting += ((value, attributes[name]) for name, value in recorded.attributes.items())
        return originals

    def settle(self, values: Iterable[tuple[Any, Any]]) -> None:
        """Note which containers and tensors the call changed.

        Args:
            values: pairs of a recorded value and of what is in its place after the call.
        """
        if self.containers:
            originals = self.locate(values)
            for container in self.containers.values():
                container.changed = id(container) not in originals
        for state in self.tensors.values():
            state.settle()
        for iteration in self.iterations:
            if iteration.moved():
                kind = type(iteration.original).__name__
                raise ReversibleError(
                    f"a branch took something from a {kind} that an attribute holds, which its "
                    "replay could not find there again (of a cycle, nothing tells). Keep a list "
                    "and an index instead."
                )


def modules_in(values: Iterable[Any]) -> list[nn.Module]:
    """Return the modules among values, and in containers that are no modules themselves."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = list(values)
    while waiting and len(seen) < LARGEST:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            found.append(value)
        elif is_container(value.__class__) and id(value) not in seen:
            seen.add(id(value))
            if length_of(value) <= LARGEST:
                keys, items, attributes = contents_of(value)
                waiting += (*(keys or ()), *items, *attributes.values())
    return found
