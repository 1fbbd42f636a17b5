"""Evaluations of layers that may be given up: what they changed is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._state.branch import attributes_of
from .._state.contents import contents_kept
from .._state.random import RandomState, devices_of
from .._state.structure import hold


class Trial:
    """The state before the first evaluation of a layer, which shows whether it can be converted.

    Args:
        layer: the layer.
        x: what it reads.
        keywords: what else it is given.
    """

    def __init__(self, layer: nn.Module, x: Tensor, keywords: Mapping[str, Any]) -> None:
        self._random = RandomState(devices_of([x]))
        modules = list(layer.modules())
        self._attributes = [(module, dict(attributes_of(module)[0])) for module in modules]
        self._buffers = [(module._buffers, dict(module._buffers)) for module in modules]
        found = [table for _, table in (*self._attributes, *self._buffers)]
        values = [value for table in (*found, keywords) for value in table.values()]
        self._refill = contents_kept(values)
        held = [value for table in found for value in table.values() if isinstance(value, Tensor)]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in held if _is_own(tensor)]

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
            for tensor, before in self._tensors:
                # Batch norm does not count its writes. A needless one would be noticed elsewhere.
                if not torch.equal(tensor, before):
                    tensor.copy_(before)
        self._random.set()


def _is_own(tensor: Tensor) -> bool:
    """Check whether a layer may write to a tensor that it holds, unnoticed by autograd."""
    return not (tensor.requires_grad or tensor.is_inference())
