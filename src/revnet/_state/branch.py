"""The modules of a step, and what belongs to them: the one visitor of a branch."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, MutableMapping
from fractions import Fraction
from functools import partial
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .._couplings import Additive

# What torch, and wrappers around a module, keep in its `__dict__` for themselves.
MACHINERY = frozenset(nn.Module().__dict__) - {"training"}
MACHINERY |= {"_compiled_call_impl", "_hf_hook", "_old_forward", "_is_fsdp_managed_module"}
# Where a converted layer finds its stack.
MACHINERY |= {"_revnet_place"}
# Where a class that conversion made finds the class before it.
OWN = "_revnet_own"
# Stands for what a module does not have: `None` is a value.
ABSENT: Any = object()


def owner_of(fn: nn.Module) -> nn.Module | None:
    """Return the module of the method that a step calls; None for other branches."""
    owner = getattr(vars(fn).get("fn"), "__self__", None)
    return owner if isinstance(owner, nn.Module) and owner is not fn else None


def modules_of(fn: nn.Module, coupling: nn.Module | None = None) -> list[nn.Module]:
    """Return every distinct module that a step may enter.

    They are those that the branch contains, where it is a step those of a method's own module, and
    those of the coupling.
    """
    found = [fn]
    owner = owner_of(fn)
    if owner is not None:
        found.append(owner)
    # An additive coupling holds nothing.
    if coupling is not None and type(coupling) is not Additive:
        found.append(coupling)
    seen = set(found)
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


# By `id` of a module: a reference to it, the length of its `__dict__`, and its attributes where
# they are numbers and the like, which hold nothing alive. Most modules have no others.
_simple: dict[int, tuple[weakref.ref[nn.Module], int, dict[str, Any]]] = {}
_SIMPLE = frozenset(
    map(type, (None, True, 0, 0.0, "", torch.float32, torch.device("cpu"), Fraction(1)))
)


def _is_simple(value: Any) -> bool:
    return type(value) in _SIMPLE or (type(value) is tuple and all(map(_is_simple, value)))


def attributes_of(module: nn.Module) -> tuple[dict[str, Any], bool]:
    """Return the attributes of a module that are neither parameters, buffers nor torch's own.

    Returns:
        The attributes, in the same dict as the last time where nothing has changed (not to be
        written to), and whether they are numbers and the like, of which no copy is needed.
    """
    own = module.__dict__
    known = _simple.get(id(module))
    if known is not None:
        reference, size, found = known
        present = map(own.get, found, repeat(ABSENT))
        same = len(own) == size and all(map(is_, present, found.values()))
        if same and reference() is module:
            return found, True
    found = {name: own[name] for name in own.keys() - MACHINERY}
    simple = all(map(_is_simple, found.values()))
    if simple:
        forget = partial(_simple.pop, id(module))
        _simple[id(module)] = weakref.ref(module, forget), len(own), found
    return found, simple


def own_class(kind: Any) -> Any:
    """Return the class from which conversion made this one; others are returned as they are."""
    while OWN in vars(kind):
        kind = vars(kind)[OWN]
    return kind


class ScriptTable(MutableMapping[str, Any]):
    """What a scripted or traced module holds in C++, under these names, as a dict."""

    def __init__(self, holder: Any, names: Collection[str]) -> None:
        self.holder = holder
        self.names = names

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.holder.getattr(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.holder.setattr(name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("a scripted module keeps the attributes that it was made with")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def copy(self) -> dict[str, Any]:
        """Return the present contents."""
        return dict(self)


class SlotTable(MutableMapping[str, Any]):
    """What a module holds in slots of its class, as a dict."""

    def __init__(self, module: nn.Module, names: Collection[str]) -> None:
        self.module = module
        self.names = names

    def __getitem__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self.module, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.module, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self.module, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.copy())

    def __len__(self) -> int:
        return len(self.copy())

    def copy(self) -> dict[str, Any]:
        """Return the present contents."""
        return {name: self[name] for name in self.names if name in self}


Table = dict[str, Any] | ScriptTable | SlotTable


def tables_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return children, parameters and buffers of a module.

    They are the module's own dicts; of a scripted one, where torch has none, they are copies.
    """
    children, parameters, buffers = module._modules, module._parameters, module._buffers
    if isinstance(module, torch.jit.ScriptModule):
        return dict(children.items()), dict(parameters.items()), dict(buffers.items())
    return children, parameters, buffers


def scripted_tables(module: Any) -> list[Table]:
    """Return buffers, and numbers and strings, that a scripted module holds in C++."""
    numbers = [
        name
        for name in (*module._concrete_type.get_attributes(), "training")
        if module._c.hasattr(name) and _is_simple(getattr(module, name, ...))
    ]
    buffers = module._buffers
    tables = ScriptTable(buffers._c, buffers.keys()), ScriptTable(module._c, numbers)
    return [table for table in tables if table.names]


def is_compiled(fn: nn.Module) -> bool:
    """Check whether a compiler has taken over a branch, or part of it.

    What stays of it until backward was the compiler's choice then. Nor could single results be
    kept: Dynamo compiles no function that it first meets under a dispatch mode, then or ever after.
    """
    return any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules
        for module in modules_of(fn)
    )


def unaliased(parameter: Any) -> Any:
    """Return the parameter of which a tensor in its place is a view, as tiles read it."""
    if type(parameter) is Tensor and isinstance(parameter._base, nn.Parameter):
        return parameter._base
    return parameter
