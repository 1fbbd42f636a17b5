"""The arithmetic of fixed-point streams in plain torch operations.

It runs on any device and under any tracer. The fused implementations equal it in every bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._factors import NUMERATORS, Factor, Increment, times
from .format import Encoded, limit_in, residual_dtype, unit
from .monitor import RangeMonitor


def combine(
    encoded: Encoded | None,
    increment: Tensor,
    sign: int,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> Encoded:
    """Return the stream after an addition (sign 1) or a subtraction (-1); None encodes.

    All sums are exact: they have fewer than 53 bits.
    """
    one = unit(fraction_bits)
    added = torch.round(increment.double() / one) * (sign * one)
    if encoded is None:
        total, known = 0.0 + added, None
    else:
        # `encoded` comes first in every operation: the first operand decides the strides of the
        # result.
        known = ~encoded.value.isnan()
        total = encoded.value.double() + encoded.residual.double() * one + added
    dtype = increment.dtype if encoded is None else encoded.value.dtype
    new, inside = split(total, fraction_bits, dtype)
    if monitor is not None:
        outside = ~inside if known is None else known & ~inside
        monitor.observe(outside, total.abs().to(torch.float32), step)
    return new


def combine_into(
    encoded: Encoded | None,
    increment: Tensor,
    new: Encoded,
    sign: int,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> None:
    """Write what `combine` returns to memory that exists."""
    parts = combine(encoded, increment, sign, fraction_bits, monitor, step)
    for into, part in zip(new, parts, strict=True):
        into.copy_(part)


def split(total: Tensor, fraction_bits: int, dtype: torch.dtype) -> tuple[Encoded, Tensor]:
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
    return Encoded(value, residual), inside


def counts(encoded: Encoded, fraction_bits: int) -> tuple[Tensor, Tensor]:
    """Return the integers of a stream as int64, zero where it is NaN, and where it is a number."""
    known = ~encoded.value.isnan()
    scaled = torch.where(known, encoded.value.double() / unit(fraction_bits), 0.0)
    return scaled.to(torch.int64) + encoded.residual, known


def scale_and_add(
    encoded: Encoded,
    buffer: Tensor | None,
    increment: Increment,
    factor: Factor,
    width: torch.dtype,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> tuple[Encoded, Tensor]:
    """Return the stream `factor · encoded + increment`, and the buffer with the remainders.

    Args:
        encoded: a stream of this format.
        buffer: the remainders of earlier divisions; None where there are none.
        increment: floating point, of its shape; see `computed`.
        factor: of all elements, or a tensor that is broadcast to the stream. Where it or a product
            is out of range, the stream becomes NaN.
        width: integers that hold every value of the new buffer, see `widened`.
        fraction_bits: of the format.
        monitor: see `combine`.
        step: see `combine`.
    """
    count, known = counts(encoded, fraction_bits)
    n, usable = numerators(factor)
    if factor.scale is not None or factor.least > factor.denominator:
        product = (count.double() * n / factor.denominator * unit(fraction_bits)).abs()
        inside = product < SHARE * limit_in(fraction_bits, encoded.value.dtype)
        if usable is not None:
            # A factor on the CPU may scale a stream elsewhere, but select nothing there.
            usable = usable.to(product.device)
            inside, product = inside & usable, torch.where(usable, product, math.nan)
        if monitor is not None:
            monitor.observe(known & ~inside, product.float(), step)
        known = known & inside
    count, wide = exchange(count, widened(buffer, count), n, factor.denominator)
    total = torch.where(known, count.double() * unit(fraction_bits), math.nan)
    scaled = split(total, fraction_bits, encoded.value.dtype)[0]
    new = combine(scaled, computed(increment), 1, fraction_bits, monitor, step)
    return new, wide.to(width)


def subtract_and_divide(
    encoded: Encoded,
    buffer: Tensor,
    increment: Increment,
    factor: Factor,
    width: torch.dtype,
    fraction_bits: int,
) -> tuple[Encoded, Tensor]:
    """Return the stream and the buffer that `scale_and_add` was given."""
    scaled = combine(encoded, computed(increment), -1, fraction_bits, None, 0)
    count, known = counts(scaled, fraction_bits)
    n = numerators(factor)[0]
    count, wide = exchange(count, widened(buffer, count), factor.denominator, n)
    total = torch.where(known, count.double() * unit(fraction_bits), math.nan)
    return split(total, fraction_bits, encoded.value.dtype)[0], wide.to(width)


# Of the range, what a product may fill: what is compared is its estimate in floats.
SHARE = 0.99


def numerators(factor: Factor) -> tuple[Any, Tensor | None]:
    """Return the numerators, the least where a factor is out of bounds, and where none is.

    For a factor of all elements, the integer and None.
    """
    least, denominator, scale = factor
    if scale is None:
        return least, None
    scaled = (scale.double() * denominator).round()
    usable = (scaled >= least) & (scaled < NUMERATORS)
    return torch.where(usable, scaled, least).to(torch.int64), usable


def computed(increment: Increment) -> Tensor:
    """Return `gain · (addend - less)`, each operation rounded to float32 or a wider type."""
    addend: Tensor = increment.addend
    gain, less = increment.gain, increment.less
    if less is not None:
        addend = wide(addend) - wide(less)
    return addend if gain == 1.0 else times(wide(addend), gain)


def wide(x: Tensor) -> Tensor:
    """Return a tensor as float32, or in its type where that is wider."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def exchange(count: Tensor, buffer: Tensor, n: Any, d: Any) -> tuple[Tensor, Tensor]:
    """Return count times n/d, rounded, and the buffer after the exchange of digits."""
    quotient = count.div(d, rounding_mode="floor")
    rest = (count - quotient * d) * n + buffer.remainder(n)
    buffer = buffer.div(n, rounding_mode="floor") * d + rest.remainder(d)
    return quotient * n + rest.div(d, rounding_mode="floor"), buffer


# What an element of a buffer is read with: int16 and int32 are used as unsigned integers, because
# torch has few operations on its unsigned types.
MASKS = {torch.uint8: 2**8 - 1, torch.int16: 2**16 - 1, torch.int32: 2**32 - 1}


def widened(buffer: Tensor | None, count: Tensor) -> Tensor:
    """Return a buffer as int64, zeros like count for None."""
    if buffer is None:
        return torch.zeros_like(count)
    wide = buffer.to(torch.int64)
    mask = MASKS.get(buffer.dtype)
    return wide if mask is None or buffer.dtype == torch.uint8 else wide & mask
