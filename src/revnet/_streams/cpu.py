"""The fused combine of fixed-point streams for the CPU: in place, piece by piece, in few passes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .._factors import Increment
from . import reference
from .format import Encoded, bound, unit
from .monitor import RangeMonitor
from .reference import combine_into, computed

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
    ratio: tuple[int, int],
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> None:
    """Write what the reference returns to dense memory of one layout; see there.

    Everything is an integer below 2^53 in float64. A piece with a number out of range is left to
    the reference.
    """
    one, edge = unit(fraction_bits), bound(fraction_bits, new.value.dtype)
    scale = 1.0 / one
    n, d = ratio
    given = () if buffer is None else (buffer,)
    addends = increment.parts
    pieces = cut((*addends, *new, new_buffer, *encoded, *given))
    count, other, digits = torch.empty((3, *pieces[0][0].shape), dtype=torch.float64)
    for piece in pieces:
        part = increment.with_parts(piece[: len(addends)])
        value, residual, after, before, rest, *earlier = piece[len(addends) :]
        if value.shape != count.shape:
            count, other, digits = (x[: len(value)] for x in (count, other, digits))
        other.copy_(before).mul_(scale).add_(count.copy_(rest))
        torch.div(other, d, out=count).floor_()
        other.sub_(count, alpha=d)
        _take(digits, earlier)
        _exchanged(count, other, digits, n, d)
        unsigned(after).copy_(digits)
        count.add_(other.copy_(computed(part)).mul_(scale).round_())
        low, high = torch.aminmax(count)
        if not (low.item() > -edge and high.item() < edge):  # so also for NaN
            stream, last = reference.scale_and_add(
                Encoded(before, rest),
                earlier[0] if earlier else None,
                part,
                ratio,
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
    ratio: tuple[int, int],
    fraction_bits: int,
) -> None:
    """Write what the reference returns to dense memory of one layout; see there.

    Without `new_buffer`, its elements are known to be zero and not written.
    """
    one, edge = unit(fraction_bits), bound(fraction_bits, new.value.dtype)
    scale = 1.0 / one
    n, d = ratio
    wanted = () if new_buffer is None else (new_buffer,)
    addends = increment.parts
    pieces = cut((*addends, *new, buffer, *encoded, *wanted))
    count, other, digits = torch.empty((3, *pieces[0][0].shape), dtype=torch.float64)
    for piece in pieces:
        part = increment.with_parts(piece[: len(addends)])
        value, residual, digit, before, rest, *after = piece[len(addends) :]
        if value.shape != count.shape:
            count, other, digits = (x[: len(value)] for x in (count, other, digits))
        other.copy_(before).mul_(scale).add_(count.copy_(rest))
        other.sub_(count.copy_(computed(part)).mul_(scale).round_())
        lowest, highest = torch.aminmax(other)
        if n == 1:
            count.copy_(other)
        else:
            torch.div(other, n, out=count).floor_()
            other.sub_(count, alpha=n)
        _take(digits, [digit])
        _exchanged(count, other, digits, d, n)
        low, high = torch.aminmax(count)
        inside = low.item() > -edge and high.item() < edge
        if not (inside and lowest.item() > -edge and highest.item() < edge):  # so also for NaN
            stream, last = reference.subtract_and_divide(
                Encoded(before, rest), digit, part, ratio, torch.int64, fraction_bits
            )
            _write((value, residual, *after), (*stream, last))
            continue
        for into in after:
            unsigned(into).copy_(digits)
        value.copy_(torch.add(count, 0.0, out=other).mul_(one))
        residual.copy_(count.sub_(other.copy_(value), alpha=scale))


def _take(digits: Tensor, buffers: list[Tensor]) -> None:
    """Read a buffer, of which there may be none yet."""
    if buffers:
        digits.copy_(unsigned(buffers[0]))
    else:
        digits.zero_()


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
