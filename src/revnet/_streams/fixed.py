"""How a stream is held: as floating point, or as fixed-point numbers that add and subtract without loss.

`Fixed` exists in three implementations of one arithmetic, equal in every bit: plain torch
operations (the reference), a Triton kernel (`_kernels.py`), and for the CPU a variant that works in
place, in few passes. Compilers see one operator.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .monitor import RangeMonitor, is_fake, key_of

# Magnitudes below 2^39 units: what a float32 of 24 and a bfloat16 of 8 significant bits leave over
# then fits 16 and 32 bits. Formats whose units are finer than 2^-24 keep 15 integer bits, and leave
# twice the bits over.
_MAGNITUDE_BITS = 39
_INTEGER_BITS = 15
# Sums are taken in float64, of whose 53 bits one stays free.
_LARGEST_FRACTION = 52 - _INTEGER_BITS

DEFAULT_FRACTION_BITS = _MAGNITUDE_BITS - _INTEGER_BITS


@dataclass(frozen=True)
class Float:
    """Streams held as the floating-point tensors themselves: `(x + f) - f` is then close to x, not equal to it."""


class Held(NamedTuple):
    """A fixed-point stream: the numbers that branches read, and what rounding to their type left over, as integers.

    Tensors, or equal trees of tensors; the stream is `value + residual · 2^-fraction_bits`.
    """

    value: Any
    residual: Any


@dataclass(frozen=True)
class Fixed:
    """Streams held as integers, value = integer × 2^-fraction_bits, so that subtracting undoes adding in every bit.

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
        if not 0 <= bits <= _LARGEST_FRACTION:
            raise ValueError(
                f"Fixed(fraction_bits={bits}): expected 0 to {_LARGEST_FRACTION} fraction bits"
            )

    @property
    def limit(self) -> float:
        """The smallest magnitude that a stream cannot hold: 2^(39 - fraction_bits), and at least 2^15."""
        return 2.0 ** max(_MAGNITUDE_BITS - self.fraction_bits, _INTEGER_BITS)

    @property
    def unit(self) -> float:
        """What an integer of one stands for."""
        return 2.0**-self.fraction_bits

    def limit_in(self, dtype: torch.dtype) -> float:
        """The same for a stream of this dtype: float16 ends at 65504."""
        return min(self.limit, torch.finfo(dtype).max)

    def residual_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What is left over of a stream of this dtype fits this one."""
        wide = self.fraction_bits > DEFAULT_FRACTION_BITS
        if dtype in (torch.bfloat16, torch.float16):
            return torch.int64 if wide else torch.int32
        return torch.int32 if wide else torch.int16

    def encode(self, x: Tensor, monitor: RangeMonitor | None = None, step: int = -1) -> Held:
        """Return x rounded to the format; x: any floating dtype and shape, strides as an elementwise operation on x."""
        return self._combine(None, x, 1, monitor, step)

    def add(
        self, held: Held, increment: Tensor, monitor: RangeMonitor | None = None, step: int = 0
    ) -> Held:
        """Return `held + increment`, the increment rounded to the format.

        Args:
            held: a stream of this format, any shape and strides.
            increment: floating point, of held's shape or broadcast to it.
            monitor: told, without synchronisation, about sums that leave the range and increments
                that vanish.
            step: the number that the monitor reports.

        Returns:
            The stream, in the dtypes of held and with the strides of an elementwise operation on
            its value.
        """
        return self._combine(held, increment, 1, monitor, step)

    def subtract(self, held: Held, increment: Tensor) -> Held:
        """Return what `add` was given: the exact inverse of an addition that stayed in range."""
        return self._combine(held, increment, -1, None, 0)

    def counts(self, held: Held) -> tuple[Tensor, Tensor]:
        """Return the integers of a stream as int64, zero where it is not a number, and where it is one."""
        known = ~held.value.isnan()
        scaled = torch.where(known, held.value.double() / self.unit, 0.0)
        return scaled.to(torch.int64) + held.residual, known

    def held(self, counts: Tensor, known: Tensor, dtype: torch.dtype) -> Held:
        """Return the stream of this dtype with these integers; not a number elsewhere, and beyond the range."""
        return self._split(torch.where(known, counts.double() * self.unit, math.nan), dtype)[0]

    def _combine(
        self,
        held: Held | None,
        increment: Tensor,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> Held:
        tensors = (increment,) if held is None else (*held, increment)
        if _fusible(tensors):
            if monitor is not None and held is not None:
                monitor.sample(increment, self.unit, step)
            return self._fused(held, increment, sign, monitor, step)
        if (
            torch.compiler.is_dynamo_compiling()
            and not torch.compiler._is_exporting_flag
            and _are_plain(tensors)
        ):
            # One operator that the compiler does not look into: what it fused with float64 it would
            # vectorise in another way, and so evaluate a branch in backward with other roundings
            # than in forward.
            value, residual, found = _operator(
                *(held or (None, None)), increment, sign, self.fraction_bits, step
            )
            if monitor is not None:
                monitor.note(found)
            return Held(value, residual)
        return self._reference(held, increment, sign, monitor, step)

    def _fused(
        self,
        held: Held | None,
        increment: Tensor,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> Held:
        value = increment if held is None else held.value
        new = Held(
            torch.empty_like(value), torch.empty_like(value, dtype=self.residual_dtype(value.dtype))
        )
        if value.numel() == 0 or is_fake(value):
            return new
        if held is not None:
            held = Held(_like(value, new.value), _like(held.residual, new.value))
        increment = _like(increment, new.value)
        if value.is_cpu:
            self._combine_in_cache(held, increment, new, sign, monitor, step)
        elif not self._launched(held, increment, new, sign, monitor, step):
            self._combine_into(held, increment, new, sign, monitor, step)
        return new

    def _reference(
        self,
        held: Held | None,
        increment: Tensor,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> Held:
        """What the fused implementations equal in every bit. All sums are exact: of fewer than 53 bits."""
        added = torch.round(increment.double() / self.unit) * (sign * self.unit)
        if held is None:
            total, known = 0.0 + added, None
        else:
            # held comes first in every operation: the first operand decides the strides of the
            # result.
            known = ~held.value.isnan()
            total = held.value.double() + held.residual.double() * self.unit + added
        new, inside = self._split(total, increment.dtype if held is None else held.value.dtype)
        if monitor is not None:
            monitor.observe(
                ~inside if known is None else known & ~inside, total.abs().to(torch.float32), step
            )
        return new

    def _split(self, total: Tensor, dtype: torch.dtype) -> tuple[Held, Tensor]:
        """Return a float64 stream in its two parts, and where it is in range."""
        inside = total.abs() < self.limit_in(dtype)
        total = torch.where(inside, total, math.nan)
        value = read = total if dtype == torch.float64 else total.to(torch.float32).to(dtype)
        if torch.compiler.is_compiling() and dtype != torch.float64:
            # Where it differentiates, inductor leaves out what lies between two float64, and with
            # it the rounding.
            read = value.view(torch.int16 if value.itemsize == 2 else torch.int32).view(dtype)
        rest = (total - read.double()) / self.unit
        return Held(value, torch.where(inside, rest, 0.0).to(self.residual_dtype(dtype))), inside

    def _launched(
        self,
        held: Held | None,
        increment: Tensor,
        new: Held,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> bool:
        launch = _launcher()
        finding = None if monitor is None else monitor.prepare(new.value.device).key
        bits, bound, key = (
            self.fraction_bits,
            _bound(self.fraction_bits, new.value.dtype),
            key_of(step),
        )
        return launch is not None and launch(held, increment, new, finding, sign, bits, bound, key)

    def _combine_into(
        self,
        held: Held | None,
        increment: Tensor,
        new: Held,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> None:
        """The reference, written to memory that exists."""
        for into, part in zip(
            new, self._reference(held, increment, sign, monitor, step), strict=True
        ):
            into.copy_(part)

    def _combine_in_cache(
        self,
        held: Held | None,
        increment: Tensor,
        new: Held,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> None:
        """Combine on the CPU in place, piece by piece, with as few passes as possible.

        A reduction per piece shows that every number is in range; a piece where it does not is left
        to the reference.
        """
        scale, bound = 1.0 / self.unit, _bound(self.fraction_bits, new.value.dtype)
        size = increment.numel()
        length = _PIECE * torch.get_num_threads()
        pieces = [(increment, *new, *(held or ()))]
        if size > length or not new.value.is_contiguous():
            flat = [x.as_strided((size,), (1,)) for x in pieces[0]]
            pieces = [
                tuple(x[start : start + length] for x in flat) for start in range(0, size, length)
            ]
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
            if not (low.item() > -bound and high.item() < bound):  # so also for NaN
                piece = None if held is None else Held(*before)
                self._combine_into(piece, addend, Held(value, residual), sign, monitor, step)
                continue
            # Without held, minus zero is as yet zero's other form.
            value.copy_(torch.add(total, 0.0, out=other).mul_(self.unit))
            residual.copy_(total.sub_(other.copy_(value), alpha=scale))


# Elements per thread and piece. Smaller pieces stay in a level-2 cache but cost more in calls than
# that saves; this bounds the scratch memory and stays in a level-3 cache. A multiple of the length
# that torch gives to a thread.
_PIECE = 262144


def _like(x: Tensor, pattern: Tensor) -> Tensor:
    """Return x with the memory layout of a dense tensor, x itself where it has it."""
    same = x.stride() == pattern.stride() or (x.is_contiguous() and pattern.is_contiguous())
    if same and x.shape == pattern.shape and not x.is_neg():
        return x
    return torch.empty_like(pattern, dtype=x.dtype).copy_(x)


@cache
def _bound(fraction_bits: int, dtype: torch.dtype) -> int:
    """The smallest integer that a stream cannot hold."""
    fixed = Fixed(fraction_bits)
    return int(fixed.limit_in(dtype) / fixed.unit)


_PLAIN = (Tensor, torch.nn.Parameter)


def _are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor is of a subclass, such as a distributed one."""
    return all(type(x) in _PLAIN for x in tensors)


def _fusible(tensors: Iterable[Tensor]) -> bool:
    """Whether there is a fused implementation, and the memory may be worked on: not traced, not batched.

    Fake tensors have no memory, and take what the fused implementation would.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    for x in tensors:
        if type(x) not in _PLAIN:
            if is_fake(x):
                continue
            return False
        if transformed and torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        if not x.is_cpu and (not x.is_cuda or _launcher() is None):
            return False
    # Looking for a mode that traces takes longer than all of the above: first whether there is any
    # mode at all.
    if (
        not torch._C._len_torch_dispatch_stack()
        and not torch._ops._len_torch_dispatch_stack_pre_dispatch()
    ):
        return True
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is None or proxies.get_proxy_mode() is None


@cache
def _launcher() -> Callable[..., bool] | None:
    try:
        from .cuda import launch
    except ImportError:
        return None
    return launch


def fitting_fraction_bits(magnitude: float) -> int | None:
    """Return the largest number of fraction bits with which a stream holds this magnitude, None where none does."""
    formats = (Fixed(bits) for bits in range(_LARGEST_FRACTION, -1, -1))
    return next(
        (fixed.fraction_bits for fixed in formats if magnitude + fixed.unit < fixed.limit), None
    )


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
    """`Fixed._combine` for compilers; returns also what the monitor is to be told."""
    found = torch.zeros(1, dtype=torch.int64, device=increment.device)
    fixed, monitor = Fixed(fraction_bits), RangeMonitor.writing_to(found)
    held = None if value is None or residual is None else Held(value, residual)
    fused = _fusible((increment, *(held or ())))
    return *(fixed._fused if fused else fixed._reference)(
        held, increment, sign, monitor, step
    ), found


@_operator.register_fake
def _(
    value: Tensor | None,
    residual: Tensor | None,
    increment: Tensor,
    sign: int,
    fraction_bits: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    value = increment if value is None else value
    residual = torch.empty_like(value, dtype=Fixed(fraction_bits).residual_dtype(value.dtype))
    return torch.empty_like(value), residual, increment.new_empty(1, dtype=torch.int64)


class _FixedAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        value: Tensor,
        residual: Tensor,
        increment: Tensor,
        fixed: Fixed,
        monitor: RangeMonitor | None,
        step: int,
    ) -> Held:
        return fixed.add(Held(value, residual), increment, monitor, step)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Held) -> None:
        ctx.increment_dtype = inputs[2].dtype
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = increment = grads[0]
        if grad is not None and grad.dtype is not ctx.increment_dtype:
            increment = grad.to(ctx.increment_dtype)
        return grad, None, increment, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
        value, _, increment = tangents[:3]
        if value is None or increment is None:
            return increment if value is None else value, None
        return value + increment.to(value.dtype), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        batched = (
            _batch_first(x, dim, info.batch_size)
            for x, dim in zip(args[:3], in_dims[:3], strict=True)
        )
        return tuple(_FixedAdd.apply(*batched, *args[3:])), (0, 0)


class _FixedAddNow(torch.autograd.Function):
    """The same without transforms: `setup_context` binds the arguments by inspection, in each call."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        residual: Tensor,
        increment: Tensor,
        fixed: Fixed,
        monitor: RangeMonitor | None,
        step: int,
    ) -> Held:
        output = _FixedAdd.forward(value, residual, increment, fixed, monitor, step)
        _FixedAdd.setup_context(ctx, (value, residual, increment), output)
        return output

    backward = _FixedAdd.backward
    jvp = _FixedAdd.jvp


class _FixedEncode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, fixed: Fixed, monitor: RangeMonitor | None, step: int) -> Held:
        return fixed.encode(x, monitor, step)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Held) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        return grads[0], None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
        return tangents[0], None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return tuple(
            _FixedEncode.apply(_batch_first(args[0], in_dims[0], info.batch_size), *args[1:])
        ), (0, 0)


def _batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def fixed_add(
    held: Held, increment: Tensor, fixed: Fixed, monitor: RangeMonitor | None = None, step: int = 0
) -> Held:
    """Return `fixed.add(held, increment)`, differentiable: the gradient passes straight through.

    The gradient of the value goes unchanged to held's value and, in its dtype, to the increment;
    nothing is saved.

    Args:
        held: a stream of this format.
        increment: floating point, of held's shape or broadcast to it.
        fixed: the format.
        monitor: see `Fixed.add`.
        step: see `Fixed.add`.
    """
    if increment.shape != held.value.shape:
        increment = increment.expand(held.value.shape)
    if torch.compiler._is_exporting_flag:
        new = fixed.add(held, increment, monitor, step)
        return Held(
            straight_through(held.value + increment.to(held.value.dtype), new.value), new.residual
        )
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    add = _FixedAdd if transformed else _FixedAddNow
    return Held(*add.apply(*held, increment, fixed, monitor, step))


def fixed_encode(
    x: Tensor, fixed: Fixed, monitor: RangeMonitor | None = None, step: int = -1
) -> Held:
    """Return `fixed.encode(x)`, differentiable straight through."""
    if torch.compiler._is_exporting_flag:
        held = fixed.encode(x, monitor, step)
        return Held(straight_through(x, held.value), held.residual)
    return Held(*_FixedEncode.apply(x, fixed, monitor, step))


def straight_through(like: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of `like`, in operations: of a Function, exported programs keep the forward."""
    return value.detach() + (like - like.detach()) if torch.is_grad_enabled() else value


# The multipliers of SplitMix64 (Steele et al. 2014), and its increment as the step from one index
# to the next.
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_INDEX = -0x61C8864680B583EB
_PIECE_OF_CHECKSUM = 1 << 22


def checksum(x: Tensor) -> Tensor:
    """Return a 64-bit checksum of the bits and places of x's elements, int64 of no dimension, on x's device.

    Each element's bits are mixed with its index by a bijection of 64 bits and the results are
    added: one changed element always changes the sum, any other change with probability 1 - 2^-64.
    Independent of strides, and equal on every device.

    Args:
        x: integers or floating point, any shape.
    """
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.detach().reshape(-1).view(width)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, bits.numel(), _PIECE_OF_CHECKSUM):
        piece = bits[start : start + _PIECE_OF_CHECKSUM].to(torch.int64)
        mixed = torch.arange(start + 1, start + 1 + piece.numel(), device=x.device) * _INDEX + piece
        for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
            mixed = (mixed ^ _shifted(mixed, shift)) * multiplier
        total += (mixed ^ _shifted(mixed, 31)).sum()
    return total


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros: with copies of the sign, mixing would not be a bijection."""
    return x.bitwise_right_shift(by).bitwise_and(2 ** (64 - by) - 1)
