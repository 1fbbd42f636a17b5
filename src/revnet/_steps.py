"""The primitive: one lifting step, and what it does to streams as they are held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._buffer import Remembering, divide, multiply
from ._couplings import Additive, Coupling, fitting, tree_map, tree_unzip
from ._errors import ReversibleError
from ._streams import Fixed, RangeMonitor, fixed_add, fixed_encode


class Step(nn.Module):
    """`streams[target] = coupling.combine(streams[target], fn(*streams[source], **kwargs))`.

    Args:
        fn: the branch: a module (or any callable) that reads the source streams and returns the update of the target,
            or `(update, aux)`. It must not change its inputs in place. None hands on the source itself (nothing, where
            there is none).
        target: index of the stream that is updated.
        source: index of the stream that `fn` reads, or several; by default stream 1, and none where `fn` is None. A
            step that reads its target cannot be undone, and keeps it.
        coupling: the rule of the update; `Additive()` by default.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None,
        target: int = 0,
        source: int | Sequence[int] | None = None,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__()
        if source is None:
            source = () if fn is None else 1
        self.fn = fn
        self.target = target
        self.source = (source,) if isinstance(source, int) else tuple(source)
        self.coupling = Additive() if coupling is None else coupling
        if fn is not None and not callable(fn):
            raise TypeError(f"Step: fn is {type(fn).__name__}, but a branch is a module or another callable")
        if not isinstance(self.coupling, Coupling):
            raise TypeError(f"Step: coupling is {self.coupling!r}, which is not a Coupling: did you leave out the ()?")
        if min((target, *self.source)) < 0:
            raise ValueError(f"Step: target {target}, source {self.source}: streams are counted from 0")

    def forward(self, *sources: Any, **kwargs: Any) -> Any:
        """The output of the branch as the coupling takes it."""
        if self.fn is not None:
            return self.coupling.receive(self.fn(*sources, **kwargs))
        return sources[0] if sources else None

    def extra_repr(self) -> str:
        return f"target={self.target}, source={self.source}"


# A stream under way is a pair: its value, which branches read and gradients flow through, and how it is held.
Stream = tuple[Any, Any]


class FloatArithmetic:
    """Steps on float streams, which are held as the tensors that branches read."""

    # Whether what is undone comes back in every bit.
    exact = False

    def open(self, value: Any) -> Stream:
        """The stream that starts as `value`; differentiable."""
        return value, value

    def undoes(self, coupling: Coupling) -> bool:
        """Whether `invert` may be relied on; if not, the step keeps its target."""
        return coupling.translates or coupling.rearranges or coupling.approximate

    def combine(self, coupling: Coupling, stream: Stream, out: Any, index: int) -> Stream:
        """The stream after step `index`; differentiable."""
        value = coupling.combine(stream[0], out)
        return value, value

    def invert(self, coupling: Coupling, held: Any, out: Any, layouts: Any) -> Stream:
        """The stream before a step; `layouts` describe its value."""
        value = coupling.invert(held, out)
        return value, value

    def read(self, held: Any, layouts: Any) -> Any:
        """The value of a stream that is held so."""
        return held


class FixedArithmetic:
    """Steps on fixed-point streams, which are held as integers and read as their decoded value.

    A target is multiplied by a ratio n/d of integers without loss: the remainder of its division by d goes to an
    information buffer, and what the multiplication by n leaves open is filled from there.

    Reference: Maclaurin et al. 2015, arXiv:1502.03492; MacKay et al. 2018, arXiv:1810.10999.
    """

    exact = True

    def __init__(self, fixed: Fixed, monitor: RangeMonitor | None) -> None:
        self.fixed = fixed
        self.monitor = monitor

    def open(self, value: Any) -> Stream:
        return tree_unzip(lambda leaf: fixed_encode(leaf, self.fixed, self.monitor), value)

    def undoes(self, coupling: Coupling) -> bool:
        return coupling.rearranges or (coupling.linear and (not coupling.scales or coupling.least_scale is not None))

    def combine(self, coupling: Coupling, stream: Stream, out: Any, index: int) -> Stream:
        value, held = stream
        if coupling.translates:
            increment = fitting(value, coupling.increment(out))
            value, counts = tree_unzip(
                lambda value, counts, increment: fixed_add(value, counts, increment, self.fixed, self.monitor, index),
                value,
                _counts(held),
                increment,
            )
            return value, _with_counts(held, counts)
        # The gradient is that of the rule on floats; the value, below, that of the integers.
        like = coupling.combine(value, out)
        if not self.undoes(coupling):
            return tree_unzip(lambda leaf: fixed_encode(leaf, self.fixed, self.monitor, index), like)
        with torch.no_grad():
            if coupling.rearranges:
                return like, _each(held, lambda part: coupling.combine(part, out))
            scale, least = coupling.scale(out), coupling.least_scale
            held = multiply(held, scale, least, self.fixed, self.monitor, index)
            exact, counts = tree_unzip(
                lambda count, increment, leaf: self.fixed.add(count, increment, leaf.dtype, self.monitor, index)[::-1],
                held.counts,
                coupling.increment(out),
                like,
            )
        return tree_map(_Valued.apply, like, exact), _with_counts(held, counts)

    def invert(self, coupling: Coupling, held: Any, out: Any, layouts: Any) -> Stream:
        if coupling.rearranges:
            return None, _each(held, lambda part: coupling.invert(part, out))
        counts, value = tree_unzip(
            lambda count, increment, layout: self.fixed.subtract(count, increment, layout.dtype),
            _counts(held),
            coupling.increment(out),
            layouts,
        )
        held = _with_counts(held, counts)
        if not coupling.scales:
            return value, held
        return None, divide(held, coupling.scale(out), coupling.least_scale, self.fixed)

    def read(self, held: Any, layouts: Any) -> Any:
        return tree_map(lambda held, layout: self.fixed.decode(held, layout.dtype), _counts(held), layouts)


def undo(
    streams: list[Any],
    fn: Callable[..., Any],
    target: int,
    source: tuple[int, ...],
    coupling: Coupling,
    kwargs: Mapping[str, Any],
) -> None:
    """Put the target before a step in place of the target after it; streams as floats, differentiable."""
    if target in source:
        raise ReversibleError(f"a step that reads its target, stream {target}, has no inverse")
    out = fn(*(streams[i] for i in source), **kwargs)
    streams[target] = coupling.invert(streams[target], branch_output(out, streams[target])[0])


def branch_output(out: Any, target: Any) -> tuple[Any, Any]:
    """What a branch returned, as `(update, aux)`; aux is None where there is none.

    A pair is `(update, aux)` unless the target itself is one.
    """
    if not isinstance(out, tuple) or len(out) != 2:
        return out, None
    if not isinstance(target, Tensor) and pytree.tree_structure(out) == pytree.tree_structure(target):
        return out, None
    return out


class _Valued(torch.autograd.Function):
    """The second of two tensors of equal shape, with the gradient of the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(like: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        return grads[0], None


def _counts(held: Any) -> Any:
    return held.counts if isinstance(held, Remembering) else held


def _with_counts(held: Any, counts: Any) -> Any:
    return replace(held, counts=counts) if isinstance(held, Remembering) else counts


def _each(held: Any, fn: Callable[[Any], Any]) -> Any:
    return held.map(fn) if isinstance(held, Remembering) else fn(held)
