"""Integers multiplied by ratios without loss: what a division leaves over is remembered in a buffer.

To multiply a count by n/d, it is multiplied by n, topped up with a digit of base n from the buffer,
and divided by d. The remainder goes to the buffer as a digit of base d. Both directions are the
same exchange, with n and d swapped.

Reference: Maclaurin et al. 2015, arXiv:1502.03492, section 3.2; MacKay et al. 2018,
arXiv:1810.10999.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._trees import tree_map, tree_unzip
from .fixed import Fixed
from .format import Held
from .monitor import RangeMonitor

# The denominator of factors that are tensors, and what a buffer may hold.
_DENOMINATOR = 2**24
# Larger numerators times a remainder would overflow.
_LARGEST_NUMERATOR = 2**38
_LARGEST = 2**63 - 1


@dataclass(eq=False, frozen=True)
class _Past:
    """The multiplications so far, latest first: how large the buffer may be, and whether a new one was begun."""

    bound: int
    begun: bool
    before: _Past | None


@dataclass(eq=False, frozen=True)
class BufferedStream:
    """A held stream that was multiplied: the stream, a buffer for each number, and the buffers that are full."""

    stream: Held
    buffer: Any
    full: list[Any]
    past: _Past | None

    def map(self, fn: Callable[[Any], Any], value: Any) -> BufferedStream:
        """The same with another value, and `fn` of each tree of integers."""
        full = [fn(buffer) for buffer in self.full]
        return BufferedStream(
            Held(value, fn(self.stream.residual)), fn(self.buffer), full, self.past
        )


def _unflatten(children: Any, past: Any) -> BufferedStream:
    stream, buffer, full = children
    return BufferedStream(stream, buffer, full, past)


pytree.register_pytree_node(
    BufferedStream,
    lambda held: ([held.stream, held.buffer, held.full], held.past),
    _unflatten,
    serialized_type_name="revnet._buffer.BufferedStream",
)


def multiply(
    held: Any, scale: Any, least: Any, fixed: Fixed, monitor: RangeMonitor | None, step: int
) -> BufferedStream:
    """A held stream times `scale`.

    Factors are rounded to multiples of 2^-24 unless they are one `Fraction`. A product is off by
    less than the resolution of the format times one plus the factor.

    Args:
        held: a stream, or what another multiplication returned.
        scale: a `Fraction`, or a tree of positive factors.
        least: the smallest factor there can be.
        fixed: the format of the stream.
        monitor: told where a product leaves the range, or a factor its bounds; `step` is the number
            it reports.
    """
    if not isinstance(held, BufferedStream):
        held = BufferedStream(held, tree_map(_empty, held.residual), [], None)
    numerators, denominator, least = _ratio(scale, least)
    bound, buffer, full = 0 if held.past is None else held.past.bound, held.buffer, held.full
    begun = _after(bound, least, denominator) > _LARGEST
    if begun:
        bound, buffer, full = 0, tree_map(_empty, buffer), [*full, buffer]

    def times(stream: Held, buffer: Tensor, numerator: Any) -> tuple[Held, Tensor]:
        count, known = fixed.counts(stream)
        product = count.double() * numerator / denominator * fixed.unit
        inside = (product.abs() < 0.99 * fixed.limit_in(stream.value.dtype)) & (numerator > 0)
        if monitor is not None:
            magnitude = torch.where(
                torch.as_tensor(numerator > 0, device=count.device), product.abs(), math.nan
            )
            monitor.observe(known & ~inside, magnitude.float(), step)
        numerator = numerator if isinstance(numerator, int) else numerator.clamp_min(least)
        count, buffer = _exchange(count, buffer, numerator, denominator)
        return fixed.held(count, known & inside, stream.value.dtype), buffer

    stream, buffer = _over(times, numerators, held.stream, buffer)
    return BufferedStream(
        stream, buffer, full, _Past(_after(bound, least, denominator), begun, held.past)
    )


def divide(held: BufferedStream, scale: Any, least: Any, fixed: Fixed) -> Any:
    """What `multiply` was given."""
    numerators, denominator, least = _ratio(scale, least)

    def over(stream: Held, buffer: Tensor, numerator: Any) -> tuple[Held, Tensor]:
        count, known = fixed.counts(stream)
        numerator = numerator if isinstance(numerator, int) else numerator.clamp_min(least)
        count, buffer = _exchange(count, buffer, denominator, numerator)
        return fixed.held(count, known, stream.value.dtype), buffer

    stream, buffer = _over(over, numerators, held.stream, held.buffer)
    past, full = held.past, held.full
    assert past is not None, "divided more often than multiplied"
    if past.begun:
        *full, buffer = full
    return stream if past.before is None else BufferedStream(stream, buffer, full, past.before)


def _ratio(scale: Any, least: Any) -> tuple[Any, int, int]:
    """Numerators, zero where a factor is out of bounds or not a number; the denominator; the smallest numerator."""
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
    fn: Callable[..., tuple[Held, Tensor]], numerators: Any, stream: Held, buffer: Any
) -> tuple[Held, Any]:
    def leaf(
        value: Tensor, residual: Tensor, buffer: Tensor, numerator: Any = numerators
    ) -> tuple[Tensor, ...]:
        held, buffer = fn(Held(value, residual), buffer, numerator)
        return *held, buffer

    value, residual, buffer = tree_unzip(
        leaf, *stream, buffer, *(() if isinstance(numerators, int) else (numerators,))
    )
    return Held(value, residual), buffer


def _exchange(count: Tensor, buffer: Tensor, n: Any, d: Any) -> tuple[Tensor, Tensor]:
    """Multiply by n/d."""
    quotient = count.div(d, rounding_mode="floor")
    rest = (count - quotient * d) * n + buffer.remainder(n)
    buffer = buffer.div(n, rounding_mode="floor") * d + rest.remainder(d)
    return quotient * n + rest.div(d, rounding_mode="floor"), buffer


def _after(bound: int, least: int, denominator: int) -> int:
    return (bound // least) * denominator + denominator - 1


def _empty(count: Tensor) -> Tensor:
    return torch.zeros_like(count, dtype=torch.int64)
