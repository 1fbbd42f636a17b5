"""The fused combine of fixed-point streams for the CPU: in place, piece by piece, in few passes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .._factors import NUMERATORS, Factor, Increment
from . import reference
from .format import Encoded, bound, unit
from .monitor import RangeMonitor
from .reference import SHARE, combine_into, computed

# Elements per thread and piece. Smaller pieces stay in a level-2 cache but cost more in calls than
# that saves; this bounds the scratch memory and stays in a level-3 cache. A multiple of the length
# that torch gives to a thread.
_PIECE = 262144


def combine(
    encoded: Encoded | None,
    increment: Tensor,
    new: Encoded,
    sign: int,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> None:
    """Combine over dense memory of one layout into `new`.

    A reduction per piece shows that every number is in range; a piece where it does not is left to
    the reference.
    """
    one, scale, edge = _numbers(fraction_bits, new.value.dtype)
    tensors = (increment, *new, *(encoded or ()))
    small = increment.numel() <= _PIECE and new.value.is_contiguous()
    pieces = [tensors] if small else cut(tensors)
    # In one piece: the C library gives two back to the system, and each call would fault their
    # pages in again.
    total, other = torch.empty((2, *pieces[0][0].shape), dtype=torch.float64)
    for addend, value, residual, *before in pieces:
        if value.shape != total.shape:
            total, other = total[: len(value)], other[: len(value)]
        total.copy_(addend).mul_(sign * scale).round_()
        for part, factor in zip(before, (scale, 1.0), strict=False):
            total.add_(other.copy_(part), alpha=factor)
        low, high = torch.aminmax(total)
        if not (low.item() > -edge and high.item() < edge):  # so also for NaN
            piece = None if encoded is None else Encoded(*before)
            into = Encoded(value, residual)
            combine_into(piece, addend, into, sign, fraction_bits, monitor, step)
            continue
        # Where nothing is added to a stream, minus zero is as yet zero's other form.
        value.copy_(torch.add(total, 0.0, out=other).mul_(one))
        residual.copy_(total.sub_(other.copy_(value), alpha=scale))


@cache
def _numbers(fraction_bits: int, dtype: torch.dtype) -> tuple[float, float, int]:
    """Return what an integer of one stands for, its reciprocal, and the bound of the integers."""
    one = unit(fraction_bits)
    return one, 1.0 / one, bound(fraction_bits, dtype)


def cut(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Return pieces of tensors of one dense layout that stay in the cache together."""
    size = tensors[0].numel()
    length = _PIECE * torch.get_num_threads()
    if size <= length and tensors[1].is_contiguous():
        return [tensors]
    flat = [x.as_strided((size,), (1,)) for x in tensors]
    return [tuple(x[start : start + length] for x in flat) for start in range(0, size, length)]


_UNSIGNED = {torch.int16: torch.uint16, torch.int32: torch.uint32}


def scale_and_add(
    encoded: Encoded,
    buffer: Tensor | None,
    increment: Increment,
    new: Encoded,
    new_buffer: Tensor,
    factor: Factor,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> None:
    """Write what the reference returns to dense memory of one layout; see there.

    A piece with a number out of range is left to the reference.
    """
    one, edge = unit(fraction_bits), bound(fraction_bits, new.value.dtype)
    scale = 1.0 / one
    given = () if buffer is None else (buffer,)
    factors = () if factor.scale is None else (factor.scale,)
    addends = increment.parts
    pieces = cut((*addends, *new, new_buffer, *encoded, *factors, *given))
    scratch = _scratch(pieces[0][0].shape, factor)
    for piece in pieces:
        part = increment.with_parts(piece[: len(addends)])
        value, residual, after, before, rest, *others = piece[len(addends) :]
        each = factor._replace(scale=others.pop(0)) if factors else factor
        if value.shape != scratch[0].shape:
            scratch = scratch[:, : len(value)]
        count, other = scratch[:2]
        other.copy_(before).mul_(scale).add_(count.copy_(rest))
        if factors:
            inside = _multiplied(scratch, each, others, after, SHARE * edge)
        else:
            inside = _multiplied_by_ratio(scratch, factor, others, after)
        if inside:
            count.add_(other.copy_(computed(part)).mul_(scale).round_())
            low, high = torch.aminmax(count)
            inside = low.item() > -edge and high.item() < edge  # so not for NaN
        if not inside:
            stream, last = reference.scale_and_add(
                Encoded(before, rest),
                others[0] if others else None,
                part,
                each,
                after.dtype,
                fraction_bits,
                monitor,
                step,
            )
            _write((value, residual, after), (*stream, last))
            continue
        value.copy_(torch.add(count, 0.0, out=other).mul_(one))
        residual.copy_(count.sub_(other.copy_(value), alpha=scale))


def subtract_and_divide(
    encoded: Encoded,
    buffer: Tensor,
    increment: Increment,
    new: Encoded,
    new_buffer: Tensor | None,
    factor: Factor,
    fraction_bits: int,
) -> None:
    """Write what the reference returns to dense memory of one layout; see there.

    Without `new_buffer`, its elements are known to be zero and not written.
    """
    one, edge = unit(fraction_bits), bound(fraction_bits, new.value.dtype)
    scale = 1.0 / one
    wanted = () if new_buffer is None else (new_buffer,)
    factors = () if factor.scale is None else (factor.scale,)
    addends = increment.parts
    pieces = cut((*addends, *new, buffer, *encoded, *factors, *wanted))
    scratch = _scratch(pieces[0][0].shape, factor)
    for piece in pieces:
        part = increment.with_parts(piece[: len(addends)])
        value, residual, digit, before, rest, *after = piece[len(addends) :]
        each = factor._replace(scale=after.pop(0)) if factors else factor
        if value.shape != scratch[0].shape:
            scratch = scratch[:, : len(value)]
        count, other = scratch[:2]
        other.copy_(before).mul_(scale).add_(count.copy_(rest))
        other.sub_(count.copy_(computed(part)).mul_(scale).round_())
        lowest, highest = torch.aminmax(other)
        inside = lowest.item() > -edge and highest.item() < edge  # so not for NaN
        if inside:
            divided = _divided if factors else _divided_by_ratio
            inside = divided(scratch, each, digit, after)
            low, high = torch.aminmax(count)
            inside = inside and low.item() > -edge and high.item() < edge
        if not inside:
            stream, last = reference.subtract_and_divide(
                Encoded(before, rest), digit, part, each, torch.int64, fraction_bits
            )
            _write((value, residual, *after), (*stream, last))
            continue
        value.copy_(torch.add(count, 0.0, out=other).mul_(one))
        residual.copy_(count.sub_(other.copy_(value), alpha=scale))


def _scratch(shape: torch.Size, factor: Factor) -> Tensor:
    """Return memory for the numbers of a piece: counts stand in the second, then in the first."""
    return torch.empty((3 if factor.scale is None else 6, *shape), dtype=torch.float64)


def _multiplied_by_ratio(
    scratch: Tensor, factor: Factor, buffers: list[Tensor], after: Tensor
) -> bool:
    """Multiply the counts of a piece by n/d; everything is an integer below 2^53.

    Args:
        scratch: see `_scratch`.
        factor: n and d.
        buffers: the buffer, if there is one.
        after: receives the new one.

    Returns:
        Whether all is in range: True.
    """
    count, rest, digits = scratch
    n, d, _ = factor
    torch.div(rest, d, out=count).floor_()
    rest.sub_(count, alpha=d)
    if buffers:
        digits.copy_(unsigned(buffers[0]))
    else:
        digits.zero_()
    _exchanged(count, rest, digits, n, d)
    unsigned(after).copy_(digits)
    return True


def _divided_by_ratio(scratch: Tensor, factor: Factor, buffer: Tensor, after: list[Tensor]) -> bool:
    """Undo `_multiplied_by_ratio`; the buffer before it goes where it is wanted."""
    count, rest, digits = scratch
    n, d, _ = factor
    if n == 1:
        count.copy_(rest)
    else:
        torch.div(rest, n, out=count).floor_()
        rest.sub_(count, alpha=n)
    digits.copy_(unsigned(buffer))
    _exchanged(count, rest, digits, d, n)
    for into in after:
        unsigned(into).copy_(digits)
    return True


def _multiplied(
    scratch: Tensor, factor: Factor, buffers: list[Tensor], after: Tensor, edge: float
) -> bool:
    """Multiply the counts of a piece by factors of their own, unless one leaves its range.

    Args:
        scratch: see `_scratch`.
        factor: a tensor of factors, whose denominator is a power of two.
        buffers: the buffer, if there is one.
        after: receives the new one.
        edge: magnitudes of products from this on are out of range.

    Returns:
        Whether all is in range.
    """
    result, count, *_, product = scratch
    carry, _, n, digits, rest, quotient = scratch.view(torch.int64)
    d = factor.denominator
    if not _numerators(result, n, factor):
        return False
    low, high = torch.aminmax(torch.mul(count, result, out=product))
    if not (low.item() > -edge * d and high.item() < edge * d):
        return False
    shift = d.bit_length() - 1
    quotient.copy_(count)
    torch.bitwise_and(quotient, d - 1, out=rest).mul_(n)
    quotient.bitwise_right_shift_(shift).mul_(n)
    if buffers:
        torch.div(digits.copy_(unsigned(buffers[0])), n, rounding_mode="trunc", out=carry)
        rest.add_(digits.addcmul_(carry, n, value=-1))
        carry.mul_(d)
        unsigned(after).copy_(torch.bitwise_and(rest, d - 1, out=digits).add_(carry))
    else:
        unsigned(after).copy_(torch.bitwise_and(rest, d - 1, out=digits))
    result.copy_(quotient.add_(rest.bitwise_right_shift_(shift)))
    return True


def _divided(scratch: Tensor, factor: Factor, buffer: Tensor, after: list[Tensor]) -> bool:
    """Undo `_multiplied`; the buffer before it goes where it is wanted."""
    result, count, *_, quotient = scratch
    _, low, n, digits, rest, _ = scratch.view(torch.int64)
    d = factor.denominator
    if not _numerators(result, n, factor):
        return False
    # Exact, as the counts are below 2^53: no quotient of two such integers is rounded up to one.
    torch.div(count, result, out=quotient).floor_()
    shift = d.bit_length() - 1
    rest.copy_(count.addcmul_(quotient, result, value=-1)).mul_(d)
    rest.add_(torch.bitwise_and(digits.copy_(unsigned(buffer)), d - 1, out=low))
    whole = torch.div(rest, n, rounding_mode="trunc", out=low)
    for into in after:
        rest.addcmul_(whole, n, value=-1)
        unsigned(into).copy_(digits.bitwise_right_shift_(shift).mul_(n).add_(rest))
    result.copy_(quotient).mul_(d).add_(quotient.copy_(whole))
    return True


def _numerators(numerator: Tensor, n: Tensor, factor: Factor) -> bool:
    """Write the numerators of factors as floats and as integers, if all are in their bounds."""
    least, denominator, scale = factor
    low, high = torch.aminmax(numerator.copy_(scale).mul_(denominator).round_())
    if not (low.item() >= least and high.item() < NUMERATORS):
        return False
    n.copy_(numerator)
    return True


def _exchanged(quotient: Tensor, rest: Tensor, digits: Tensor, n: int, d: int) -> None:
    """Multiply by n/d in place, given quotient and rest of the division by d.

    The quotient becomes the product, the digits those of the new buffer; the rest is scratch.
    """
    if n == 1:
        # No digit comes back: the rest is the new digit.
        digits.mul_(d).add_(rest)
        return
    high = torch.div(digits, n).floor_()
    if d == 1:
        # A division by one leaves no rest: only a digit comes back.
        quotient.mul_(n).add_(digits).sub_(high, alpha=n)
        digits.copy_(high)
        return
    digits.sub_(high, alpha=n)
    rest.mul_(n).add_(digits)
    torch.div(rest, d, out=digits).floor_()
    quotient.mul_(n).add_(digits)
    rest.sub_(digits, alpha=d)
    torch.add(rest, high, alpha=d, out=digits)


def unsigned(buffer: Tensor) -> Tensor:
    """Return a buffer as the unsigned integers that it holds."""
    dtype = _UNSIGNED.get(buffer.dtype)
    return buffer if dtype is None else buffer.view(dtype)


def _write(into: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
    for memory, part in zip(into, parts, strict=False):
        memory.copy_(part)
