"""Evaluations of layers that may be given up: what they changed is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._state.branch import Table, attributes_of, scripted_tables, tables_of
from .._state.contents import contents_kept
from .._state.random import RandomState, devices_of
from .._state.structure import hold
from .._state.tensors import TensorState, same_contents


class Trial:
    """The state before the first evaluation of a layer, which shows whether it can be converted.

    Args:
        layer: the layer.
        x: what it reads.
        keywords: what else it is given.
    """

    def __init__(self, layer: nn.Module, x: Tensor, keywords: Mapping[str, Any]) -> None:
        self._random = RandomState(devices_of([x]))
        modules = [module for module in layer.modules() if not _is_lazy(module)]
        self._attributes = [(module, dict(attributes_of(module)[0])) for module in modules]
        buffers = [table for module in modules for table in _buffers(module)]
        self._buffers = [(table, dict(table)) for table in buffers]
        found = [held for _, held in (*self._attributes, *self._buffers)]
        values = [value for held in (*found, keywords) for value in held.values()]
        self._refill = contents_kept(values)
        held = [value for held in found for value in held.values() if isinstance(value, Tensor)]
        # They take no memory for tensors that nobody writes to.
        self._tensors = [TensorState(tensor) for tensor in held]

    def take_back(self) -> None:
        """Put the modules, the keywords and the generators into the state before."""
        for module, found in self._attributes:
            for name in attributes_of(module)[0].keys() - found.keys():
                vars(module).pop(name)
            vars(module).update(found)
        for table, found in self._buffers:
            hold(table, found, frozenset())
        self._refill()
        with torch.no_grad():
            for state in self._tensors:
                tensor, before, version = state.tensor, state.copy, state.version
                # Batch norm does not count its writes. A needless one would be noticed elsewhere.
                if before is not None and not same_contents(tensor, before, version):
                    tensor.copy_(before)
        self._random.set()


def _is_lazy(module: nn.Module) -> bool:
    """Check for a module that its first call makes one of another class, which it must stay."""
    return any(is_lazy(tensor) for table in tables_of(module)[1:] for tensor in table.values())


def _buffers(module: nn.Module) -> list[Table]:
    """Return the dict of buffers of a module, or what a scripted one holds in C++."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted_tables(module) if scripted else [module._buffers]
