"""Neighbours: a pass that is given exactly what another returned goes on where that one stopped.

The second pass appends its steps to the tape of the first, which then keeps nothing between them,
and its fixed streams go on with what rounding left over: a chain computes what one program of all
steps computes, bit for bit.

What a pass left lies in a table by the identity of the tensors that it returned, and dies with any
of them. The tape is held weakly: it lives as long as the graph that needs it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from .._streams import tiled
from .._streams.arithmetic import FixedArithmetic, FloatArithmetic, Stream
from .._torch import counted_writes, saved_tensor_hooks, storage_id
from .._trees import tree_leaves
from .tape import Options, Tape

Arithmetic = FloatArithmetic | FixedArithmetic


class Mode(NamedTuple):
    """What both calls must have in common, beside the streams, to share a tape.

    Attributes:
        recording: whether the call records its steps.
        capturing: whether a CUDA graph captures it.
        fake: whether tensors have no memory.
        options: see `Options`.
    """

    recording: bool
    capturing: bool
    fake: bool
    options: Options


@dataclass(eq=False)
class _Left:
    """What a pass left for the next.

    Attributes:
        tensors: weak references to the tensors that stand for the streams.
        marks: theirs, by which writes are noticed; see `_mark`.
        structure: of the streams, as a list of trees.
        merged: how one tensor stands for two streams; None where they stand for themselves.
        format: of the streams, None for floats.
        rests: for each stream how it is held, without its value.
        tapes: that of the pass; none once another pass has gone on with it.
        position: the number of its steps.
        mode: see `Mode`.
        hooks: a weak reference to the hooks on saved tensors around the pass, None without any.
        arithmetic: how the streams are held.
        origin: of tensors that were split, what was left with the whole.
    """

    tensors: list[weakref.ref[Tensor]]
    marks: list[Any]
    structure: Any
    merged: Any
    format: Any
    rests: list[Any]
    tapes: list[weakref.ref[Tape]]
    position: int
    mode: Mode
    hooks: Any
    arithmetic: Arithmetic
    origin: weakref.ref[_Left] | None = None

    def state(self) -> list[Any] | None:
        """Return the streams as they are held; None if their tensors died or were written to."""
        tensors = [reference() for reference in self.tensors]
        if any(tensor is None for tensor in tensors) or not self.are(tensors, self.merged):
            return None
        found = [tensor.detach() for tensor in tensors if tensor is not None]
        if self.merged is None:
            values = pytree.tree_unflatten(found, self.structure)
        else:
            values = found[0].chunk(2, self.merged[1])
        pairs = zip(values, self.rests, strict=True)
        return [tiled.with_value(self.arithmetic, rest, value) for value, rest in pairs]

    def take(self, mode: Mode) -> Tape | None:
        """Return the tape for a call that begins now, if it may go on with it.

        Another pass over the same streams gets none.
        """
        if not mode.recording or self.mode != mode or not _are_around(self.hooks):
            return None
        try:
            # One operation: two threads may be given the same streams.
            tape = self.tapes.pop()()
        except IndexError:
            return None
        if tape is not None:
            origin = self if self.origin is None else self.origin()
            if origin is not None:
                tape.joints[self.position] = weakref.ref(origin)
        return tape

    def are(self, tensors: Sequence[Any], merged: Any) -> bool:
        """Check whether these are the tensors, unchanged."""
        return (
            self.merged == merged
            and len(tensors) == len(self.tensors)
            and all(ref() is tensor for ref, tensor in zip(self.tensors, tensors, strict=True))
            and self.marks == list(map(_mark, tensors))
        )


@dataclass
class Continued:
    """The streams before the next pass, as they are held, and the tape that it goes on with."""

    streams: list[Stream]
    tape: Tape | None
    position: int


# By the identity of the first tensor.
_LEFT: dict[int, _Left] = {}


def hand_on(streams: Sequence[Stream], arithmetic: Arithmetic, tape: Tape, mode: Mode) -> None:
    """Leave the streams after a pass for whoever is given exactly these tensors.

    Args:
        streams: those after the last step.
        arithmetic: how they are held.
        tape: of the pass.
        mode: of the pass.
    """
    format = _format(arithmetic)
    if mode.fake or (format is None and not (mode.recording and tape.follows_rebuilt())):
        # Float streams hold nothing beside their values, and no walk leads into a stored step.
        return
    values = [value for value, _ in streams]
    tensors = _tensors(values)
    if tensors:
        left = _Left(
            [],
            [],
            pytree.tree_structure(values),
            None,
            format,
            [tiled.rest(arithmetic, encoded) for _, encoded in streams],
            [weakref.ref(tape)],
            len(tape.records),
            mode,
            _hooks_around(),
            arithmetic,
        )
        _put(left, tensors, None)


def go_on(streams: Sequence[Any], arithmetic: Arithmetic, mode: Mode) -> Continued | None:
    """Return what a pass left with these streams, None where nothing fits."""
    if isinstance(streams[0], Tensor) and id(streams[0]) not in _LEFT:
        # Most calls: what follows, without its calls.
        return None
    tensors = _tensors(streams)
    left = _LEFT.get(id(tensors[0])) if tensors else None
    if (
        left is None
        or not left.are(tensors, None)
        or left.format != _format(arithmetic)
        or left.structure != pytree.tree_structure(list(streams))
    ):
        return None
    continued = [
        (value, tiled.with_value(arithmetic, rest, value))
        for value, rest in zip(streams, left.rests, strict=True)
    ]
    return Continued(continued, left.take(mode), left.position)


def stands_for_streams(tensor: Tensor, merged: Any) -> bool:
    """Check whether a tensor is what a pass made of its two streams."""
    left = _LEFT.get(id(tensor))
    return left is not None and left.are([tensor], merged)


def rename(tensors: Sequence[Any], merged: Any, others: Sequence[Any], others_merged: Any) -> None:
    """Have other tensors stand for streams: one that was merged of two, or the two again.

    Args:
        tensors: those that stand for the streams now.
        merged: how they were merged, None if they were not.
        others: those that will.
        others_merged: how those were merged.
    """
    left = _LEFT.get(id(tensors[0]))
    if left is not None and left.are(tensors, merged):
        # Both have the one list of tapes: one pass goes on, whichever it is given.
        origin = None if merged is None else weakref.ref(left)
        _put(replace(left, origin=origin), others, others_merged)


def _put(left: _Left, tensors: Sequence[Tensor], merged: Any) -> None:
    key = id(tensors[0])
    forget = partial(_forget, key)
    left.tensors = [weakref.ref(tensor, forget) for tensor in tensors]
    left.marks, left.merged = list(map(_mark, tensors)), merged
    _LEFT[key] = left


def _forget(key: int, reference: weakref.ref[Tensor]) -> None:
    """Drop what was left, as one of the tensors has died."""
    left = _LEFT.get(key)
    if left is not None and any(reference is ref for ref in left.tensors):
        _LEFT.pop(key, None)


def same_stream(mine: Any, given: Any) -> bool:
    """Check whether a block received the stream that the step before left, perhaps rewrapped."""
    if mine is given:
        return True
    if not isinstance(mine, Tensor):
        mine, spec = pytree.tree_flatten(mine)
        given, given_spec = pytree.tree_flatten(given)
        return bool(spec == given_spec) and all(
            same_stream(a, b) for a, b in zip(mine, given, strict=True)
        )
    return (
        isinstance(given, Tensor)
        and mine.dtype is given.dtype
        and mine.shape == given.shape
        and mine.stride() == given.stride()
        and mine.data_ptr() == given.data_ptr()
        and counted_writes(mine) == counted_writes(given)
    )


def _tensors(streams: Sequence[Any]) -> list[Tensor]:
    leaves = [leaf for stream in streams for leaf in tree_leaves(stream)]
    return leaves if all(isinstance(leaf, Tensor) for leaf in leaves) else []


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes when somebody writes to a tensor, or gives it other data."""
    return counted_writes(tensor), storage_id(tensor), tensor.shape, tensor.dtype


def _format(arithmetic: Arithmetic) -> Any:
    return arithmetic.fixed if isinstance(arithmetic, FixedArithmetic) else None


def _hooks_around() -> Any:
    """Return a weak reference to the hooks on saved tensors here: they may hold a graph."""
    hooks = saved_tensor_hooks()
    if hooks is None:
        return None
    pack = hooks[0]
    try:
        return weakref.WeakMethod(pack) if hasattr(pack, "__func__") else weakref.ref(pack)
    except TypeError:
        # Hooks that nothing may refer to are the same as no others.
        return _nothing


def _are_around(reference: Any) -> bool:
    """Check whether the hooks that were referred to are around what runs now."""
    hooks = saved_tensor_hooks()
    if reference is None or hooks is None:
        return reference is None and hooks is None
    return bool(reference() == hooks[0])


def _nothing() -> None:
    """Dead weak reference."""
