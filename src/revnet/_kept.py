"""Tensors that stay until backward, on the device or in host memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._errors import ReversibleError
from ._torch import untraced, version_of


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
    """Tensors kept where they are, under the hooks of whoever encloses the sequence."""

    __slots__ = ("anchor", "leaves", "spec")

    def __init__(self, tree: Any) -> None:
        self.leaves: list[tuple[Any] | None] = []
        self.spec: Any = None
        tensors: Iterable[Tensor] = (tree,)
        if not isinstance(tree, Tensor):
            leaves, self.spec = pytree.tree_flatten(tree)
            self.leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.anchor: Tensor = _Keep.apply(_ROOT, *map(Tensor.detach, tensors))

    def load(self) -> Any:
        """The tensors, after autograd's own check that nobody wrote to them."""
        try:
            tensors = iter(self.anchor.grad_fn.saved_tensors)  # type: ignore[union-attr]
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise ReversibleError(_WRITTEN) from error
        if self.spec is None:
            return next(tensors)
        leaves = [next(tensors) if other is None else other[0] for other in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


class Referenced:
    """Tensors kept by reference, past all hooks, and checked by their versions.

    Args:
        tree: the tensors, which hold no graph.
        exposed: those among them to which somebody may write.
    """

    __slots__ = ("tree", "exposed", "versions")

    def __init__(self, tree: Any, exposed: list[Tensor]) -> None:
        self.tree = tree
        self.exposed = exposed
        self.versions = list(map(version_of, exposed))

    def load(self) -> Any:
        """Return the tensors, after a check that nobody wrote to them."""
        if self.versions != list(map(version_of, self.exposed)):
            raise ReversibleError(_WRITTEN)
        return self.tree


_WRITTEN = (
    "a stream that the sequence returned, and from which backward rebuilds the activations, was "
    "changed in place. Change a copy: `y = y.clone()`."
)


class Hosted:
    """Tensors in pinned host memory, copied there and back while compute goes on.

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

    @untraced
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
