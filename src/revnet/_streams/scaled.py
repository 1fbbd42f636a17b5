"""A step that scales its target: one pass over stream, buffer, increment and factors.

To multiply a count by n/d, it is multiplied by n, topped up with a digit of base n from the buffer,
and divided by d. The remainder goes to the buffer as a digit of base d. Both directions are the
same exchange, with n and d swapped.

Reference: Maclaurin et al. 2015, arXiv:1502.03492, section 3.2; MacKay et al. 2018,
arXiv:1810.10999.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._factors import Factor, Increment
from . import cpu, reference
from .fixed import Fixed, empty, fusible, launcher, like
from .format import Encoded
from .monitor import RangeMonitor, is_fake


def is_small(factor: Factor, fixed: Fixed) -> bool:
    """Return whether a factor is one for all, with which no product leaves the range or overflows.

    All is then exact in float64, and constant in a kernel.
    """
    n, d, scale = factor
    return scale is None and 0 < n <= d < 2**16 and d * fixed.limit / fixed.unit < 2**62


def scale_and_add(
    encoded: Encoded,
    buffer: Tensor | None,
    increment: Increment,
    factor: Factor,
    width: torch.dtype,
    fixed: Fixed,
    monitor: RangeMonitor | None = None,
    step: int = 0,
) -> tuple[Encoded, Tensor]:
    """Return the stream and the buffer of `reference.scale_and_add`, fused where possible."""
    bits = fixed.fraction_bits
    if not _fused(encoded, buffer, increment, factor, width, fixed):
        return reference.scale_and_add(
            encoded, buffer, increment, factor, width, bits, monitor, step
        )
    if monitor is not None:
        monitor.sample(increment, fixed.fraction_bits, step)
    new = empty(encoded.value, bits)
    after = torch.empty_like(new.value, dtype=width)
    if new.value.numel() == 0 or is_fake(new.value):
        return new, after
    encoded = Encoded(like(encoded.value, new.value), like(encoded.residual, new.value))
    buffer = None if buffer is None else like(buffer, new.value)
    increment, factor = _like(increment, factor, new.value)
    if new.value.is_cpu:
        cpu.scale_and_add(encoded, buffer, increment, new, after, factor, bits, monitor, step)
        return new, after
    finding = None if monitor is None else monitor.prepare(new.value.device).key
    if _launched(encoded, buffer, increment, new, after, finding, 1, factor, bits, step):
        return new, after
    return reference.scale_and_add(encoded, buffer, increment, factor, width, bits, monitor, step)


def subtract_and_divide(
    encoded: Encoded,
    buffer: Tensor,
    increment: Increment,
    factor: Factor,
    width: torch.dtype | None,
    fixed: Fixed,
) -> tuple[Encoded, Tensor | None]:
    """Return the stream and the buffer that `scale_and_add` was given; width None: no buffer."""
    bits = fixed.fraction_bits
    if _fused(encoded, buffer, increment, factor, width, fixed):
        new = empty(encoded.value, bits)
        before = None if width is None else torch.empty_like(new.value, dtype=width)
        if new.value.numel() == 0 or is_fake(new.value):
            return new, before
        encoded = Encoded(like(encoded.value, new.value), like(encoded.residual, new.value))
        buffer = like(buffer, new.value)
        increment, factor = _like(increment, factor, new.value)
        if new.value.is_cpu:
            cpu.subtract_and_divide(encoded, buffer, increment, new, before, factor, bits)
            return new, before
        if _launched(encoded, buffer, increment, new, before, None, -1, factor, bits, 0):
            return new, before
    stream, rest = reference.subtract_and_divide(
        encoded, buffer, increment, factor, width or torch.int64, bits
    )
    return stream, None if width is None else rest


def _fused(
    encoded: Encoded,
    buffer: Tensor | None,
    increment: Increment,
    factor: Factor,
    width: torch.dtype | None,
    fixed: Fixed,
) -> bool:
    """Return whether one fused pass may do it: plain memory, and numbers that do not overflow."""
    tensors = (*encoded, *increment.parts, *(() if buffer is None else (buffer,)))
    if factor.scale is not None:
        scale: Tensor = factor.scale
        return (
            scale.dtype in _FLOATS
            and scale.device == encoded.value.device
            and fusible((*tensors, scale))
        )
    # A buffer of int64 may hold more than float64 does.
    dtypes = width, None if buffer is None else buffer.dtype
    return torch.int64 not in dtypes and is_small(factor, fixed) and fusible(tensors)


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _like(increment: Increment, factor: Factor, pattern: Tensor) -> tuple[Increment, Factor]:
    """Return an increment and a factor with the memory layout of a dense tensor."""
    increment = increment.with_parts(like(part, pattern) for part in increment.parts)
    if factor.scale is not None:
        factor = factor._replace(scale=like(factor.scale.expand(pattern.shape), pattern))
    return increment, factor


def _launched(
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
    """Write to `new` by the Triton kernel; return False where there is none."""
    if launcher() is None:
        return False
    from .cuda import launch_scaled

    return launch_scaled(
        encoded, buffer, increment, new, new_buffer, finding, sign, factor, fraction_bits, step
    )
