# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The fused combine of fixed-point streams for CUDA, in Triton: the arithmetic of `reference`."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

if TYPE_CHECKING:
    from .format import Held


@triton.jit
def _wide(x):
    """Return x in the type in which scaling by a power of two is exact."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


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
        value = _wide(tl.load(value_ptr + place, mask=mask, other=0.0))
        known = value == value
        # Read and written once per combine: residuals need not push the values out of the cache.
        total = tl.load(residual_ptr + place, mask=mask, other=0, eviction_policy="evict_first").to(
            tl.int64
        )
        total += tl.where(known, value * SCALE, 0.0).to(tl.int64)
    increment = _wide(tl.load(increment_ptr + place, mask=mask, other=0.0))
    magnitude = tl.abs(increment)
    scaled = magnitude * SCALE
    # Adding and subtracting 2^23 (2^52) rounds half to even; from there on every float is an
    # integer.
    rounded = tl.where(scaled < INTEGERS, (scaled + INTEGERS) - INTEGERS, scaled)
    fits = rounded < 2.0**62
    count = tl.where(fits, rounded, 0.0).to(tl.int64)
    total += tl.where(increment < 0, -SIGN * count, SIGN * count)
    inside = known & fits & (total < BOUND) & (total > -BOUND)
    if finding_ptr is not None:
        bad = mask & known & ~inside
        if tl.max(bad.to(tl.int32), axis=0) > 0:
            found = tl.where(fits, tl.abs(total).to(tl.float32) * unit, magnitude.to(tl.float32))
            found = tl.where(bad, found.to(tl.int32, bitcast=True).to(tl.int64) + key, 0)
            tl.atomic_max(finding_ptr, tl.max(found, axis=0), sem="relaxed")
    dtype: tl.constexpr = new_value_ptr.dtype.element_ty
    # The unit is no constant: a product with one would be left out, and int64 then go to bfloat16
    # in one rounding.
    new = (total.to(tl.float64 if dtype == tl.float64 else tl.float32) * unit).to(dtype)
    rest = tl.where(inside, total - (_wide(new) * SCALE).to(tl.int64), 0)
    tl.store(new_value_ptr + place, tl.where(inside, new, float("nan")).to(dtype), mask=mask)
    rest = rest.to(new_residual_ptr.dtype.element_ty)
    tl.store(new_residual_ptr + place, rest, mask=mask, eviction_policy="evict_first")


_NOTHING = contextlib.nullcontext()

_BLOCK = 512
_WARPS = 8
_state = {"launched": False, "broken": False}
# Kernels by what Triton would look at to find them: asking it takes as long again as launching.
_built: dict[Any, Any] = {}


def launch(
    held: Held | None,
    increment: Tensor,
    new: Held,
    finding: Tensor | None,
    sign: int,
    fraction_bits: int,
    bound: int,
    key: int,
) -> bool:
    """Combine over dense memory of one layout into `new`; False where Triton does not work here.

    Args:
        held: the stream; None encodes the increment.
        increment: floating point.
        new: receives the stream.
        finding: one int64 that receives the largest `key` + float32 bits of a magnitude out of
            range, or None.
        sign: 1 adds, -1 subtracts.
        fraction_bits: of the format.
        bound: magnitudes from this integer on are out of range.
        key: of the step, see `monitor.key_of`.
    """
    if _state["broken"]:
        return False
    size = increment.numel()
    if size == 0:
        return True
    tensors = (*(held or (None, None)), increment, *new, finding)
    arguments = (
        *tensors,
        size,
        key,
        2.0**-fraction_bits,
        sign,
        2.0**fraction_bits,
        bound,
        2.0**52 if increment.dtype == torch.float64 else 2.0**23,
        _BLOCK,
    )
    grid, device = (-(-size // _BLOCK), 1, 1), increment.get_device()
    # Triton builds another kernel where numbers or addresses are not multiples of 16, and of
    # numbers beyond 32 bits.
    usual = (
        size % 16 == 0
        and size < 2**31
        and not any(x.data_ptr() % 16 for x in tensors if x is not None)
    )
    dtypes = increment.dtype, new.value.dtype
    which = (device, dtypes, held is None, finding is None, sign, fraction_bits) if usual else None
    try:
        # Triton's interpreter runs it on the CPU.
        elsewhere = increment.is_cuda and device != torch.cuda.current_device()
        with torch.cuda.device_of(increment) if elsewhere else _NOTHING:
            kernel = _built.get(which)
            if kernel is not None:
                kernel[grid](*arguments)
            else:
                kernel = _combine[grid](*arguments, num_warps=_WARPS)
                if usual and kernel is not None:
                    _built[which] = kernel
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
