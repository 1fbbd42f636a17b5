"""Fixed-point additions that autograd differentiates straight through."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._factors import Factor, Increment, multiply, times
from .._torch import apply_outside_transforms, is_forward_mode, without_tangents
from . import scaled
from .fixed import Fixed
from .format import Encoded
from .monitor import RangeMonitor
from .reference import computed


class _FixedAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        value: Tensor,
        residual: Tensor,
        increment: Tensor,
        fixed: Fixed,
        monitor: RangeMonitor | None,
        step: int,
    ) -> Encoded:
        return fixed.add(Encoded(value, residual), increment, monitor, step)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Encoded) -> None:
        ctx.value_dtype, ctx.increment_dtype = inputs[0].dtype, inputs[2].dtype
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = increment = grads[0]
        if grad is not None and grad.dtype is not ctx.increment_dtype:
            increment = grad.to(ctx.increment_dtype)
        return grad, None, increment, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        batched = (
            _batch_first(x, dim, info.batch_size)
            for x, dim in zip(args[:3], in_dims[:3], strict=True)
        )
        return tuple(_DualAdd.apply(*batched, *args[3:])), (0, 0)


class _DualAdd(_FixedAdd):
    """Add with forward-mode differentiation, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, value: Any, residual: Any, increment: Any, *_: Any) -> Any:
        return _sum(value, increment, ctx.value_dtype), None


class _FixedAddNow(torch.autograd.Function):
    """Add without transforms: `setup_context` would bind the arguments by inspection each time.

    Written out, as calls of Python count in every step. `held` is a list of the residual, in whose
    place the new one comes: as an argument and a result it would cost as much as the addition.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        increment: Tensor,
        held: list[Tensor],
        fixed: Fixed,
        monitor: RangeMonitor | None,
        step: int,
    ) -> Tensor:
        new: Tensor
        new, held[0] = fixed._combine(Encoded(value, held[0]), increment, 1, monitor, step)
        ctx.value_dtype, ctx.increment_dtype = value.dtype, increment.dtype
        ctx.set_materialize_grads(False)
        return new

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        increment = grad
        if grad is not None and grad.dtype is not ctx.increment_dtype:
            increment = grad.to(ctx.increment_dtype)
        return grad, increment, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, value: Any, increment: Any, *_: Any) -> Any:
        return _sum(value, increment, ctx.value_dtype)


_add_now = apply_outside_transforms(_FixedAddNow)


class _FixedEncode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, fixed: Fixed, monitor: RangeMonitor | None, step: int) -> Encoded:
        return fixed.encode(x, monitor, step)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Encoded) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        return grads[0], None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return tuple(
            _DualEncode.apply(_batch_first(args[0], in_dims[0], info.batch_size), *args[1:])
        ), (0, 0)


class _DualEncode(_FixedEncode):
    """Encode with forward-mode differentiation, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        return x, None


def _batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def fixed_add(
    encoded: Encoded,
    increment: Tensor,
    fixed: Fixed,
    monitor: RangeMonitor | None = None,
    step: int = 0,
) -> Encoded:
    """Return `fixed.add(encoded, increment)`, differentiable: the gradient passes straight through.

    The gradient of the value goes unchanged to the value of the stream and, in its dtype, to the
    increment; nothing is saved.

    Args:
        encoded: a stream of this format.
        increment: floating point, of its shape or broadcast to it.
        fixed: the format.
        monitor: see `Fixed.add`.
        step: see `Fixed.add`.
    """
    if increment.shape != encoded.value.shape:
        increment = increment.expand(encoded.value.shape)
    if torch.compiler._is_exporting_flag:
        new = fixed.add(encoded, increment, monitor, step)
        return Encoded(
            straight_through(encoded.value + increment.to(encoded.value.dtype), new.value),
            new.residual,
        )
    if torch.compiler.is_compiling():
        add: Any = _FixedAdd.apply
    elif torch._C._are_functorch_transforms_active():
        add = _DualAdd.apply
    else:
        held = [encoded.residual]
        value = _add_now(encoded.value, increment, held, fixed, monitor, step)
        return Encoded(value, held[0])
    return Encoded(*add(*encoded, increment, fixed, monitor, step))


def fixed_encode(
    x: Tensor, fixed: Fixed, monitor: RangeMonitor | None = None, step: int = -1
) -> Encoded:
    """Return `fixed.encode(x)`, differentiable straight through."""
    if torch.compiler._is_exporting_flag:
        encoded = fixed.encode(x, monitor, step)
        return Encoded(straight_through(x, encoded.value), encoded.residual)
    encode = _FixedEncode if torch.compiler.is_compiling() else _DualEncode
    return Encoded(*encode.apply(x, fixed, monitor, step))


def straight_through(like: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of `like`, in operations.

    Of a Function, exported programs keep only the forward.
    """
    return value.detach() + (like - like.detach()) if torch.is_grad_enabled() else value


class _ScaledAdd(torch.autograd.Function):
    """Scale and add in one pass; the gradient is that of the rule on floats."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        residual: Tensor,
        buffer: Tensor | None,
        addend: Tensor,
        less: Tensor | None,
        scale: Tensor | None,
        gain: float,
        factor: Factor,
        width: torch.dtype,
        fixed: Fixed,
        monitor: RangeMonitor | None,
        step: int,
    ) -> tuple[Tensor, ...]:
        increment = Increment(addend, gain, less)
        encoded, after = scaled.scale_and_add(
            Encoded(value, residual), buffer, increment, factor, width, fixed, monitor, step
        )
        ctx.factors = None if scale is not None else factor.least / factor.denominator, gain
        ctx.dtypes = value.dtype, addend.dtype, None if less is None else less.dtype
        if scale is not None:
            _save(ctx, value, scale, ctx.needs_input_grad[0], ctx.needs_input_grad[5])
            ctx.like_scale = scale.shape, scale.dtype
        ctx.mark_non_differentiable(encoded.residual, after)
        ctx.set_materialize_grads(False)
        return *encoded, after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 12
        needs_value, _, _, needs_addend, needs_less, needs_scale = ctx.needs_input_grad[:6]
        (factor, gain), dtypes = ctx.factors, ctx.dtypes
        of_value = of_scale = None
        if factor is not None:
            of_value = _times(grad, factor, dtypes[0]) if needs_value else None
        else:
            value, scale = ctx.saved_tensors
            of_value = multiply(grad, scale) if needs_value else None
            if needs_scale:
                shape, dtype = ctx.like_scale
                of_scale = (grad * value).sum_to_size(shape).to(dtype)
        addend = _times(grad, gain, dtypes[1]) if needs_addend else None
        less = _times(grad, -gain, dtypes[2]) if needs_less else None
        return of_value, None, None, addend, less, of_scale, *(None,) * 6

    @staticmethod
    def jvp(
        ctx: Any, value: Any, residual: Any, buffer: Any, addend: Any, less: Any, *_: Any
    ) -> Any:
        factor, gain = ctx.factors
        parts = (value, factor), (addend, gain), (less, -gain)
        tangents = [_times(x, by, ctx.dtypes[0]) for x, by in parts if x is not None]
        return functools.reduce(torch.add, tangents) if tangents else None, None, None


def _save(ctx: Any, value: Tensor, scale: Tensor, for_value: bool, for_scale: bool) -> None:
    """Save what the gradients of a product read, where they are asked for."""
    ctx.save_for_backward(value if for_scale else None, scale if for_value else None)


class _Saved(torch.autograd.Function):
    """Save what `_ScaledAdd` saves, and compute nothing."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor) -> Tensor:
        _save(ctx, value, scale, *ctx.needs_input_grad)
        return value.new_empty(0)


def save_product(value: Tensor, scale: Tensor) -> Tensor:
    """Save for backward what `scaled_add` saves of a stream and its factors."""
    nothing: Tensor = _Saved.apply(value, scale)
    return nothing


def _times(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    return (x if factor == 1.0 else times(x, factor)).to(dtype)


def scaled_add(
    encoded: Encoded,
    buffer: Tensor | None,
    increment: Increment,
    factor: Factor,
    width: torch.dtype,
    fixed: Fixed,
    monitor: RangeMonitor | None,
    step: int,
) -> tuple[Encoded, Tensor]:
    """Return `scaled.scale_and_add`, differentiable straight through."""
    scale = factor.scale
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        # For forward mode, the graph would keep a factor outside of all hooks.
        or (scale is not None and is_forward_mode())
    ):
        with torch.no_grad(), without_tangents():
            new, after = scaled.scale_and_add(
                encoded, buffer, increment, factor, width, fixed, monitor, step
            )
        # The gradient is that of the rule on floats.
        by = factor.least / factor.denominator if scale is None else scale
        smooth = multiply(encoded.value, by) + computed(increment).to(encoded.value.dtype)
        return Encoded(with_gradient_of(smooth, new.value), new.residual), after
    addend, gain, less = increment
    value, residual, after = _ScaledAdd.apply(
        *encoded, buffer, addend, less, scale, gain, factor, width, fixed, monitor, step
    )
    return Encoded(value, residual), after


def with_gradient_of(like: Tensor, value: Tensor) -> Tensor:
    """Return the second of two tensors of equal shape, with the gradient of the first."""
    if torch.compiler._is_exporting_flag:
        return straight_through(like, value)
    valued = _Valued if torch.compiler.is_compiling() else _DualValued
    new: Tensor = valued.apply(like, value)
    return new


class _Valued(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(like: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        return grads[0], None


class _DualValued(_Valued):
    """The same with forward-mode differentiation, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, like: Tensor | None, value: Tensor | None) -> Tensor | None:
        # An output that is a view of an input has a tangent that is a view of one, too.
        return None if like is None else like.view_as(like)


def _sum(value: Tensor | None, increment: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the sum of two tangents, of which either may be None, in this dtype."""
    if increment is not None and increment.dtype is not dtype:
        increment = increment.to(dtype)
    if value is None or increment is None:
        return increment if value is None else value
    return value + increment
