"""The operation that a compiled sequence is: its tensors, its forward and its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vjp

from .._couplings import fitting
from .._errors import ReversibleError
from .._step import BoundStep
from .._streams.arithmetic import FixedArithmetic, FloatArithmetic
from .._streams.format import Encoded

Arithmetic = FloatArithmetic | FixedArithmetic


class _Slot(NamedTuple):
    """The place of a tensor among those that go through the operation."""

    place: int


class _Tensors:
    """The tensors that go through the operation, each once: gradients reach no others."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.slots: dict[Tensor, int] = {}

    def add(self, tensor: Tensor) -> int:
        if tensor not in self.slots:
            self.slots[tensor] = len(self.tensors)
            self.tensors.append(tensor)
        return self.slots[tensor]

    def lift(self, value: Any) -> Any:
        """`value` with slots for its tensors."""
        if isinstance(value, Tensor):
            return _Slot(self.add(value))
        if type(value) is dict:
            return {key: self.lift(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.lift(item) for item in value])
        return value


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """`value` with tensors for its slots."""
    if isinstance(value, _Slot):
        return tensors[value.place]
    if type(value) is dict:
        return {key: _filled(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_filled(item, tensors) for item in value])
    return value


class _Evaluation(NamedTuple):
    """A step whose tensors are slots."""

    part: BoundStep
    # Its index in the program; parameters and buffers by name; those of all its slots that take a
    # gradient.
    place: int
    state: tuple[tuple[str, int], ...]
    differentiated: tuple[int, ...]


class _Program(NamedTuple):
    """All of the operation but its tensors."""

    steps: tuple[_Evaluation, ...]
    # The streams and, of fixed ones that are encoded, what is left over of each.
    streams: tuple[int, ...]
    residuals: tuple[int, ...]
    arithmetic: Arithmetic
    # Of the CPU and of the streams' device: its type, whether autocast is enabled there, its dtype.
    autocast: tuple[tuple[str, bool, torch.dtype], tuple[str, bool, torch.dtype]]


def _slots(value: Any) -> list[int]:
    if isinstance(value, _Slot):
        return [value.place]
    if type(value) is dict:
        value = list(value.values())
    if type(value) in (list, tuple):
        return [slot for item in value for slot in _slots(item)]
    return []


def _takes_gradient(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return False
    # Under nested transforms a tensor does not say whether an outer one differentiates it.
    return tensor.requires_grad or (
        not torch.compiler.is_compiling()
        and torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _autocast(device_type: str) -> tuple[str, bool, torch.dtype]:
    return (
        device_type,
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
    )


def _autocasting(device_type: str, enabled: bool, dtype: torch.dtype) -> torch.autocast:
    # Without the cache: a cast that another evaluation made belongs to that one's gradients.
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _without_autocast(state: tuple[str, bool, torch.dtype]) -> torch.autocast:
    device_type, _, dtype = state
    return torch.autocast(device_type, dtype=dtype, enabled=False)


def _increment(
    step: _Evaluation, target: Tensor, tensors: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """Return what a step adds, as a function of its sources and of what takes a gradient."""

    def increment(*inputs: Tensor) -> Tensor:
        count = len(step.part.source)
        filled = list(tensors)
        for slot, tensor in zip(step.differentiated, inputs[count:], strict=True):
            filled[slot] = tensor
        return _evaluated(step, target, inputs[:count], filled)

    return increment


def _evaluated(
    step: _Evaluation,
    target: Tensor,
    sources: Sequence[Tensor],
    tensors: Sequence[Tensor],
    swap: bool = True,
) -> Tensor:
    """Return what a step adds to its target; `swap` puts the tensors into its modules first."""
    fn, kwargs = step.part.fn, _filled(step.part.kwargs, tensors)
    if swap:
        state = {name: tensors[slot] for name, slot in step.state}
        # Every name of a shared tensor is among the state: looking for them again would take long
        # to trace.
        out = functional_call(fn, state, tuple(sources), kwargs, tie_weights=False)
    else:
        out = fn(*sources, **kwargs)
    added: Tensor = fitting(target, step.part.coupling.increment(out))
    return added


class _Walk(torch.autograd.Function):
    """The steps forward; in backward the same evaluations in reverse, each undoing its step."""

    generate_vmap_rule = True

    @staticmethod
    def forward(program: _Program, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _up(program, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        program, *tensors = inputs
        ctx.program = program
        ctx.modes = None if torch.compiler.is_compiling() else _modes(program)
        if program.arithmetic.exact:
            ctx.mark_non_differentiable(*output[len(program.streams) :])
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.modes is not None and ctx.modes != _modes(ctx.program):
            raise ReversibleError(
                "a module of a branch was switched between training and evaluation after the "
                "forward pass: its backward would evaluate another function. Switch after the "
                "backward pass."
            )
        transformed = (
            not torch.compiler.is_compiling()
            and torch._C._functorch.peek_interpreter_stack() is not None
        )
        if not transformed or _followed((*ctx.saved_tensors, *grads)):
            return _down(ctx.program, ctx.saved_tensors, grads)
        # A transform has the backward pass recorded, in case that another one follows it, and with
        # it all activations.
        with torch.no_grad():
            return _down(ctx.program, ctx.saved_tensors, grads)


def _up(program: _Program, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the streams after the steps and, of fixed ones, what is left over of each."""
    arithmetic = program.arithmetic
    values = [tensors[slot] for slot in program.streams]
    residuals = [tensors[slot] for slot in program.residuals]
    streams: list[Any] = (
        _held(values, residuals) if residuals else [arithmetic.hold(x) for x in values]
    )
    for step in program.steps:
        i = step.part.target
        sources = [arithmetic.read(streams[j]) for j in step.part.source]
        # A graph is traced while the modules have their tensors: to swap them in is a quarter of
        # the tracer's work.
        added = _evaluated(
            step,
            arithmetic.read(streams[i]),
            sources,
            tensors,
            swap=not torch.compiler.is_dynamo_compiling(),
        )
        streams[i] = arithmetic.add(streams[i], added, step.place)
    # Copies, because an output that is an input as well would be a view of it, and because torch
    # 2.11 loses the gradient of an output that has a second name in the graph, as `y.contiguous()`
    # in a branch may give it.
    return tuple([x.clone() for x in _tensors_of(streams)])


def _held(values: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Any]:
    """Return the streams as an arithmetic holds them; float ones have no residuals."""
    if not residuals:
        return list(values)
    return [Encoded(*parts) for parts in zip(values, residuals, strict=True)]


def _tensors_of(streams: Sequence[Any]) -> list[Tensor]:
    """Return the values of all streams and then, of fixed ones, what is left over of each."""
    if not isinstance(streams[0], Encoded):
        return list(streams)
    return [encoded.value for encoded in streams] + [encoded.residual for encoded in streams]


def _modes(program: _Program) -> list[bool]:
    return [module.training for step in program.steps for module in step.part.fn.modules()]


def _followed(tensors: Sequence[Tensor]) -> bool:
    """Check whether a transform outside of the innermost one differentiates by these tensors."""
    functorch = torch._C._functorch
    for tensor in tensors:
        while functorch.is_functorch_wrapped_tensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
            if tensor.requires_grad:
                return True
    return False


def _down(
    program: _Program, saved: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all tensors from those of the last streams."""
    arithmetic = program.arithmetic
    count = len(program.streams)
    values = list(saved[:count])
    kept = 2 * count if arithmetic.exact else count
    residuals, tensors = list(saved[count:kept]), saved[kept:]
    stream_grads = list(grads[:count])
    if torch.compiler.is_compiling():
        # The values, but known only with the gradients: a branch that reads what it read in forward
        # would otherwise be one operation with that, and its activations would stay. Copied, as the
        # choice has the gradient's strides.
        chosen = [
            torch.where(grad.isnan(), x, x) for x, grad in zip(values, stream_grads, strict=True)
        ]
        values = [torch.empty_like(x).copy_(same) for x, same in zip(values, chosen, strict=True)]
    streams = _held(values, residuals)
    collected: list[Tensor | None] = [None] * len(tensors)
    for step in program.steps[::-1]:
        i = step.part.target
        with _autocasting(*program.autocast[0]), _autocasting(*program.autocast[1]):
            inputs = [arithmetic.read(streams[j]) for j in step.part.source] + [
                tensors[slot] for slot in step.differentiated
            ]
            increment = _increment(step, arithmetic.read(streams[i]), tensors)
            evaluated: Any = vjp(increment, *inputs)
        added, pull = evaluated
        streams[i] = arithmetic.subtract(streams[i], added)
        # A graph is traced with the caller's autocast on, which would cast these products once
        # more.
        with _without_autocast(program.autocast[0]), _without_autocast(program.autocast[1]):
            pulled = pull(stream_grads[i].to(added.dtype))
        for j, grad in zip(step.part.source, pulled, strict=False):
            stream_grads[j] = stream_grads[j] + grad
        for slot, grad in zip(step.differentiated, pulled[len(step.part.source) :], strict=True):
            _accumulate(collected, slot, grad)
    for slot, grad in zip(program.streams, stream_grads, strict=True):
        _accumulate(collected, slot, grad)
    return (None, *collected)


def _accumulate(collected: list[Tensor | None], slot: int, grad: Tensor) -> None:
    present = collected[slot]
    collected[slot] = grad if present is None else present + grad
