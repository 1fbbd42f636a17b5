"""What stays of a step until backward: tensors on the device or in host memory, results of some of its operations."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ._errors import ReversibleError
from ._state.call_state import RandomState, modules_of


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        # No view of the anchor, which FakeTensorMode would refuse.
        return torch.empty(0, device="cpu")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("never differentiated")


# Nodes that keep tensors hang on a tensor of their own: on the graph of the streams they would
# close a cycle in C++.
_ROOT = torch.zeros((), device="cpu", requires_grad=True)


class Saved:
    """Tensors kept where they are, under the saved-tensor hooks of whoever encloses the sequence."""

    __slots__ = ("anchor", "leaves", "spec")

    def __init__(self, tree: Any) -> None:
        leaves, self.spec = pytree.tree_flatten(tree)
        self.anchor: Tensor = _Keep.apply(
            _ROOT, *(leaf.detach() for leaf in leaves if isinstance(leaf, Tensor))
        )
        self.leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def load(self) -> Any:
        """The tensors, after autograd's own check that nobody wrote to them."""
        try:
            tensors = iter(self.anchor.grad_fn.saved_tensors)  # type: ignore[union-attr]
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise ReversibleError(
                "a stream that the sequence returned, and from which backward rebuilds the "
                "activations, was changed in place. Change a copy: `y = y.clone()`."
            ) from error
        leaves = [next(tensors) if other is None else other[0] for other in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


class Hosted:
    """Tensors copied to pinned host memory while compute goes on, and back when backward comes near.

    The copies of a device run in order on one stream, so that a buffer may go to its next user
    before its last copy has run. Buffers return to a pool: pinning memory anew in each call costs
    several times the step.
    """

    __slots__ = ("buffers", "spec", "devices", "coming")

    def __init__(self, tree: Any) -> None:
        leaves, self.spec = pytree.tree_flatten(tree)
        self.buffers: list[Tensor] = []
        self.devices = [leaf.device for leaf in leaves]
        self.coming: list[Tensor] | None = None
        for leaf in leaves:
            leaf = leaf.detach()
            stream = _copy_stream(leaf.device)
            buffer = _Pool.take(leaf)
            self.buffers.append(buffer)
            stream.wait_stream(torch.cuda.current_stream(leaf.device))
            with torch.cuda.stream(stream):
                buffer.copy_(leaf, non_blocking=True)
            leaf.record_stream(stream)

    def prefetch(self) -> None:
        """Start the copy back to the device."""
        if self.coming is not None:
            return
        self.coming = []
        for buffer, device in zip(self.buffers, self.devices, strict=True):
            tensor = torch.empty_strided(
                buffer.shape, buffer.stride(), dtype=buffer.dtype, device=device
            )
            stream = _copy_stream(device)
            # The memory may be in use by compute enqueued before the allocator gave it.
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                tensor.copy_(buffer, non_blocking=True)
            tensor.record_stream(stream)
            self.coming.append(tensor)

    def load(self) -> Any:
        """The tensors on their devices."""
        self.prefetch()
        arrived, self.coming = self.coming, None
        assert arrived is not None
        for device in set(self.devices):
            torch.cuda.current_stream(device).wait_stream(_copy_stream(device))
        return pytree.tree_unflatten(arrived, self.spec)

    def __del__(self) -> None:
        for buffer in self.buffers:
            _Pool.give(buffer)


class _Pool:
    """Pinned buffers not in use, by shape, strides and dtype."""

    free: ClassVar[defaultdict[Any, list[Tensor]]] = defaultdict(list)

    @staticmethod
    def take(like: Tensor) -> Tensor:
        free = _Pool.free[like.shape, like.stride(), like.dtype, like.device]
        if free:
            return free.pop()
        buffer = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, pin_memory=True)
        buffer.__dict__["device_of_copies"] = like.device
        return buffer

    @staticmethod
    def give(buffer: Tensor) -> None:
        device = buffer.__dict__["device_of_copies"]
        _Pool.free[buffer.shape, buffer.stride(), buffer.dtype, device].append(buffer)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


class Results:
    """Outputs of some operations of one call of a branch, which a replay takes instead of running them again.

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
        "functions",
        "outputs",
        "states",
        "written",
        "saved",
    )

    def __init__(self, expensive: bool, random: bool) -> None:
        self.expensive = expensive
        self.paused = False
        self.random = random
        self.functions: list[Any] = []
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


def compiled(fn: Any) -> bool:
    """Whether a compiler has taken over a branch, or part of it: what stays of it until backward was its choice.

    Nor could single results be kept: Dynamo compiles no function that it first meets under a
    dispatch mode, then or ever after.
    """
    return any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules
        for module in modules_of(fn)
    )


def _expensive(func: Any) -> bool:
    from torch.utils.flop_counter import flop_registry

    return func._overloadpacket in flop_registry


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of an operator takes random numbers: attention kernels, too, are usually asked for no dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    values = {argument.name: value for argument, value in arguments(func, args, kwargs)}
    rates = [
        values[name]
        for name in ("p", "dropout_p", "dropout")
        if isinstance(values.get(name), float | int)
    ]
    return 0 not in rates and values.get("train", values.get("training")) is not False


@contextlib.contextmanager
def unrecorded(results: Results) -> Iterator[None]:
    """Operations inside are no part of the call: a branch that differentiates makes the engine replay it meanwhile."""
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = self.results
        if results.paused:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._protect(func, args, kwargs)
        if not results.keeps(func, args, kwargs):
            return func(*args, **kwargs)
        before = (
            RandomState(self.devices) if not results.random and draws(func, args, kwargs) else None
        )
        out = func(*args, **kwargs)
        kept = pytree.tree_map_only(Tensor, Tensor.detach, out)
        if func is torch.ops.aten.native_dropout.default:
            kept = (None, kept[1])
        results.functions.append(func)
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results, i = self.results, self.count
        if not results.keeps(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        self.count += 1
        if i >= len(results.functions) or func is not results.functions[i]:
            raise ReversibleError(
                f"{self.name}: operation {i} among those whose results are kept is {func} in the "
                f"replay but was {results.functions[i] if i < len(results.functions) else 'none'} "
                f"in the forward pass."
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
