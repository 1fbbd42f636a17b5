"""What an object holds: keys, items and attributes of containers, functions and plain objects."""

from __future__ import annotations

import enum
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from copy import copy
from functools import cache, partial
from typing import Any, Generic
from weakref import ReferenceType

import torch
from torch import Tensor, nn

# Types of which a value never changes, or is handed out as it is.
ATOMS = frozenset(
    [
        *map(type, (None, True, 0, 0.0, 0j, "", b"", ..., NotImplemented, range(0), slice(0))),
        *(type, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
        *(types.BuiltinFunctionType, types.ModuleType, types.CodeType),
    ]
)
SEQUENCES: tuple[Any, ...] = (list, tuple, set, frozenset, deque, bytearray)
BUILTIN: tuple[Any, ...] = (dict, OrderedDict, defaultdict, *SEQUENCES)
_SIZED: tuple[Any, ...] = (dict, *SEQUENCES)
_BASES = frozenset([*BUILTIN, object, Generic, types.SimpleNamespace])
# What a function reaches by its closure, its defaults, or an object to which it is bound.
_FUNCTIONS = frozenset([types.FunctionType, types.MethodType, types.CellType, partial])
FUNCTIONS = _FUNCTIONS | {ReferenceType}
# Classes of these packages hold locks, threads or memory that no copy of `__dict__` shares rightly.
# Those of the library itself are no part of what a branch computes.
_FOREIGN = frozenset({"asyncio", "concurrent", "logging", "multiprocessing", "threading", "torch"})
_FOREIGN |= {"weakref", "revnet"}
_OPEN = ("torch.distributions.", "torch.nn.utils.rnn")


@cache
def is_container(kind: Any) -> bool:
    """Check whether objects of a type are what their items and attributes are, and nothing else.

    So are the built-in containers, functions, and the classes that were written in Python on top of
    containers or of nothing, unless they say themselves how they are to be pickled or deleted.
    """
    if kind in _BASES or kind in FUNCTIONS:
        return kind not in (object, Generic)
    if issubclass(kind, enum.Enum | Tensor | nn.Module | type):
        return False
    if kind.__module__.partition(".")[0] in _FOREIGN and not kind.__module__.startswith(_OPEN):
        return False
    for base in kind.__mro__:
        own = {} if base in _BASES else vars(base)
        # The end of a copy would end what the original holds, a file, say.
        if "__del__" in own:
            return False
        pickled = "__reduce__" in own or "__reduce_ex__" in own
        if pickled and not issubclass(kind, BUILTIN):
            return False
    return _has_no_more(kind)


def _has_no_more(kind: Any) -> bool:
    """Check that no class written in C, beside the built-in ones, adds to what a type holds."""
    try:
        blank(kind)
    except TypeError:
        return False
    return True


def blank(kind: Any) -> Any:
    """Return a new object of a type that holds nothing."""
    for base in (*BUILTIN, types.SimpleNamespace, types.CellType):
        if issubclass(kind, base):
            return base.__new__(kind)
    return object.__new__(kind)


@cache
def slots_of(kind: Any) -> tuple[str, ...]:
    """Return the names of the slots of a class, as its objects have them."""
    names: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(names)


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots included."""
    found = dict(value.__dict__) if hasattr(value, "__dict__") else {}
    for name in slots_of(value.__class__):
        try:
            found[name] = object.__getattribute__(value, name)
        except AttributeError:
            continue
    return found


def contents_of(value: Any) -> tuple[list[Any] | None, list[Any], dict[str, Any]]:
    """Return the keys of a mapping, the items of a container, and its attributes."""
    kind = type(value)
    if kind in FUNCTIONS:
        return None, *_reached(value)
    attributes = {} if kind in BUILTIN else attributes_of(value)
    if isinstance(value, OrderedDict):
        # Its own order is not the one that `dict` sees.
        keys = list(OrderedDict.keys(value))
        return keys, [dict.__getitem__(value, key) for key in keys], attributes
    if isinstance(value, dict):
        return list(dict.keys(value)), list(dict.values(value)), attributes
    base = next((base for base in SEQUENCES if isinstance(value, base)), None)
    if base is not None:
        return None, list(base.__iter__(value)), attributes
    return None, [], attributes


def _reached(value: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return what a function reaches, as `function_with` takes it, and its attributes."""
    kind = type(value)
    if kind is types.FunctionType:
        items = [value.__defaults__, value.__kwdefaults__, *(value.__closure__ or ())]
        return items, value.__dict__.copy()
    if kind is partial:
        return [value.func, value.args, value.keywords], value.__dict__.copy()
    if kind is types.MethodType:
        return [value.__func__, value.__self__], {}
    if kind is ReferenceType:
        return [value()], {}
    try:
        return [value.cell_contents], {}
    except ValueError:
        # A variable that has no value.
        return [], {}


def options_of(value: Any) -> Any:
    """Return what a copy needs beside contents."""
    if isinstance(value, deque):
        return value.maxlen
    if isinstance(value, defaultdict):
        return value.default_factory
    if type(value) is types.FunctionType:
        return value.__code__, value.__globals__, value.__name__, value.__qualname__
    return None


def function_with(kind: Any, options: Any, items: list[Any]) -> Any:
    """Return a copy of a function that reaches these items."""
    if kind is types.FunctionType:
        defaults, named, *closure = items
        code, scope, name, qualified = options
        copy = types.FunctionType(code, scope, name, defaults, tuple(closure))
        copy.__kwdefaults__, copy.__qualname__ = named, qualified
        return copy
    if kind is partial:
        return partial(items[0], *items[1], **items[2])
    return kind(*items)


def is_constant(value: Any) -> bool:
    """Check whether a function reaches nothing that may change, as most do; or but a module."""
    kind = type(value)
    if kind is partial:
        given = (*value.args, *value.keywords.values())
        held = type(value.func) in ATOMS or is_constant(value.func)
        return held and not value.__dict__ and ATOMS.issuperset(map(type, given))
    if kind is types.MethodType:
        return isinstance(value.__self__, nn.Module | type) and is_constant(value.__func__)
    return (
        kind is types.FunctionType
        and value.__closure__ is None
        and not value.__dict__
        and ATOMS.issuperset(map(type, value.__defaults__ or ()))
        and ATOMS.issuperset(map(type, (value.__kwdefaults__ or {}).values()))
    )


def length_of(value: Any) -> int:
    """Return how many items and attributes a container has."""
    kind = type(value)
    if kind in BUILTIN:
        return len(value)
    if kind in FUNCTIONS:
        return 1
    # A class of the user's may count in another way.
    base = next((base for base in _SIZED if issubclass(kind, base)), None)
    items: int = 0 if base is None else base.__len__(value)
    return items + len(attributes_of(value))


def contents_kept(values: Iterable[Any]) -> Callable[[], None]:
    """Return a function that gives lists, dicts, sets and deques the items that they hold now.

    Args:
        values: containers, also in one another; other values, and subclasses, are left alone.
    """
    kept: dict[int, tuple[Any, Any]] = {}
    pending = list(values)
    while pending:
        value = pending.pop()
        if value.__class__ in _REFILLED and id(value) not in kept:
            kept[id(value)] = value, copy(value)
            pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            pending += value

    def refill() -> None:
        for value, before in kept.values():
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(before)

    return refill


_REFILLED = frozenset([list, dict, OrderedDict, defaultdict, set, deque])
