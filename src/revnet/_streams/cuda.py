# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The fused combine of fixed-point streams for CUDA, in Triton: the arithmetic of `reference`."""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor
from triton import knobs

from .._torch import current_cuda_device, current_cuda_stream
from .fixed import LAUNCHES, Launch
from .format import bound
from .monitor import key_of
from .reference import MASKS, SHARE

if TYPE_CHECKING:
    from .._factors import Factor, Increment
    from .format import Encoded


@triton.jit
def _wide(x):
    """Return x in the type in which scaling by a power of two is exact."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _count(value_ptr, residual_ptr, place, mask, SCALE: tl.constexpr):
    """Return the integers of a stream, and where it is a number."""
    value = _wide(tl.load(value_ptr + place, mask=mask, other=0.0))
    known = value == value
    # Read and written once per combine: residuals need not push the values out of the cache.
    count = tl.load(residual_ptr + place, mask=mask, other=0, eviction_policy="evict_first").to(
        tl.int64
    )
    return count + tl.where(known, value * SCALE, 0.0).to(tl.int64), known


@triton.jit
def _rounded(increment, SCALE: tl.constexpr, INTEGERS: tl.constexpr):
    """Return an increment as an integer, its magnitude, and whether the integer fits."""
    magnitude = tl.abs(increment)
    scaled = magnitude * SCALE
    # Adding and subtracting 2^23 (2^52) rounds half to even; from there on every float is an
    # integer.
    rounded = tl.where(scaled < INTEGERS, (scaled + INTEGERS) - INTEGERS, scaled)
    fits = rounded < 2.0**62
    count = tl.where(fits, rounded, 0.0).to(tl.int64)
    return tl.where(increment < 0, -count, count), magnitude, fits


@triton.jit
def _report(finding_ptr, bad, total, magnitude, fits, key, unit):
    """Remember the largest magnitude out of range."""
    if tl.max(bad.to(tl.int32), axis=0) > 0:
        found = tl.where(fits, tl.abs(total).to(tl.float32) * unit, magnitude.to(tl.float32))
        _note(finding_ptr, bad, found, key)


@triton.jit
def _note(finding_ptr, bad, found, key):
    found = tl.where(bad, found.to(tl.int32, bitcast=True).to(tl.int64) + key, 0)
    tl.atomic_max(finding_ptr, tl.max(found, axis=0), sem="relaxed")


@triton.jit
def _store(new_value_ptr, new_residual_ptr, place, mask, total, inside, unit, SCALE: tl.constexpr):
    """Write integers as a stream, NaN where they are not inside the range."""
    dtype: tl.constexpr = new_value_ptr.dtype.element_ty
    # The unit is no constant: a product with one would be left out, and int64 then go to bfloat16
    # in one rounding.
    new = (total.to(tl.float64 if dtype == tl.float64 else tl.float32) * unit).to(dtype)
    rest = tl.where(inside, total - (_wide(new) * SCALE).to(tl.int64), 0)
    tl.store(new_value_ptr + place, tl.where(inside, new, float("nan")).to(dtype), mask=mask)
    rest = rest.to(new_residual_ptr.dtype.element_ty)
    tl.store(new_residual_ptr + place, rest, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["key", "unit"])
def _combine(
    value_ptr,
    residual_ptr,
    increment_ptr,
    new_value_ptr,
    new_residual_ptr,
    finding_ptr,
    size,
    key,
    unit,
    SIGN: tl.constexpr,
    SCALE: tl.constexpr,
    BOUND: tl.constexpr,
    INTEGERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add (SIGN = 1) or subtract (-1); encode where value_ptr is None."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.zeros((BLOCK,), tl.int64)
    known = total == 0
    if value_ptr is not None:
        total, known = _count(value_ptr, residual_ptr, place, mask, SCALE)
    increment = _wide(tl.load(increment_ptr + place, mask=mask, other=0.0))
    count, magnitude, fits = _rounded(increment, SCALE, INTEGERS)
    total += SIGN * count
    inside = known & fits & (total < BOUND) & (total > -BOUND)
    if finding_ptr is not None:
        _report(finding_ptr, mask & known & ~inside, total, magnitude, fits, key, unit)
    _store(new_value_ptr, new_residual_ptr, place, mask, total, inside, unit, SCALE)


@triton.jit
def _exchange(count, buffer, n, d, SHIFT: tl.constexpr):
    """Return counts times n/d and the buffer after the exchange of digits."""
    if SHIFT is None:
        # Of magnitudes: below 2^32, a device divides them several times as fast.
        magnitude = tl.abs(count)
        quotient = magnitude // d
        rest = magnitude - quotient * d
        # Down, not towards zero.
        more = (rest > 0) & (count < 0)
        quotient = tl.where(count < 0, -quotient, quotient) - more.to(tl.int64)
        rest = tl.where(more, d - rest, rest)
    else:
        # SHIFT · d is above every count: divisions of what is not negative round down.
        shifted = count + SHIFT * d
        quotient = shifted // d
        rest = shifted - quotient * d
        quotient -= SHIFT
    # Remainders are written out, since `%` by a tensor would divide once more.
    high = buffer // n
    rest = rest * n + (buffer - high * n)
    carry = rest // d
    return quotient * n + carry, high * d + (rest - carry * d)


@triton.jit
def _numerator(factor_ptr, place, mask, LEAST: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """Return the numerators of factors, LEAST where one is out of bounds, and where none is."""
    factor = _wide(tl.load(factor_ptr + place, mask=mask, other=1.0))
    n, _, fits = _rounded(factor, D, WHOLE)
    usable = fits & (n >= LEAST) & (n < 2**38)
    return tl.where(usable, n, LEAST), usable


@triton.jit
def _products(
    finding_ptr, total, n, known, usable, key, unit, D: tl.constexpr, SHARE: tl.constexpr
):
    """Return where a product stays in range, after a report of those that do not."""
    product = tl.abs(total.to(tl.float64) * n.to(tl.float64))
    # A constant of its type: as a number it would be one of float32.
    inside = usable & (product < tl.full(product.shape, SHARE, tl.float64))
    if finding_ptr is not None:
        bad = known & ~inside
        if tl.max(bad.to(tl.int32), axis=0) > 0:
            found = tl.where(usable, (product * unit * (1.0 / D)).to(tl.float32), float("nan"))
            _note(finding_ptr, bad, found, key)
    return inside


@triton.jit
def _digits(buffer_ptr, place, mask, MASK: tl.constexpr):
    """Return a buffer as int64; narrow ones are unsigned integers in memory of signed ones."""
    buffer = tl.load(buffer_ptr + place, mask=mask, other=0, eviction_policy="evict_first")
    buffer = buffer.to(tl.int64)
    if MASK is not None:
        buffer = buffer & MASK
    return buffer


@triton.jit
def _increment(addend_ptr, less_ptr, place, mask, GAIN: tl.constexpr):
    """Return GAIN · (addend - less), each operation rounded."""
    increment = _wide(tl.load(addend_ptr + place, mask=mask, other=0.0))
    if less_ptr is not None:
        increment -= _wide(tl.load(less_ptr + place, mask=mask, other=0.0))
    if GAIN != 1.0:
        increment = increment * tl.full(increment.shape, GAIN, increment.dtype)
    return increment


@triton.jit(do_not_specialize=["key", "unit"])
def _scale(
    value_ptr,
    residual_ptr,
    buffer_ptr,
    addend_ptr,
    less_ptr,
    factor_ptr,
    new_value_ptr,
    new_residual_ptr,
    new_buffer_ptr,
    finding_ptr,
    size,
    key,
    unit,
    SIGN: tl.constexpr,
    SCALE: tl.constexpr,
    BOUND: tl.constexpr,
    INTEGERS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    MASK: tl.constexpr,
    GAIN: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply and add (SIGN = 1), or subtract and divide (-1), by factors or, if None, by N/D."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total, known = _count(value_ptr, residual_ptr, place, mask, SCALE)
    buffer = tl.zeros((BLOCK,), tl.int64)
    if buffer_ptr is not None:
        buffer = _digits(buffer_ptr, place, mask, MASK)
    increment = _increment(addend_ptr, less_ptr, place, mask, GAIN)
    count, magnitude, fits = _rounded(increment, SCALE, INTEGERS)
    if factor_ptr is not None:
        n, usable = _numerator(factor_ptr, place, mask, N, D, WHOLE)
    if SIGN > 0:
        if factor_ptr is not None:
            # Later sums report nothing where a product did.
            known &= _products(finding_ptr, total, n, mask & known, usable, key, unit, D, SHARE)
            total, buffer = _exchange(total, buffer, n, D, SHIFT)
        else:
            total, buffer = _exchange(total, buffer, N, D, SHIFT)
    total += SIGN * count
    inside = known & fits & (total < BOUND) & (total > -BOUND)
    if finding_ptr is not None:
        _report(finding_ptr, mask & known & ~inside, total, magnitude, fits, key, unit)
    if SIGN < 0:
        total = tl.where(inside, total, 0)
        if factor_ptr is not None:
            total, buffer = _exchange(total, buffer, D, n, None)
        else:
            total, buffer = _exchange(total, buffer, N, D, SHIFT)
        inside = inside & (total < BOUND) & (total > -BOUND)
    if new_buffer_ptr is not None:
        buffer = buffer.to(new_buffer_ptr.dtype.element_ty)
        tl.store(new_buffer_ptr + place, buffer, mask=mask, eviction_policy="evict_first")
    _store(new_value_ptr, new_residual_ptr, place, mask, total, inside, unit, SCALE)


_NOTHING = contextlib.nullcontext()

_BLOCK = 512
_WARPS = 8
_state = {"launched": False, "broken": False}


def _bind(built: Any, device: int, numbers: tuple[Any, ...]) -> Launch:
    """Return the launch of a built kernel.

    It is what `built[grid](*arguments)` does, without two chains of hooks and without asking for
    device and stream in Python; False where there are hooks or another build is needed. Tensors go
    by address, as Triton would ask each for it, and then the driver whether it lies on the device.

    Args:
        built: the kernel that Triton built.
        device: for which.
        numbers: arguments behind the key, the same in every launch.
    """
    run, function, packed, hooks = built.run, built.function, built.packed_metadata, knobs.runtime

    def launch(addresses: Sequence[int | None], bits: int, size: int, key: int) -> bool:
        if (
            bits & 15
            or not 0 < size < 2**31
            or hooks.launch_enter_hook.calls
            or hooks.launch_exit_hook.calls
            or device != current_cuda_device()
            or _state["broken"]
        ):
            return False
        stream, blocks = current_cuda_stream(device), -(-size // _BLOCK)
        run(
            *(blocks, 1, 1, stream, function, packed, None, None, None),
            *(*addresses, size, key, *numbers),
        )
        return True

    return launch


def _launched_again(
    build: tuple[Any, ...], tensors: tuple[Tensor | None, ...], size: int, key: int
) -> bool:
    """Launch a kernel that was built before; False where there is none for these tensors."""
    launch = LAUNCHES.get(build)
    if launch is None:
        return False
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    bits = functools.reduce(operator.or_, filter(None, addresses), size)
    return launch(addresses, bits, size, key)


def launch(
    encoded: Encoded | None,
    increment: Tensor,
    new: Encoded,
    finding: Tensor | None,
    sign: int,
    fraction_bits: int,
    step: int,
) -> bool:
    """Combine over dense memory of one layout into `new`; False where Triton does not work here.

    Args:
        encoded: the stream; None encodes the increment.
        increment: floating point.
        new: receives the stream.
        finding: one int64 that receives the largest key of a step + float32 bits of a magnitude out
            of range, or None.
        sign: 1 adds, -1 subtracts.
        fraction_bits: of the format.
        step: the number that the finding is to name.
    """
    size, key, dtype = increment.numel(), key_of(step), new.value.dtype
    tensors = (*(encoded or (None, None)), increment, *new, finding)
    # That of a stream is what `Fixed` looks for.
    read = dtype if encoded is not None else ("encode", dtype)
    build = (read, increment.dtype, increment.get_device(), sign, fraction_bits, finding is None)
    same_device = new.value.get_device() == increment.get_device()
    if same_device and _launched_again(build, tensors, size, key):
        return True
    exact = (sign, 2.0**fraction_bits, bound(fraction_bits, dtype), _integers(increment))
    numbers = (2.0**-fraction_bits, *exact, _BLOCK)
    return _launch(_combine, build, tensors, increment, key, numbers)


def launch_scaled(
    encoded: Encoded,
    buffer: Tensor | None,
    increment: Increment,
    new: Encoded,
    new_buffer: Tensor | None,
    finding: Tensor | None,
    sign: int,
    factor: Factor,
    fraction_bits: int,
    step: int,
) -> bool:
    """Multiply and add, or undo that, in one pass; False where Triton does not work.

    Args:
        encoded: the stream.
        buffer: the remainders so far; None where there are none.
        increment: floating point.
        new: receives the stream.
        new_buffer: receives the remainders; None where there are none.
        finding: see `launch`.
        sign: 1 multiplies and adds, -1 subtracts and divides.
        factor: one for all, or a tensor.
        fraction_bits: of the format.
        step: see `launch`.
    """
    n, d, scale = factor
    addend, gain, less = increment
    size, key, dtype = addend.numel(), key_of(step), new.value.dtype
    tensors = (*encoded, buffer, addend, less, scale, *new, new_buffer, finding)
    parts = (new.value, addend, buffer, new_buffer, less, scale)
    places = tuple(None if x is None else (x.get_device(), x.dtype) for x in parts)
    build = ("scale", places, sign, fraction_bits, n, d, gain, finding is None)
    if _launched_again(build, tensors, size, key):
        return True
    limit = bound(fraction_bits, dtype)
    mask = None if buffer is None else MASKS.get(buffer.dtype)
    integers = _integers(addend) if less is None else max(_integers(addend), _integers(less))
    whole = share = None
    if scale is not None:
        whole, share = _integers(scale), SHARE * limit * d
    elif sign < 0:
        # Without factors, both directions multiply.
        n, d = d, n
    exact = (sign, 2.0**fraction_bits, limit, integers)
    digits = (n, d, 2**53 // d + 1, mask, gain, whole, share)
    numbers = (2.0**-fraction_bits, *exact, *digits, _BLOCK)
    return _launch(_scale, build, tensors, addend, key, numbers)


def _integers(increment: Tensor) -> float:
    """Return the magnitude from which on every number of the working type is an integer."""
    return 2.0**52 if increment.dtype == torch.float64 else 2.0**23


def _launch(
    kernel: Any,
    build: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
    increment: Tensor,
    key: int,
    numbers: tuple[Any, ...],
) -> bool:
    """Have Triton find or build a kernel, and launch it; `build` tells the usual builds apart."""
    if _state["broken"]:
        return False
    size = increment.numel()
    if size == 0:
        return True
    # Triton builds another kernel where numbers or addresses are not multiples of 16, and of
    # numbers beyond 32 bits.
    usual = (
        size % 16 == 0
        and size < 2**31
        and not any(x.data_ptr() % 16 for x in tensors if x is not None)
    )
    try:
        # Triton's interpreter runs it on the CPU.
        with torch.cuda.device_of(increment) if increment.is_cuda else _NOTHING:
            arguments = (*tensors, size, key, *numbers)
            built = kernel[(-(-size // _BLOCK), 1, 1)](*arguments, num_warps=_WARPS)
            if usual and built is not None:
                LAUNCHES[build] = _bind(built, increment.get_device(), numbers)
    except Exception as error:
        if _state["launched"]:
            raise
        _state["broken"] = True
        warnings.warn(
            f"Triton cannot build the kernel of fixed-point streams ({error!r}); plain torch "
            f"operations take its place, with the same results, several times slower",
            stacklevel=2,
        )
        return False
    _state["launched"] = True
    return True
