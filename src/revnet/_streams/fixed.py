"""Fixed-point numbers that add and subtract without loss.

`Fixed` exists in three implementations of one arithmetic, equal in every bit: plain torch
operations (`reference`), a Triton kernel (`cuda`), and for the CPU a variant that works in place,
in few passes (`cpu`). Compilers see one operator.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._torch import count_modes, is_before_dispatch
from . import cpu, format, reference
from .format import DEFAULT_FRACTION_BITS, LARGEST_FRACTION, Encoded
from .monitor import RangeMonitor, is_fake, key_of


@dataclass(frozen=True)
class Fixed:
    """Hold streams as integers × 2^-fraction_bits: subtracting undoes adding in every bit.

    A branch output is rounded to the nearest multiple of 2^-fraction_bits (ties to even) and added
    as an integer. NaN, infinity, and sums that reach `limit` become NaN, which no later addition
    removes: nothing wraps around.

    The integer is held in two parts: its value in the type that branches read, and what that
    rounding left over, in int16 (float32 and float64 streams) or int32 (bfloat16 and float16), or
    int32 and int64 with more than 24 fraction bits. Reading a stream is then free, and an addition
    moves little more memory than one of floats.

    Args:
        fraction_bits: from 0 to 37. The rounding error of an addition is at most 2^-(fraction_bits
            + 1). The default, 24, rounds as float32 does for numbers around one, and holds ±32,768.

    Raises:
        TypeError, ValueError: fraction bits that are no such integer.

    Reference: MacKay et al. 2018, "Reversible Recurrent Neural Networks" (arXiv:1810.10999),
    section 4.2.
    """

    fraction_bits: int = DEFAULT_FRACTION_BITS

    def __post_init__(self) -> None:
        bits = self.fraction_bits
        if not isinstance(bits, int) or isinstance(bits, bool):
            raise TypeError(f"Fixed(fraction_bits={bits!r}): expected an integer")
        if not 0 <= bits <= LARGEST_FRACTION:
            raise ValueError(
                f"Fixed(fraction_bits={bits}): expected 0 to {LARGEST_FRACTION} fraction bits"
            )

    @property
    def limit(self) -> float:
        """Return the smallest magnitude no stream holds: 2^(39 - fraction_bits), at least 2^15."""
        return format.limit(self.fraction_bits)

    @property
    def unit(self) -> float:
        """Return what an integer of one stands for."""
        return format.unit(self.fraction_bits)

    def limit_in(self, dtype: torch.dtype) -> float:
        """Return the limit of a stream of this dtype: float16 ends at 65504."""
        return format.limit_in(self.fraction_bits, dtype)

    def residual_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the integers that hold what rounding to this dtype leaves over."""
        return format.residual_dtype(self.fraction_bits, dtype)

    def encode(self, x: Tensor, monitor: RangeMonitor | None = None, step: int = -1) -> Encoded:
        """Return x rounded to the format.

        Args:
            x: any floating dtype and shape.
            monitor: see `add`.
            step: see `add`.

        Returns:
            The stream, in the dtype of x and with the strides of an elementwise operation on x.
        """
        return self._combine(None, x, 1, monitor, step)

    def add(
        self,
        encoded: Encoded,
        increment: Tensor,
        monitor: RangeMonitor | None = None,
        step: int = 0,
    ) -> Encoded:
        """Return `encoded + increment`, the increment rounded to the format.

        Args:
            encoded: a stream of this format, any shape and strides.
            increment: floating point, of its shape or broadcast to it.
            monitor: told, without synchronisation, about sums that leave the range and increments
                that vanish.
            step: the number that the monitor reports.

        Returns:
            The stream, in its dtypes and with the strides of an elementwise operation on
            its value.
        """
        return self._combine(encoded, increment, 1, monitor, step)

    def subtract(self, encoded: Encoded, increment: Tensor) -> Encoded:
        """Return what `add` was given: the exact inverse of an addition that stayed in range."""
        return self._combine(encoded, increment, -1, None, 0)

    def counts(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return a stream's integers as int64, zero where it is NaN, and where it is a number."""
        return reference.counts(encoded, self.fraction_bits)

    def held(self, counts: Tensor, known: Tensor, dtype: torch.dtype) -> Encoded:
        """Return the stream with these integers; NaN elsewhere and beyond the range."""
        total = torch.where(known, counts.double() * self.unit, math.nan)
        return reference.split(total, self.fraction_bits, dtype)[0]

    def _combine(
        self,
        encoded: Encoded | None,
        increment: Tensor,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> Encoded:
        # Dynamo is to trace no look at what was launched: it would compile again after each launch.
        if not torch.compiler.is_dynamo_compiling() and LAUNCHES and encoded is not None:
            new = _relaunched(encoded, increment, sign, self.fraction_bits, monitor, step)
            if new is not None:
                return new
        tensors = (increment,) if encoded is None else (*encoded, increment)
        if fusible(tensors):
            if monitor is not None and encoded is not None:
                monitor.sample(increment, self.fraction_bits, step)
            return _fused(encoded, increment, sign, self.fraction_bits, monitor, step)
        if (
            torch.compiler.is_dynamo_compiling()
            and not torch.compiler._is_exporting_flag
            and _are_plain(tensors)
        ):
            # One operator that the compiler does not look into: what it fused with float64 it would
            # vectorise in another way, and so evaluate a branch in backward with other roundings
            # than in forward.
            value, residual, found = _operator(
                *(encoded or (None, None)), increment, sign, self.fraction_bits, step
            )
            if monitor is not None:
                monitor.note(found)
            return Encoded(value, residual)
        return reference.combine(encoded, increment, sign, self.fraction_bits, monitor, step)


def fitting_fraction_bits(magnitude: float) -> int | None:
    """Return the most fraction bits with which a stream holds this magnitude; None: no format."""
    formats = (Fixed(bits) for bits in range(LARGEST_FRACTION, -1, -1))
    return next(
        (fixed.fraction_bits for fixed in formats if magnitude + fixed.unit < fixed.limit), None
    )


# Launches a kernel that was built before, for CUDA alone. It takes the addresses of its tensors,
# these and their number of elements joined bit by bit, that number, and the key of the step; it
# returns False where it does not launch.
Launch = Callable[[Sequence[int | None], int, int, int], bool]
# By what Triton would look at to find the kernel: asking it takes as long again as launching.
LAUNCHES: dict[tuple[Any, ...], Launch] = {}


def _relaunched(
    encoded: Encoded,
    increment: Tensor,
    sign: int,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> Encoded | None:
    """Combine plain tensors of one dense layout by a kernel that was built before; None for others.

    What `_fused` does, without its calls: the host runs this twice a step.
    """
    value, residual = encoded
    device, finding = increment.get_device(), None
    launch = LAUNCHES.get(
        (value.dtype, increment.dtype, device, sign, fraction_bits, monitor is None)
    )
    if (
        launch is None
        or not (type(value) is type(residual) is type(increment) is Tensor)
        or not value.get_device() == residual.get_device() == device
        or value.shape != increment.shape
        or not (value.is_contiguous() and residual.is_contiguous() and increment.is_contiguous())
        or value.is_neg()
        or increment.is_neg()
        or torch._C._is_tracing()
        or count_modes()
        or is_before_dispatch()
    ):
        return None
    if monitor is not None:
        finding = monitor.addresses.get(device)
        if finding is None:
            return None
    try:
        read = value.data_ptr(), residual.data_ptr(), increment.data_ptr()
    except RuntimeError:
        # A wrapper of a transform has no memory of its own.
        return None
    if not all(read):
        return None
    new = Encoded(torch.empty_like(value), torch.empty_like(residual))
    written = new.value.data_ptr(), new.residual.data_ptr()
    size = value.numel()
    bits = size | read[0] | read[1] | read[2] | written[0] | written[1]
    if not launch((*read, *written, finding), bits, size, key_of(step)):
        return None
    if monitor is not None:
        monitor.sample(increment, fraction_bits, step)
    return new


def _fused(
    encoded: Encoded | None,
    increment: Tensor,
    sign: int,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> Encoded:
    value = increment if encoded is None else encoded.value
    new = empty(value, fraction_bits)
    if value.numel() == 0 or value.is_meta or (type(value) is not Tensor and is_fake(value)):
        return new
    parts = (increment,) if encoded is None else (*encoded, increment)
    if (
        not all(map(_is_contiguous, parts))
        or increment.shape != value.shape
        or any(map(_is_neg, parts))
    ):
        if encoded is not None:
            encoded = Encoded(like(value, new.value), like(encoded.residual, new.value))
        increment = like(increment, new.value)
    if value.is_cpu:
        cpu.combine(encoded, increment, new, sign, fraction_bits, monitor, step)
    elif not launched(encoded, increment, new, sign, fraction_bits, monitor, step):
        reference.combine_into(encoded, increment, new, sign, fraction_bits, monitor, step)
    return new


def launched(
    encoded: Encoded | None,
    increment: Tensor,
    new: Encoded,
    sign: int,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> bool:
    """Combine into `new` by the Triton kernel; return False where there is none."""
    launch = launcher()
    finding = None if monitor is None else monitor.prepare(new.value.device).key
    return launch is not None and launch(
        encoded, increment, new, finding, sign, fraction_bits, step
    )


def empty(value: Tensor, fraction_bits: int) -> Encoded:
    """Return memory for a stream of the shape, dtype and dense layout of an operation on value."""
    dtype = _residual_dtype(fraction_bits, value.dtype)
    return Encoded(torch.empty_like(value), torch.empty_like(value, dtype=dtype))


# Not the function itself: compilers that trace it would warn of a cache.
_residual_dtype = cache(format.residual_dtype)


def like(x: Tensor, pattern: Tensor) -> Tensor:
    """Return x with the memory layout of a dense tensor, x itself where it has it."""
    same = x.stride() == pattern.stride() or (x.is_contiguous() and pattern.is_contiguous())
    if same and x.shape == pattern.shape and not x.is_neg():
        return x
    return torch.empty_like(pattern, dtype=x.dtype).copy_(x)


_is_contiguous, _is_neg = Tensor.is_contiguous, Tensor.is_neg
_PLAIN = (Tensor, torch.nn.Parameter)


def _are_plain(tensors: Iterable[Tensor]) -> bool:
    """Return whether no tensor is of a subclass, such as a distributed one."""
    return all(type(x) in _PLAIN for x in tensors)


def fusible(tensors: Sequence[Tensor]) -> bool:
    """Return whether a fused implementation may work on this memory: not traced, not batched.

    Fake tensors have no memory, and take what the fused implementation would.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    for x in tensors:
        if type(x) not in _PLAIN:
            if is_fake(x):
                continue
            return False
        if not x.is_cpu and (not x.is_cuda or launcher() is None):
            return False
    # Also a wrapper that outlived its transform, which has no memory of its own.
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return False
    if not (count_modes() or is_before_dispatch()):
        return True
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is None or proxies.get_proxy_mode() is None


@cache
def launcher() -> Callable[..., bool] | None:
    """Return the launch of the Triton kernel, None without Triton."""
    try:
        from .cuda import launch
    except ImportError:
        return None
    return launch


@torch.library.custom_op(
    "revnet::combine",
    mutates_args=(),
    schema="(Tensor? value, Tensor? residual, Tensor increment, int sign, int fraction_bits,"
    " int step) -> (Tensor, Tensor, Tensor)",
)
def _operator(
    value: Tensor | None,
    residual: Tensor | None,
    increment: Tensor,
    sign: int,
    fraction_bits: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `Fixed._combine` for compilers, and what the monitor is to be told."""
    found = torch.zeros(1, dtype=torch.int64, device=increment.device)
    monitor = RangeMonitor.writing_to(found)
    encoded = None if value is None or residual is None else Encoded(value, residual)
    run = _fused if fusible((increment, *(encoded or ()))) else reference.combine
    return *run(encoded, increment, sign, fraction_bits, monitor, step), found


@_operator.register_fake
def _(
    value: Tensor | None,
    residual: Tensor | None,
    increment: Tensor,
    sign: int,
    fraction_bits: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    new = empty(increment if value is None else value, fraction_bits)
    return *new, increment.new_empty(1, dtype=torch.int64)
