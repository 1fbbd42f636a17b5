"""What a step does to streams as they are held, and how that is undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .._couplings import Additive, Coupling, fitting
from .._factors import signed
from .._torch import without_tangents
from .._trees import tree_map, tree_unzip
from . import scaled
from .autograd import fixed_add, fixed_encode, with_gradient_of
from .buffer import (
    BufferedStream,
    divide,
    multiply,
    multiply_and_add,
    subtract_and_divide,
)
from .fixed import Fixed
from .format import Held
from .monitor import RangeMonitor

# A stream under way is a pair: its value, which branches read and gradients flow through, and how
# it is held.
Stream = tuple[Any, Any]


class FloatArithmetic:
    """Steps on float streams, which are held as the tensors that branches read."""

    # Whether what is undone comes back in every bit.
    exact = False

    def encode(self, value: Any) -> Stream:
        """The stream that starts as `value`; differentiable."""
        return value, value

    def undoes(self, coupling: Coupling) -> bool:
        """Whether `invert` may be relied on; if not, the step keeps its target."""
        return coupling.translates or coupling.rearranges or coupling.approximate

    def combine(self, coupling: Coupling, stream: Stream, out: Any, index: int) -> Stream:
        """The stream after step `index`; differentiable."""
        value = stream[0]
        if (
            type(coupling) is Additive
            and isinstance(value, Tensor)
            and isinstance(out, Tensor)
            and value.dtype is out.dtype
            and value.shape == out.shape
            and value.device == out.device
        ):
            # Most steps: what the rule does, without its calls.
            value = value + out
        else:
            value = coupling.combine(value, out)
        return value, value

    def invert(self, coupling: Coupling, held: Any, out: Any) -> Stream:
        """The stream before a step."""
        value = coupling.invert(held, out)
        return value, value

    def hold(self, value: Tensor) -> Tensor:
        """Return how the stream that starts as `value` is held: `encode` inside a Function."""
        return value

    def add(self, held: Tensor, increment: Tensor, index: int) -> Tensor:
        """Return the stream after an additive step: `combine` inside a Function."""
        return held + increment.to(held.dtype)

    def subtract(self, held: Tensor, increment: Tensor) -> Tensor:
        """Return the stream before an additive step; differentiable outside of graphs."""
        return held - increment.to(held.dtype)

    def read(self, held: Any) -> Any:
        """The value of a stream that is held so."""
        return held

    def rest(self, held: Any) -> Any:
        """Return how a stream is held, without its value: nothing."""
        return None

    def held(self, rest: Any, value: Any) -> Any:
        """Return the stream of which `rest` was returned, with this value."""
        return value


class FixedArithmetic:
    """Steps on fixed-point streams, held as the values that branches read and integers left over.

    A target is multiplied by a ratio n/d of integers without loss: the remainder of its division by
    d goes to an information buffer, and what the multiplication by n leaves open is filled from
    there.

    Reference: Maclaurin et al. 2015, arXiv:1502.03492; MacKay et al. 2018, arXiv:1810.10999.
    """

    exact = True

    def __init__(self, fixed: Fixed, monitor: RangeMonitor | None) -> None:
        self.fixed = fixed
        self.monitor = monitor

    def encode(self, value: Any, index: int = -1) -> Stream:
        held = Held(
            *tree_unzip(lambda leaf: fixed_encode(leaf, self.fixed, self.monitor, index), value)
        )
        return held.value, held

    def undoes(self, coupling: Coupling) -> bool:
        return coupling.rearranges or (
            coupling.linear and (not coupling.scales or coupling.least_scale is not None)
        )

    def combine(self, coupling: Coupling, stream: Stream, out: Any, index: int) -> Stream:
        value, held = stream
        if (
            type(coupling) is Additive
            and held.__class__ is Held
            and isinstance(value, Tensor)
            and isinstance(out, Tensor)
            and value.dtype is out.dtype
            and value.shape == out.shape
            and value.device == out.device
        ):
            # Most steps: what follows, without its calls.
            held = fixed_add(
                held._replace(value=value) if held.value is not value else held,
                out,
                self.fixed,
                self.monitor,
                index,
            )
            return held.value, held
        if coupling.translates:

            def add(held: Held, increment: Tensor) -> Held:
                return fixed_add(held, increment, self.fixed, self.monitor, index)

            held = _added(held, value, fitting(value, coupling.increment(out)), add)
            return _stream(held).value, held
        if ratio := self._ratio(coupling, out):
            increment = fitting(value, coupling.increment(out))
            held = _signed(held, value, coupling.sign(out))
            held = multiply_and_add(held, ratio, increment, self.fixed, self.monitor, index)
            return held.stream.value, held
        # The gradient is that of the rule on floats; the value, below, that of the fixed-point
        # numbers.
        like = coupling.combine(value, out)
        if not self.undoes(coupling):
            return self.encode(like, index)
        with torch.no_grad(), without_tangents():
            if coupling.rearranges:
                return like, _moved(held, lambda part: coupling.combine(part, out), like)
            held = _signed(held, value, coupling.sign(out))
            held = multiply(
                held, coupling.scale(out), coupling.least_scale, self.fixed, self.monitor, index
            )

            def add(held: Held, increment: Tensor) -> Held:
                return self.fixed.add(held, increment, self.monitor, index)

            held = _added(held, held.stream.value, coupling.increment(out), add)
        return tree_map(with_gradient_of, like, held.stream.value), held

    def invert(self, coupling: Coupling, held: Any, out: Any) -> Stream:
        value = _stream(held).value
        if coupling.rearranges:
            held = _moved(
                held, lambda part: coupling.invert(part, out), coupling.invert(value, out)
            )
        elif ratio := self._ratio(coupling, out):
            held = subtract_and_divide(held, ratio, coupling.increment(out), self.fixed)
            held = _signed(held, _stream(held).value, coupling.sign(out))
        else:
            held = _added(held, value, coupling.increment(out), self.fixed.subtract)
            if coupling.scales:
                held = divide(held, coupling.scale(out), coupling.least_scale, self.fixed)
                held = _signed(held, _stream(held).value, coupling.sign(out))
        return _stream(held).value, held

    def hold(self, value: Tensor) -> Held:
        return Held(*self.fixed.encode(value, self.monitor))

    def add(self, held: Held, increment: Tensor, index: int) -> Held:
        return Held(*self.fixed.add(held, increment, self.monitor, index))

    def subtract(self, held: Held, increment: Tensor) -> Held:
        if torch.compiler.is_compiling():
            return Held(*self.fixed.subtract(held, increment))
        # The same numbers, and differentiable.
        return Held(*fixed_add(held, -increment, self.fixed))

    def read(self, held: Any) -> Any:
        return _stream(held).value

    def rest(self, held: Any) -> Any:
        """Return how a stream is held, without its value."""
        return self.held(held, None)

    def held(self, rest: Any, value: Any) -> Any:
        """Return the stream of which `rest` was returned, with this value."""
        return _signed(rest, value, None)

    def _ratio(self, coupling: Coupling, out: Any) -> Fraction | None:
        """Return the constant factor of a rule whose steps are computed in one pass, else None."""
        if not (coupling.scales and coupling.linear and isinstance(coupling.least_scale, Fraction)):
            return None
        with torch.no_grad():
            scale = coupling.scale(out)
        if not isinstance(scale, Fraction):
            return None
        return scale if scaled.takes(scale.numerator, scale.denominator, self.fixed) else None


def _stream(held: Any) -> Held:
    stream: Held = held.stream if isinstance(held, BufferedStream) else held
    return stream


def _signed(held: Any, value: Any, sign: Tensor | None) -> Any:
    """Return a held stream, read as this value, which has a gradient, times 1 or -1."""
    residual = _stream(held).residual
    if sign is not None:
        # A stream holds no minus zero.
        value = tree_map(lambda leaf: leaf + 0.0, signed(value, sign))
        residual = signed(residual, sign)
    stream = Held(value, residual)
    return replace(held, stream=stream) if isinstance(held, BufferedStream) else stream


def _added(held: Any, value: Any, increment: Any, add: Callable[[Held, Tensor], Held]) -> Any:
    """Held, read as this value, after `add` of each of its tensors and its increment."""
    stream = Held(
        *tree_unzip(
            lambda value, residual, leaf: add(Held(value, residual), leaf),
            value,
            _stream(held).residual,
            increment,
        )
    )
    return replace(held, stream=stream) if isinstance(held, BufferedStream) else stream


def _moved(held: Any, move: Callable[[Any], Any], value: Any) -> Any:
    """Held, read as this value, its integers moved likewise."""
    return (
        held.map(move, value)
        if isinstance(held, BufferedStream)
        else Held(value, move(held.residual))
    )
