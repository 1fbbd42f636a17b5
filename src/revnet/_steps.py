"""The primitive: one lifting step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ._couplings import Additive, Coupling, fitting, tree_map, tree_unzip
from ._streams import Fixed, RangeMonitor, fixed_add, fixed_encode


class Step(nn.Module):
    """`streams[target] = coupling.combine(streams[target], fn(*streams[source], **kwargs))`.

    Args:
        fn: the branch: a module (or any callable) that reads the source streams and returns the update of the target,
            or `(update, aux)`. It must not change its inputs in place.
        target: index of the stream that is updated.
        source: index of the stream that `fn` reads, or several, or none. To be inverted, a step does not read its
            target.
        coupling: the rule of the update; `Additive()` by default.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        target: int = 0,
        source: int | Sequence[int] = 1,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__()
        self.fn = fn
        self.target = target
        self.source = (source,) if isinstance(source, int) else tuple(source)
        self.coupling = Additive() if coupling is None else coupling

    def extra_repr(self) -> str:
        return f"target={self.target}, source={self.source}"


# A stream under way is a pair: its value, which branches read and gradients flow through, and how it is held.
Stream = tuple[Any, Any]


class FloatArithmetic:
    """Steps on float streams, which are held as the tensors that branches read."""

    def open(self, value: Any) -> Stream:
        """The stream that starts as `value`; differentiable."""
        return value, value

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

    Reference: MacKay et al. 2018, arXiv:1810.10999.
    """

    def __init__(self, fixed: Fixed, monitor: RangeMonitor) -> None:
        self.fixed = fixed
        self.monitor = monitor

    def open(self, value: Any) -> Stream:
        return tree_unzip(lambda leaf: fixed_encode(leaf, self.fixed, self.monitor), value)

    def combine(self, coupling: Coupling, stream: Stream, out: Any, index: int) -> Stream:
        if coupling.translates:
            increment = fitting(stream[0], coupling.increment(out))
            return tree_unzip(
                lambda *leaves: fixed_add(*leaves, self.fixed, self.monitor, index), stream[0], stream[1], increment
            )
        return tree_unzip(
            lambda leaf: fixed_encode(leaf, self.fixed, self.monitor, index), coupling.combine(stream[0], out)
        )

    def invert(self, coupling: Coupling, held: Any, out: Any, layouts: Any) -> Stream:
        held, value = tree_unzip(
            lambda held, increment, layout: self.fixed.subtract(held, increment, layout.dtype),
            held,
            coupling.increment(out),
            layouts,
        )
        return value, held

    def read(self, held: Any, layouts: Any) -> Any:
        return tree_map(lambda held, layout: self.fixed.decode(held, layout.dtype), held, layouts)
