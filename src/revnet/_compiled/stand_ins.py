"""Stand-ins for the modules of a branch, without memory, on which it can be tried."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .._state.branch import MACHINERY
from .._state.copies import Copies
from .._state.objects import Container, Objects

_MISSING = object()


def size_of(size: Any) -> int:
    """A dimension as a number; for a symbol the one it was made from, without a guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def imitate(x: Tensor, mode: FakeTensorMode) -> Tensor:
    shape, strides = [size_of(n) for n in x.shape], [size_of(n) for n in x.stride()]
    with mode:
        imitated = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
    if isinstance(x, nn.Parameter):
        return nn.Parameter(imitated, x.requires_grad)
    return imitated


def stand_in_for(
    module: nn.Module,
    copies: dict[nn.Module, nn.Module],
    tensors: dict[Tensor, Tensor],
    mode: FakeTensorMode,
) -> nn.Module:
    """The module with its own attributes, and parameters and buffers without memory."""
    if module in copies:
        return copies[module]
    copied = copies[module] = type(module).__new__(type(module))
    copied.__dict__ = dict(module.__dict__)
    copied.__dict__["_compiled_call_impl"] = None
    for kind in ("_parameters", "_buffers"):
        copied.__dict__[kind] = {
            name: None if value is None else tensors.setdefault(value, imitate(value, mode))
            for name, value in module.__dict__[kind].items()
        }
    copied.__dict__["_modules"] = {
        name: None if child is None else stand_in_for(child, copies, tensors, mode)
        for name, child in module.__dict__["_modules"].items()
    }
    return copied


class Held:
    """What stand-ins hold: containers as copies of the user's own, which a run may change.

    Args:
        modules: the stand-ins.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        own = [self._attributes(module) for module in self.modules]
        taken = Objects()
        recorded = [taken.take_keywords(found) for found in own]
        # The tensors themselves: under FakeTensorMode a detached one would have no memory.
        tensors = {id(state): state.original for state in taken.tensors.values()}
        # One memo for all modules: what two of them share stays shared.
        fresh = Copies(taken, {key: x for key, x in tensors.items() if x is not None}, {})
        for module, found in zip(self.modules, recorded, strict=True):
            for name, value in found.items():
                if value.__class__ is Container:
                    module.__dict__[name] = fresh.make(value)
        self.before = [self._attributes(module) for module in self.modules]
        self.objects = Objects()
        self.recorded = [self.objects.take_keywords(found) for found in self.before]

    @staticmethod
    def _attributes(module: nn.Module) -> dict[str, Any]:
        own = {k: v for k, v in module.__dict__.items() if k not in MACHINERY}
        return {**own, **module._buffers}

    def changed(self) -> str | None:
        """Return the name of the first attribute that the run changed, or what it holds."""
        present = [self._attributes(module) for module in self.modules]
        for before, now in zip(self.before, present, strict=True):
            for name in before.keys() | now.keys():
                if before.get(name, _MISSING) is not now.get(name, _MISSING):
                    return name
        pairs = [
            (name, value, now[name])
            for found, now in zip(self.recorded, present, strict=True)
            for name, value in found.items()
        ]
        same = self.objects.locate((value, now) for _, value, now in pairs)
        changed = [c for c in self.objects.containers.values() if id(c) not in same]
        holders = [*changed, *self.objects.containing(changed)]
        names = (name for name, value, _ in pairs if any(value is holder for holder in holders))
        return next(names, None)
