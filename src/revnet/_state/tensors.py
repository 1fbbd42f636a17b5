"""Tensors without gradient that a branch may write to, such as buffers, as a call found them.

To copy each of them before each call would cost more than the step where they are large, and most
are never written to. So a copy is made by the first write: `lazy_clone` lets two tensors share
memory until then, and also notices writes that leave no version, such as those to `.data` or to the
statistics of batch norm.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._torch import data_address, is_capturing, is_plain, lazy_clone, storage_id

# Tensors that the last call has written to, by `id`. They are copied before the next call, so that
# their address stays: memory that is shared until it is written to moves at the write.
_written: dict[int, weakref.ref[Tensor]] = {}

# Of elements. To copy fewer at once costs no more than to watch them, and leaves them in place.
# After a call that left them alone, one copy serves all calls until somebody writes to the tensor.
_SMALL = 512

# Copies of small tensors, with the version and the address of the tensor at which they are right.
_small: dict[int, tuple[weakref.ref[Tensor], Tensor, int, int]] = {}

# Copies of tensors that were read by their address, which is taken for a write: attention kernels
# read masks so. A copy serves until the tensor has another version or another address.
_shadows: dict[int, tuple[weakref.ref[Tensor], Tensor, int, int]] = {}


def _until_freed(table: dict[int, Any], tensor: Tensor) -> weakref.ref[Tensor]:
    """Return a reference to a tensor with which its entry in a table ends."""
    key = id(tensor)
    return weakref.ref(tensor, lambda _: table.pop(key, None))


class TensorState:
    """One tensor as a call found it.

    Attributes:
        tensor: the tensor; without its graph where it had one, since a record must not hold a graph
            that may hold the record.
        keyword: whether the step was given it.
        attached: whether it had a graph.
        flag: whether it took a gradient.
        elsewhere: whether it belongs to a module that holds the branch, and others may write to it.
        copy: its contents before the call, or None where the call did not write to it.
        version: its version, None where writes to it are no matter, since there is a copy.
    """

    __slots__ = (
        "tensor",
        "keyword",
        "attached",
        "flag",
        "elsewhere",
        "copy",
        "version",
        "_address",
        "_shared",
        "_original",
    )

    def __init__(self, tensor: Tensor, keyword: bool = False, eager: bool = True) -> None:
        self.keyword = keyword
        self.attached = tensor.grad_fn is not None
        self._original: Any = None
        if self.attached:
            self._original = weakref.ref(tensor)
            tensor = tensor.detach().requires_grad_()
        self.tensor = tensor
        self.flag = tensor.requires_grad
        self.elsewhere = False
        self.copy: Tensor | None = None
        self._address: int | None = None
        # Shares the memory until somebody writes to it after the call.
        self._shared: Tensor | None = None
        # A tensor of inference mode has no version: nothing outside of that mode writes to it. A
        # lazy module gives its buffers memory in its first call.
        self.version = None if is_lazy(tensor) or tensor.is_inference() else tensor._version
        if not keyword:
            self.protect(eager)

    @property
    def original(self) -> Tensor | None:
        """The tensor itself, None where it had a graph and is gone."""
        original: Tensor | None = self.tensor if self._original is None else self._original()
        return original

    def protect(self, eager: bool = True) -> None:
        """Keep the contents, unless it takes a gradient: then nobody may write to it.

        Args:
            eager: copy at once what an earlier call has written to.
        """
        tensor = self.tensor
        if self.copy is not None or self.version is None or tensor.requires_grad:
            return
        shadow = _shadows.get(id(tensor))
        if shadow is not None and shadow[2:] == (tensor._version, data_address(tensor)):
            self.copy = shadow[1]
            return
        known = _small.get(id(tensor))
        if known is not None and known[2:] == (tensor._version, data_address(tensor)):
            self.copy, self._address = known[1], known[3]
            return
        written = eager and id(tensor) in _written
        small = tensor.is_cpu and tensor.numel() <= _SMALL
        if written or small or not is_plain(tensor) or is_capturing():
            self.copy = _copied(tensor)
            return
        try:
            self.copy = lazy_clone(tensor)
            self._address = data_address(tensor)
        except (RuntimeError, NotImplementedError):
            # Memory that torch did not allocate, of NumPy or shared between processes, say.
            self.copy = _copied(tensor)

    def settle(self) -> None:
        """Note whether the call wrote to the tensor; give the copy back if it did not."""
        tensor, copy = self.tensor, self.copy
        if self.version is None:
            if not is_lazy(tensor) and not tensor.is_inference() and not self.keyword:
                # A lazy buffer has memory now; a replay starts from what it holds.
                self.copy = _copied(tensor)
            return
        if copy is None:
            return
        written = tensor._version != self.version
        if self._address is not None and data_address(tensor) != self._address:
            if not written and torch.equal(copy, tensor):
                reference = _until_freed(_shadows, tensor)
                _shadows[id(tensor)] = reference, copy, self.version, data_address(tensor)
            else:
                written = True
        elif self._address is None and not written:
            # A write may have left no version. To compare on other devices would wait for them:
            # there, what was written once counts as written in every call.
            if tensor.is_cpu:
                written = not same_contents(tensor, copy, self.version)
            else:
                written = id(tensor) in _written
            if not written:
                # The next call need not copy it: tables are often filled in one call.
                _written.pop(id(tensor), None)
        if written:
            _small.pop(id(tensor), None)
            _written[id(tensor)] = _until_freed(_written, tensor)
            self.version = None
        else:
            self.copy = None
            if self._address is not None and data_address(tensor) == self._address:
                self._shared = copy
            else:
                self._watch()

    def _watch(self) -> None:
        """Notice writes after the call that leave no version, as those to `.data`."""
        tensor = self.tensor
        if id(tensor) in _shadows or not is_plain(tensor) or is_capturing():
            return
        try:
            shared = self._shared = lazy_clone(tensor)
            address = self._address = data_address(tensor)
        except (RuntimeError, NotImplementedError):
            self._shared = None
            return
        if tensor.is_cpu and tensor.numel() <= _SMALL:
            _small[id(tensor)] = _until_freed(_small, tensor), shared, tensor._version, address

    def contents(self) -> Tensor | None:
        """Return what the call found, None where the tensor still holds that."""
        shared = self._shared
        if shared is not None and data_address(self.tensor) != self._address:
            return shared
        return self.copy

    def changed(self) -> bool:
        """Check whether somebody wrote to a tensor that the call left alone."""
        if self.version is None or self.tensor._version == self.version:
            return False
        return not self.elsewhere or self.contents() is None


def same_contents(tensor: Tensor, copy: Tensor, version: int | None) -> bool:
    """Check whether a tensor holds what it held at a version, when the copy was made."""
    if tensor.layout != torch.strided or tensor.is_nested:
        # Torch compares no others, and counts the writes to these.
        return tensor._version == version
    return torch.equal(copy, tensor)


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy that has, of a view, the whole memory behind it."""
    tensor = tensor.detach()
    if not is_plain(tensor) or tensor.layout != torch.strided or _is_whole(tensor):
        return tensor.clone()
    return _view(_memory(tensor).clone(), tensor)


def _is_whole(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _memory(tensor: Tensor) -> Tensor:
    """Return the whole memory behind a tensor, as bytes."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage())


def _view(memory: Tensor, like: Tensor) -> Tensor:
    """Return the part of other memory that `like` is of its own."""
    view = torch.empty(0, dtype=like.dtype, device=like.device).set_(
        memory.untyped_storage(), like.storage_offset(), like.shape, like.stride()
    )
    if like.is_conj():
        view = view.conj()
    return torch._neg_view(view) if like.is_neg() else view


def replacements(states: Iterable[TensorState]) -> dict[int, Tensor]:
    """Return what a replay reads in place of tensors that the call wrote to, by `id` of the state.

    Tensors that shared memory share it again: a buffer that is a view of another stays one.
    """
    states = list(states)
    if not any(state.contents() is not None for state in states):
        return {}
    by_memory: dict[int, list[TensorState]] = {}
    for state in states:
        if not state.tensor.requires_grad:
            by_memory.setdefault(storage_id(state.tensor), []).append(state)
    made: dict[int, Tensor] = {}
    for sharing in by_memory.values():
        copies = (state.contents() for state in sharing)
        copy = next((copy for copy in copies if copy is not None), None)
        if copy is None:
            continue
        if len(sharing) == 1:
            made[id(sharing[0])] = copy.clone()
            continue
        memory = _memory(copy).clone()
        made |= {id(state): _view(memory, state.tensor) for state in sharing}
    return made
