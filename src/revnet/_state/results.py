"""Results of single operations of a branch, which a replay takes instead of running them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .._errors import ReversibleError
from .._kept import Saved
from .._torch import is_faking, untraced
from .random import RandomState


class Results:
    """Outputs of some operations of one call, which a replay takes instead of running them again.

    Args:
        expensive: keep the outputs of matrix products, convolutions and attention: of what
            `torch.utils.flop_counter` counts, custom operators with a registered formula included.
        random: keep the outputs of operations that draw (of dropout, the mask). In a CUDA graph
            under capture the generator cannot be set back.
    """

    __slots__ = (
        "expensive",
        "random",
        "paused",
        "operations",
        "outputs",
        "states",
        "written",
        "saved",
    )

    def __init__(self, expensive: bool, random: bool) -> None:
        self.expensive = expensive
        self.paused = False
        self.random = random
        # The operators, with shapes and dtypes of what they were given.
        self.operations: list[tuple[Any, ...]] = []
        self.outputs: list[Any] = []
        # Generator states after operations that drew: a replay that skips the operation must still
        # move on.
        self.states: list[RandomState | None] = []
        self.written: set[int] = set()
        self.saved: Saved | None = None

    def keeps(self, func: Any, args: Any, kwargs: Any) -> bool:
        if self.expensive and _expensive(func):
            return True
        return self.random and draws(func, args, kwargs)

    def settle(self) -> None:
        """Hand the outputs to whoever manages saved tensors here."""
        self.saved = Saved(self.outputs)
        self.outputs = []


def _expensive(func: Any) -> bool:
    from torch.utils.flop_counter import flop_registry

    return func._overloadpacket in flop_registry


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Check whether a call of an operator takes random numbers: its rate may be zero."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    # A mode is not given the arguments that have their default values.
    values = {
        argument.name: argument.default_value
        for argument in func._schema.arguments
        if argument.has_default_value()
    }
    values.update((argument.name, value) for argument, value in arguments(func, args, kwargs))
    rates = [
        values[name]
        for name in ("p", "dropout_p", "dropout")
        if isinstance(values.get(name), float | int)
    ]
    return 0 not in rates and values.get("train", values.get("training")) is not False


@contextlib.contextmanager
def unrecorded(results: Results) -> Iterator[None]:
    """Leave out the operations inside: a branch that differentiates is replayed meanwhile."""
    paused, results.paused = results.paused, True
    try:
        yield
    finally:
        results.paused = paused


class RecordResults(TorchDispatchMode):
    """Runs a branch and keeps results."""

    def __init__(self, results: Results, devices: Sequence[torch.device]) -> None:
        super().__init__()
        self.results = results
        self.devices = devices

    @untraced
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = self.results
        if results.paused:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._protect(func, args, kwargs)
        if not results.keeps(func, args, kwargs):
            return func(*args, **kwargs)
        # Under a fake mode nothing is drawn, and what is read of generators has no values.
        drawing = not results.random and not is_faking() and draws(func, args, kwargs)
        before = RandomState(self.devices) if drawing else None
        out = func(*args, **kwargs)
        kept = pytree.tree_map_only(Tensor, Tensor.detach, out)
        if func is torch.ops.aten.native_dropout.default:
            kept = (None, kept[1])
        results.operations.append(_operation(func, args))
        results.outputs.append(kept)
        drew = before is not None and not before.same(RandomState(self.devices))
        results.states.append(RandomState(self.devices) if drew else None)
        return out

    def _protect(self, func: Any, args: Any, kwargs: Any) -> None:
        """Copy a kept result before an in-place operation of the branch writes to it."""
        written = {
            value.untyped_storage()._cdata
            for argument, value in arguments(func, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in pytree.tree_leaves(value)
            if isinstance(value, Tensor)
        }
        for i, out in enumerate(self.results.outputs):
            if i not in self.results.written and any(
                isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in written
                for leaf in pytree.tree_leaves(out)
            ):
                self.results.outputs[i] = pytree.tree_map_only(Tensor, Tensor.clone, out)
                self.results.written.add(i)


def arguments(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """The arguments of a call of an operator, as its schema describes them, each with its value."""
    schema = func._schema.arguments
    named = list(zip(schema, args, strict=False))
    return named + [
        (argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs
    ]


class ReplayResults(TorchDispatchMode):
    """Runs a branch again with the kept results in place of its expensive operations."""

    def __init__(self, results: Results, name: str) -> None:
        super().__init__()
        self.results = results
        self.name = name
        self.count = 0
        assert results.saved is not None, "the call has ended"
        self.outputs = results.saved.load()

    @untraced
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results, i = self.results, self.count
        if not results.keeps(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        self.count += 1
        operation = _operation(func, args)
        if i >= len(results.operations) or operation != results.operations[i]:
            forward = _text(results.operations[i]) if i < len(results.operations) else "none"
            raise ReversibleError(
                f"{self.name}: operation {i} among those whose results are kept is "
                f"{_text(operation)} in the replay but was {forward} in the forward pass."
            )
        state = results.states[i]
        if state is not None:
            state.set()
        if func is torch.ops.aten.native_dropout.default:
            mask, rate = self.outputs[i][1], args[1]
            scale = 0.0 if rate == 1.0 else 1.0 / (1.0 - rate)
            return torch.ops.aten.native_dropout_backward(args[0], mask, scale), mask.detach()
        if func._schema.is_mutable:
            # The operation gives what it is told to write to its shape.
            written: Tensor = (kwargs or {}).get("out", args[0])
            return written.resize_(self.outputs[i].shape).copy_(self.outputs[i])
        # A result that the branch goes on to overwrite is copied, so that the next replay finds it
        # as it was.
        again = Tensor.clone if i in results.written else Tensor.detach
        return pytree.tree_map_only(Tensor, again, self.outputs[i])

    def check(self) -> None:
        """Raise unless the replay used every result."""
        if self.count != len(self.results.operations):
            raise ReversibleError(
                f"{self.name}: the replay ran {self.count} operations whose results are kept where "
                f"the forward pass ran {len(self.results.operations)}."
            )


def _operation(func: Any, args: Any) -> tuple[Any, ...]:
    """Return an operator, with shapes and dtypes of the tensors that it is given."""
    # What it writes to by `out` may have any shape before.
    tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    return func, *((tuple(x.shape), x.dtype) for x in tensors)


def _text(operation: tuple[Any, ...]) -> str:
    func, *tensors = operation
    return f"{func} of {', '.join(f'{shape} {dtype}' for shape, dtype in tensors)}"
