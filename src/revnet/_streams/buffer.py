"""Streams multiplied by ratios without loss: what a division leaves over is kept in a buffer.

A buffer is as narrow as the largest number that it can hold. It widens as steps multiply, and a new
one is begun where the widest that pays is full.

Reference: Maclaurin et al. 2015, arXiv:1502.03492, section 3.2; MacKay et al. 2018,
arXiv:1810.10999.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._factors import Increment
from .._trees import tree_map, tree_unzip
from . import scaled
from .autograd import scaled_add
from .fixed import Fixed
from .format import Encoded
from .monitor import RangeMonitor
from .reference import MASKS, exchange, widened

# The denominator of factors that are tensors.
_DENOMINATOR = 2**24
# Larger numerators times a remainder would overflow.
_LARGEST_NUMERATOR = 2**38
# The largest number that a buffer of each type may hold.
_LARGEST = {**MASKS, torch.int64: 2**63 - 1}


@dataclass(eq=False, frozen=True)
class _Past:
    """Remember the multiplications so far, latest first.

    Args:
        bound: the largest number that the buffer may hold after this multiplication.
        begun: whether it began the buffer.
        before: the multiplication before it.
    """

    bound: int
    begun: bool
    before: _Past | None


@dataclass(eq=False, frozen=True)
class BufferedStream:
    """Hold a stream that was multiplied, a buffer for each number, and the full buffers."""

    stream: Encoded
    buffer: Any
    full: list[Any]
    past: _Past | None

    def with_stream(self, stream: Encoded) -> BufferedStream:
        """Return the same numbers with the stream held as this."""
        return BufferedStream(stream, self.buffer, self.full, self.past)

    def map(self, fn: Callable[[Any], Any], value: Any) -> BufferedStream:
        """Return the same with another value, and `fn` of each tree of integers."""
        full = [fn(buffer) for buffer in self.full]
        return BufferedStream(
            Encoded(value, fn(self.stream.residual)), fn(self.buffer), full, self.past
        )


def _unflatten(children: Any, past: Any) -> BufferedStream:
    stream, buffer, full = children
    return BufferedStream(stream, buffer, full, past)


pytree.register_pytree_node(
    BufferedStream,
    lambda encoded: ([encoded.stream, encoded.buffer, encoded.full], encoded.past),
    _unflatten,
    serialized_type_name="revnet._buffer.BufferedStream",
)


def multiply_and_add(
    encoded: Any,
    ratio: Fraction,
    increment: Increment,
    fixed: Fixed,
    monitor: RangeMonitor | None,
    step: int,
) -> BufferedStream:
    """Return `ratio · encoded + increment`, differentiable; `scaled.takes` the ratio.

    Args:
        encoded: a stream, or what another multiplication returned.
        ratio: the factor.
        increment: trees of floating-point tensors in the shapes of the stream.
        fixed: the format of the stream.
        monitor: told where a sum leaves the range; `step` is the number it reports.
        step: see `monitor`.
    """
    n, d = ratio.numerator, ratio.denominator
    # Compiled steps keep their targets, and nothing reads the buffer.
    widest = torch.int64 if torch.compiler.is_compiling() else _widest(n, d)
    past, begun, buffer, full = _advanced(encoded, n, d, widest)
    stream = encoded.stream if isinstance(encoded, BufferedStream) else encoded

    def leaf(value: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *parts, buffer = (*rest, None) if begun else rest
        encoded, after = scaled_add(
            Encoded(value, residual),
            buffer,
            increment.with_parts(parts),
            (n, d),
            _dtype(past.bound),
            fixed,
            monitor,
            step,
        )
        return *encoded, after

    trees = (*increment.parts, *(() if begun else (buffer,)))
    value, residual, buffer = tree_unzip(leaf, *stream, *trees)
    return BufferedStream(Encoded(value, residual), buffer, full, past)


def subtract_and_divide(
    encoded: BufferedStream, ratio: Fraction, increment: Increment, fixed: Fixed
) -> Any:
    """Return what `multiply_and_add` was given."""
    past = encoded.past
    assert past is not None, "divided more often than multiplied"
    width = None if past.begun or past.before is None else _dtype(past.before.bound)

    def leaf(value: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Any, ...]:
        *parts, buffer = rest
        encoded, before = scaled.subtract_and_divide(
            Encoded(value, residual),
            buffer,
            increment.with_parts(parts),
            (ratio.numerator, ratio.denominator),
            width,
            fixed,
        )
        # A tree has no place for None: the buffer that is not wanted stands for it.
        return *encoded, buffer if before is None else before

    value, residual, buffer = tree_unzip(leaf, *encoded.stream, *increment.parts, encoded.buffer)
    return _before(encoded, Encoded(value, residual), buffer)


def multiply(
    encoded: Any, scale: Any, least: Any, fixed: Fixed, monitor: RangeMonitor | None, step: int
) -> BufferedStream:
    """Return a stream times `scale`.

    Factors are rounded to multiples of 2^-24 unless they are one `Fraction`. A product is off by
    less than the resolution of the format times one plus the factor.

    Args:
        encoded: a stream, or what another multiplication returned.
        scale: a `Fraction`, or a tree of positive factors.
        least: the smallest factor there can be.
        fixed: the format of the stream.
        monitor: told where a product leaves the range, or a factor its bounds; `step` is the number
            it reports.
        step: see `monitor`.
    """
    numerators, denominator, least = _ratio(scale, least)
    past, begun, buffer, full = _advanced(encoded, least, denominator, torch.int64)
    stream = encoded.stream if isinstance(encoded, BufferedStream) else encoded
    width = _dtype(past.bound)

    def times(stream: Encoded, buffer: Tensor, numerator: Any) -> tuple[Encoded, Tensor]:
        count, known = fixed.counts(stream)
        product = count.double() * numerator / denominator * fixed.unit
        inside = (product.abs() < 0.99 * fixed.limit_in(stream.value.dtype)) & (numerator > 0)
        if monitor is not None:
            magnitude = torch.where(
                torch.as_tensor(numerator > 0, device=count.device), product.abs(), math.nan
            )
            monitor.observe(known & ~inside, magnitude.float(), step)
        numerator = numerator if isinstance(numerator, int) else numerator.clamp_min(least)
        wide = widened(None if begun else buffer, count)
        count, wide = exchange(count, wide, numerator, denominator)
        return fixed.held(count, known & inside, stream.value.dtype), wide.to(width)

    # Where there is no buffer yet, the residual stands in its place and is not read.
    stream, buffer = _over(times, numerators, stream, stream.residual if begun else buffer)
    return BufferedStream(stream, buffer, full, past)


def divide(encoded: BufferedStream, scale: Any, least: Any, fixed: Fixed) -> Any:
    """Return what `multiply` was given."""
    numerators, denominator, least = _ratio(scale, least)
    past = encoded.past
    assert past is not None, "divided more often than multiplied"
    width = torch.int64 if past.before is None else _dtype(past.before.bound)

    def over(stream: Encoded, buffer: Tensor, numerator: Any) -> tuple[Encoded, Tensor]:
        count, known = fixed.counts(stream)
        numerator = numerator if isinstance(numerator, int) else numerator.clamp_min(least)
        count, wide = exchange(count, widened(buffer, count), denominator, numerator)
        return fixed.held(count, known, stream.value.dtype), wide.to(width)

    stream, buffer = _over(over, numerators, encoded.stream, encoded.buffer)
    return _before(encoded, stream, buffer)


def _advanced(
    encoded: Any, least: int, denominator: int, widest: torch.dtype
) -> tuple[_Past, bool, Any, list[Any]]:
    """Return the past after one more multiplication, and the buffers that it goes on with.

    The buffer is None where the multiplication begins one.
    """
    if not isinstance(encoded, BufferedStream) or encoded.past is None:
        return _Past(denominator - 1, True, None), True, None, []
    bound = _after(encoded.past.bound, least, denominator)
    if bound > _LARGEST[widest]:
        past = _Past(denominator - 1, True, encoded.past)
        return past, True, None, [*encoded.full, encoded.buffer]
    return _Past(bound, False, encoded.past), False, encoded.buffer, encoded.full


def _before(encoded: BufferedStream, stream: Encoded, buffer: Any) -> Any:
    """Return a stream with the buffers that it had before the latest multiplication."""
    past, full = encoded.past, encoded.full
    assert past is not None
    if past.before is None:
        return stream
    if past.begun:
        *full, buffer = full
    return BufferedStream(stream, buffer, full, past.before)


def _ratio(scale: Any, least: Any) -> tuple[Any, int, int]:
    """Return numerators, the denominator, and the smallest numerator.

    A numerator is zero where a factor is out of bounds or not a number.
    """
    if isinstance(scale, Fraction):
        return scale.numerator, scale.denominator, scale.numerator

    def numerator(factor: Tensor) -> Tensor:
        scaled = (factor.double() * _DENOMINATOR).round()
        return torch.where((scaled >= smallest) & (scaled < _LARGEST_NUMERATOR), scaled, 0.0).to(
            torch.int64
        )

    # A bfloat16 factor may have been rounded to less than the bound.
    smallest = max(1, int(0.98 * least * _DENOMINATOR))
    return tree_map(numerator, scale), _DENOMINATOR, smallest


def _over(
    fn: Callable[..., tuple[Encoded, Tensor]], numerators: Any, stream: Encoded, buffer: Any
) -> tuple[Encoded, Any]:
    def leaf(
        value: Tensor, residual: Tensor, buffer: Tensor, numerator: Any = numerators
    ) -> tuple[Tensor, ...]:
        encoded, buffer = fn(Encoded(value, residual), buffer, numerator)
        return *encoded, buffer

    value, residual, buffer = tree_unzip(
        leaf, *stream, buffer, *(() if isinstance(numerators, int) else (numerators,))
    )
    return Encoded(value, residual), buffer


def _after(bound: int, least: int, denominator: int) -> int:
    """Return the largest number in a buffer after an exchange."""
    return (bound // least) * denominator + denominator - 1


def _dtype(bound: int) -> torch.dtype:
    """Return the narrowest type of a buffer that holds numbers up to this one."""
    return next(dtype for dtype, largest in _LARGEST.items() if bound <= largest)


@cache
def _widest(n: int, d: int) -> torch.dtype:
    """Return the type up to which a buffer of remainders of n/d widens before a new one is begun.

    The narrowest that holds nine tenths as many steps per byte as the best: each step reads and
    writes the buffer that is not full.
    """
    if d == 1:
        return torch.uint8
    steps = {dtype: _steps(n, d, largest) / dtype.itemsize for dtype, largest in MASKS.items()}
    return next(dtype for dtype in steps if steps[dtype] >= 0.9 * max(steps.values()))


def _steps(n: int, d: int, largest: int) -> int:
    """Return how many multiplications by n/d one buffer serves."""
    bound = steps = 0
    while (bound := _after(bound, n, d)) <= largest and steps < 10_000:
        steps += 1
    return steps
