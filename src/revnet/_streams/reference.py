"""The arithmetic of fixed-point streams in plain torch operations, on any device and under any tracer.

The fused implementations equal it in every bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .format import Held, limit_in, residual_dtype, unit
from .monitor import RangeMonitor


def combine(
    held: Held | None,
    increment: Tensor,
    sign: int,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> Held:
    """Return the stream after an addition (sign 1) or a subtraction (-1); held None encodes.

    All sums are exact: they have fewer than 53 bits.
    """
    one = unit(fraction_bits)
    added = torch.round(increment.double() / one) * (sign * one)
    if held is None:
        total, known = 0.0 + added, None
    else:
        # held comes first in every operation: the first operand decides the strides of the
        # result.
        known = ~held.value.isnan()
        total = held.value.double() + held.residual.double() * one + added
    dtype = increment.dtype if held is None else held.value.dtype
    new, inside = split(total, fraction_bits, dtype)
    if monitor is not None:
        outside = ~inside if known is None else known & ~inside
        monitor.observe(outside, total.abs().to(torch.float32), step)
    return new


def combine_into(
    held: Held | None,
    increment: Tensor,
    new: Held,
    sign: int,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> None:
    """Write what `combine` returns to memory that exists."""
    parts = combine(held, increment, sign, fraction_bits, monitor, step)
    for into, part in zip(new, parts, strict=True):
        into.copy_(part)


def split(total: Tensor, fraction_bits: int, dtype: torch.dtype) -> tuple[Held, Tensor]:
    """Return a float64 stream in its two parts, and where it is in range."""
    inside = total.abs() < limit_in(fraction_bits, dtype)
    total = torch.where(inside, total, math.nan)
    value = read = total if dtype == torch.float64 else total.to(torch.float32).to(dtype)
    if torch.compiler.is_compiling() and dtype != torch.float64:
        # Where it differentiates, inductor leaves out what lies between two float64, and with it
        # the rounding.
        read = value.view(torch.int16 if value.itemsize == 2 else torch.int32).view(dtype)
    rest = (total - read.double()) / unit(fraction_bits)
    residual = torch.where(inside, rest, 0.0).to(residual_dtype(fraction_bits, dtype))
    return Held(value, residual), inside


def counts(held: Held, fraction_bits: int) -> tuple[Tensor, Tensor]:
    """Return the integers of a stream as int64, zero where it is NaN, and where it is a number."""
    known = ~held.value.isnan()
    scaled = torch.where(known, held.value.double() / unit(fraction_bits), 0.0)
    return scaled.to(torch.int64) + held.residual, known
