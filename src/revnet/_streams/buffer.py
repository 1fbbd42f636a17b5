"""Streams multiplied by ratios without loss: what a division leaves over is kept in a buffer.

A buffer is as narrow as the largest number that it can hold. It widens as steps multiply, and a new
one is begun where the widest that pays is full.

Reference: Maclaurin et al. 2015, arXiv:1502.03492, section 3.2; MacKay et al. 2018,
arXiv:1810.10999.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._factors import Factor, Increment
from .._trees import tree_unzip
from . import scaled
from .autograd import scaled_add
from .fixed import Fixed
from .format import Encoded
from .monitor import RangeMonitor
from .reference import MASKS

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
    factor: Factor,
    increment: Increment,
    fixed: Fixed,
    monitor: RangeMonitor | None,
    step: int,
) -> BufferedStream:
    """Return `factor · encoded + increment`, differentiable.

    A product is off by less than the resolution of the format times one plus the factor.

    Args:
        encoded: a stream, or what another multiplication returned.
        factor: of all tensors, or a tree of factors in the structure of the stream.
        increment: trees of floating-point tensors in the shapes of the stream.
        fixed: the format of the stream.
        monitor: told where a product or a sum leaves the range, or a factor its bounds; `step` is
            the number it reports.
        step: see `monitor`.
    """
    past, begun, buffer, full = _advanced(encoded, factor, _widest_of(factor, fixed))
    stream = encoded.stream if isinstance(encoded, BufferedStream) else encoded

    def leaf(value: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *parts, buffer, scale = rest
        encoded, after = scaled_add(
            Encoded(value, residual),
            None if begun else buffer,
            increment.with_parts(parts),
            factor if factor.scale is None else factor._replace(scale=scale),
            _dtype(past.bound),
            fixed,
            monitor,
            step,
        )
        return *encoded, after

    # A tree has no place for None: the residual stands there, and is not read.
    nothing = stream.residual
    value, residual, buffer = tree_unzip(
        leaf,
        *stream,
        *increment.parts,
        nothing if begun else buffer,
        nothing if factor.scale is None else factor.scale,
    )
    return BufferedStream(Encoded(value, residual), buffer, full, past)


def subtract_and_divide(
    encoded: BufferedStream, factor: Factor, increment: Increment, fixed: Fixed
) -> Any:
    """Return what `multiply_and_add` was given."""
    past, nothing = encoded.past, encoded.stream.residual
    assert past is not None, "divided more often than multiplied"
    width = None if past.begun or past.before is None else _dtype(past.before.bound)

    def leaf(value: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Any, ...]:
        *parts, buffer, scale = rest
        encoded, before = scaled.subtract_and_divide(
            Encoded(value, residual),
            buffer,
            increment.with_parts(parts),
            factor if factor.scale is None else factor._replace(scale=scale),
            width,
            fixed,
        )
        # The buffer that is not wanted stands for None.
        return *encoded, buffer if before is None else before

    scale = nothing if factor.scale is None else factor.scale
    value, residual, buffer = tree_unzip(
        leaf, *encoded.stream, *increment.parts, encoded.buffer, scale
    )
    return _before(encoded, Encoded(value, residual), buffer)


def _advanced(
    encoded: Any, factor: Factor, widest: torch.dtype
) -> tuple[_Past, bool, Any, list[Any]]:
    """Return the past after one more multiplication, and the buffers that it goes on with.

    The buffer is None where the multiplication begins one.
    """
    denominator = factor.denominator
    if not isinstance(encoded, BufferedStream) or encoded.past is None:
        return _Past(denominator - 1, True, None), True, None, []
    bound = _after(encoded.past.bound, factor.least, denominator)
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


def _after(bound: int, least: int, denominator: int) -> int:
    """Return the largest number in a buffer after an exchange."""
    return (bound // least) * denominator + denominator - 1


def _dtype(bound: int) -> torch.dtype:
    """Return the narrowest type of a buffer that holds numbers up to this one."""
    return next(dtype for dtype, largest in _LARGEST.items() if bound <= largest)


def _widest_of(factor: Factor, fixed: Fixed) -> torch.dtype:
    """Return the type up to which a buffer widens before a new one is begun."""
    # Compiled steps keep their targets, and nothing reads the buffer. A buffer for tensors begins
    # with as many bits as their denominator has.
    if torch.compiler.is_compiling() or not scaled.is_small(factor, fixed):
        return torch.int64
    return _widest(factor.least, factor.denominator)


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
