"""What a step does to streams as they are held, and how that is undone."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .._couplings import Additive, Coupling, fitting
from .._factors import factor_of, signed
from .._torch import without_tangents
from .._trees import tree_map, tree_unzip
from .autograd import fixed_add, fixed_encode, save_product
from .buffer import BufferedStream, multiply_and_add, subtract_and_divide
from .fixed import Fixed
from .format import Encoded
from .monitor import RangeMonitor

# Types of a stream and of what a branch returns whose sum has the type of the stream.
_WIDENED = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}

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
            and (value.dtype is out.dtype or (value.dtype, out.dtype) in _WIDENED)
            and value.shape == out.shape
            and value.device == out.device
        ):
            # Most steps: what the rule does, without its calls.
            value = value + out
        else:
            value = coupling.combine(value, out)
        return value, value

    def invert(self, coupling: Coupling, encoded: Any, out: Any) -> Stream:
        """The stream before a step."""
        if (
            type(coupling) is Additive
            and isinstance(encoded, Tensor)
            and isinstance(out, Tensor)
            and (encoded.dtype is out.dtype or (encoded.dtype, out.dtype) in _WIDENED)
        ):
            value: Any = encoded - out
        else:
            value = coupling.invert(encoded, out)
        return value, value

    def save(self, coupling: Coupling, value: Any, out: Any) -> None:
        """Save for backward what `combine` saves."""
        coupling.combine(value, out)

    def hold(self, value: Tensor) -> Tensor:
        """Return how the stream that starts as `value` is held: `encode` inside a Function."""
        return value

    def add(self, encoded: Tensor, increment: Tensor, index: int) -> Tensor:
        """Return the stream after an additive step: `combine` inside a Function."""
        return encoded + increment.to(encoded.dtype)

    def subtract(self, encoded: Tensor, increment: Tensor) -> Tensor:
        """Return the stream before an additive step; differentiable outside of graphs."""
        return encoded - increment.to(encoded.dtype)

    def read(self, encoded: Any) -> Any:
        """The value of a stream that is held so."""
        return encoded

    def rest(self, encoded: Any) -> Any:
        """Return how a stream is held, without its value: nothing."""
        return None

    def with_value(self, rest: Any, value: Any) -> Any:
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
        encoded = Encoded(
            *tree_unzip(lambda leaf: fixed_encode(leaf, self.fixed, self.monitor, index), value)
        )
        return encoded.value, encoded

    def undoes(self, coupling: Coupling) -> bool:
        return coupling.rearranges or (
            coupling.linear and (not coupling.scales or coupling.least_scale is not None)
        )

    def combine(self, coupling: Coupling, stream: Stream, out: Any, index: int) -> Stream:
        value, encoded = stream
        if (
            type(coupling) is Additive
            and encoded.__class__ is Encoded
            and isinstance(value, Tensor)
            and isinstance(out, Tensor)
            and (value.dtype is out.dtype or (value.dtype, out.dtype) in _WIDENED)
            and value.shape == out.shape
            and value.device == out.device
        ):
            # Most steps: what follows, without its calls.
            encoded = fixed_add(
                encoded._replace(value=value) if encoded.value is not value else encoded,
                out,
                self.fixed,
                self.monitor,
                index,
            )
            return encoded.value, encoded
        if coupling.translates:

            def add(encoded: Encoded, increment: Tensor) -> Encoded:
                return fixed_add(encoded, increment, self.fixed, self.monitor, index)

            encoded = _added(encoded, value, fitting(value, coupling.increment(out)), add)
            return _stream(encoded).value, encoded
        if coupling.rearranges or not self.undoes(coupling):
            like = coupling.combine(value, out)
            if not coupling.rearranges:
                return self.encode(like, index)
            with torch.no_grad(), without_tangents():
                return like, _moved(encoded, lambda part: coupling.combine(part, out), like)
        increment = coupling.factored(out)
        increment = increment._replace(addend=fitting(value, increment.addend))
        factor = factor_of(coupling.scale(out), coupling.least_scale)
        encoded = _signed(encoded, value, coupling.sign(out))
        encoded = multiply_and_add(encoded, factor, increment, self.fixed, self.monitor, index)
        return encoded.stream.value, encoded

    def invert(self, coupling: Coupling, encoded: Any, out: Any) -> Stream:
        if (
            type(coupling) is Additive
            and encoded.__class__ is Encoded
            and isinstance(encoded.value, Tensor)
            and isinstance(out, Tensor)
        ):
            encoded = self.fixed._combine(encoded, out, -1, None, 0)
            return encoded.value, encoded
        value = _stream(encoded).value
        if coupling.rearranges:
            encoded = _moved(
                encoded, lambda part: coupling.invert(part, out), coupling.invert(value, out)
            )
        elif coupling.scales:
            factor = factor_of(coupling.scale(out), coupling.least_scale)
            encoded = subtract_and_divide(encoded, factor, coupling.factored(out), self.fixed)
            encoded = _signed(encoded, _stream(encoded).value, coupling.sign(out))
        else:
            encoded = _added(encoded, value, coupling.increment(out), self.fixed.subtract)
        return _stream(encoded).value, encoded

    def save(self, coupling: Coupling, value: Any, out: Any) -> None:
        if coupling.translates or coupling.rearranges or not self.undoes(coupling):
            coupling.combine(value, out)
            return
        coupling.factored(out)
        scale = coupling.scale(out)
        value = signed(value, coupling.sign(out))
        if not isinstance(scale, Fraction):
            tree_map(save_product, value, scale)

    def hold(self, value: Tensor) -> Encoded:
        return Encoded(*self.fixed.encode(value, self.monitor))

    def add(self, encoded: Encoded, increment: Tensor, index: int) -> Encoded:
        return Encoded(*self.fixed.add(encoded, increment, self.monitor, index))

    def subtract(self, encoded: Encoded, increment: Tensor) -> Encoded:
        if torch.compiler.is_compiling():
            return Encoded(*self.fixed.subtract(encoded, increment))
        # The same numbers, and differentiable.
        return Encoded(*fixed_add(encoded, -increment, self.fixed))

    def read(self, encoded: Any) -> Any:
        return _stream(encoded).value

    def rest(self, encoded: Any) -> Any:
        """Return how a stream is held, without its value."""
        return self.with_value(encoded, None)

    def with_value(self, rest: Any, value: Any) -> Any:
        """Return the stream of which `rest` was returned, with this value."""
        return _signed(rest, value, None)


def _stream(encoded: Any) -> Encoded:
    stream: Encoded = encoded.stream if isinstance(encoded, BufferedStream) else encoded
    return stream


def _signed(encoded: Any, value: Any, sign: Tensor | None) -> Any:
    """Return a held stream, read as this value, which has a gradient, times 1 or -1."""
    residual = _stream(encoded).residual
    if sign is not None:
        # A stream holds no minus zero.
        value = tree_map(lambda leaf: leaf + 0.0, signed(value, sign))
        residual = signed(residual, sign)
    stream = Encoded(value, residual)
    return encoded.with_stream(stream) if isinstance(encoded, BufferedStream) else stream


def _added(
    encoded: Any, value: Any, increment: Any, add: Callable[[Encoded, Tensor], Encoded]
) -> Any:
    """Return a stream, read as this value, after `add` of each tensor and its increment."""
    stream = Encoded(
        *tree_unzip(
            lambda value, residual, leaf: add(Encoded(value, residual), leaf),
            value,
            _stream(encoded).residual,
            increment,
        )
    )
    return encoded.with_stream(stream) if isinstance(encoded, BufferedStream) else stream


def _moved(encoded: Any, move: Callable[[Any], Any], value: Any) -> Any:
    """Return a stream, read as this value, its integers moved likewise."""
    return (
        encoded.map(move, value)
        if isinstance(encoded, BufferedStream)
        else Encoded(value, move(encoded.residual))
    )
