# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The fused combine of fixed-point streams for CUDA, in Triton. Bit for bit the arithmetic of `_streams.Fixed`."""

from __future__ import annotations

import warnings

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor


@triton.jit(do_not_specialize=["key"])
def _combine(
    held_ptr,
    increment_ptr,
    new_ptr,
    value_ptr,
    finding_ptr,
    size,
    key,
    SIGN: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    BOUND: tl.constexpr,
    SENTINEL: tl.constexpr,
    INTEGERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add (SIGN = 1) or subtract (-1); encode where held_ptr, decode where increment_ptr is None."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.zeros((BLOCK,), tl.int64)
    known = total == 0
    if held_ptr is not None:
        # The integers are read and written once per combine: they need not push the values out of the cache.
        total = tl.load(held_ptr + place, mask=mask, other=0, eviction_policy="evict_first").to(tl.int64)
        known = total != SENTINEL
    inside = known
    if increment_ptr is not None:
        increment = tl.load(increment_ptr + place, mask=mask, other=0.0)
        if increment_ptr.dtype.element_ty != tl.float64:
            increment = increment.to(tl.float32)
        size_of_increment = tl.abs(increment)
        scaled = size_of_increment * SCALE
        # Adding and subtracting 2^23 (2^52) rounds half to even; from there on every float is an integer.
        rounded = tl.where(scaled < INTEGERS, (scaled + INTEGERS) - INTEGERS, scaled)
        fits = rounded < BOUND
        count = tl.where(fits & known, rounded, 0.0).to(tl.int64)
        total += tl.where(increment < 0, -SIGN * count, SIGN * count)
        inside = known & fits & (total < BOUND) & (total > -BOUND)
        if finding_ptr is not None:
            bad = mask & known & ~inside
            if tl.max(bad.to(tl.int32), axis=0) > 0:
                magnitude = tl.where(fits, tl.abs(total).to(tl.float32) * UNIT, size_of_increment.to(tl.float32))
                finding = tl.where(bad, magnitude.to(tl.int32, bitcast=True).to(tl.int64) + key, 0)
                tl.atomic_max(finding_ptr, tl.max(finding, axis=0), sem="relaxed")
    if new_ptr is not None:
        new = tl.where(inside, total, SENTINEL).to(new_ptr.dtype.element_ty)
        tl.store(new_ptr + place, new, mask=mask, eviction_policy="evict_first")
    if value_ptr is not None:
        wide = total.to(tl.float64 if value_ptr.dtype.element_ty == tl.float64 else tl.float32)
        tl.store(
            value_ptr + place, tl.where(inside, wide * UNIT, float("nan")).to(value_ptr.dtype.element_ty), mask=mask
        )


_BLOCK = 512
_WARPS = 8
_state = {"launched": False, "broken": False}


def launch(
    held: Tensor | None,
    increment: Tensor | None,
    new: Tensor | None,
    value: Tensor | None,
    finding: Tensor | None,
    sign: int,
    fraction_bits: int,
    range_bits: int,
    key: int,
) -> bool:
    """Combine over dense memory of one layout into `new` and `value`; False where Triton does not work here.

    Args:
        held: integers; None encodes the increment.
        increment: floating point; None decodes held.
        new: receives the integers, or None.
        value: receives their values, or None.
        finding: one int64 that receives the largest `key` + float32 bits of a magnitude out of range, or None.
        sign: 1 adds, -1 subtracts.
        fraction_bits: of the format.
        range_bits: magnitudes from 2 to this power on are out of range.
        key: of the step, see `_streams.RangeMonitor`.
    """
    if _state["broken"]:
        return False
    target = new if new is not None else value
    integers = held if held is not None else new
    assert target is not None
    assert integers is not None
    size = target.numel()
    if size == 0:
        return True
    arguments = (
        held,
        increment,
        new,
        value,
        finding,
        size,
        key,
        sign,
        2.0**fraction_bits,
        2.0**-fraction_bits,
        2**range_bits,
        torch.iinfo(integers.dtype).min,
        2.0**52 if increment is not None and increment.dtype == torch.float64 else 2.0**23,
        _BLOCK,
    )
    try:
        launched = _combine[(-(-size // _BLOCK),)]
        if target.get_device() == torch.cuda.current_device():
            launched(*arguments, num_warps=_WARPS)
        else:
            with torch.cuda.device_of(target):
                launched(*arguments, num_warps=_WARPS)
    except Exception as error:
        if _state["launched"]:
            raise
        _state["broken"] = True
        warnings.warn(
            f"Triton cannot build the kernel of fixed-point streams ({error!r}); plain torch operations take its "
            "place, with the same results, several times slower",
            stacklevel=2,
        )
        return False
    _state["launched"] = True
    return True
