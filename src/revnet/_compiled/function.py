"""Sequences as one differentiable operation, for `torch.compile` and transforms of `torch.func`.

Neither allows saved-tensor hooks, on which the engine rests. Here a run of steps that are not
stored is one `torch.autograd.Function` that saves the streams after its last step and the tensors
that its branches read. Its backward walks down: it evaluates each branch once with
`torch.func.vjp`, undoes the step with the result, and pulls the gradient through. Stored steps
between such runs are ordinary operations: what stays of them, autograd or the compiler decides.
Every other execution rebuilds, because what else it would keep is not the graph's to promise.

A second evaluation is right only for branches that are functions of their tensors. What draws
random numbers, moves statistics, has hooks or returns more than its update is found beforehand
(`_inspect`): a compiled graph then breaks, and the engine runs between its parts; under a transform
all steps are ordinary operations, whose activations stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from .._couplings import fitting
from .._errors import ReversibleError
from .._execution import Execution
from .._step import BoundStep, branch_output
from .._streams.arithmetic import FixedArithmetic, FloatArithmetic, Stream
from .._streams.autograd import fixed_add
from .._streams.buffer import BufferedStream
from .._streams.fixed import Fixed
from .._streams.format import Held
from .._streams.monitor import RangeMonitor
from .purity import hooked, inspecting, reason

Arithmetic = FloatArithmetic | FixedArithmetic


def active() -> bool:
    """Check whether saved-tensor hooks are not allowed: in a graph, or under a transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or inspecting()
    )


def run_traced(
    parts: Sequence[tuple[int, BoundStep]],
    streams: Sequence[Any],
    arithmetic: Arithmetic,
    executions: Sequence[Execution],
    engine: Callable[[], Any],
    blocks: Sequence[nn.Module] = (),
    obstacle: str = "",
) -> Any:
    """Return the streams after all steps, followed by a dict of extra outputs if there are any.

    Args:
        parts: the steps, each with its index in the program.
        streams: the streams before them.
        arithmetic: how streams are held.
        executions: of the program's steps. Where one is `"store"`, activations are kept; any other
            rebuilds them.
        engine: does the same outside a graph.
        blocks: modules around the branches, which are not called here.
        obstacle: why the steps should be left to the engine, if they should.
    """
    if torch.compiler.is_dynamo_compiling() and isinstance(arithmetic, FixedArithmetic):
        arithmetic = FixedArithmetic(arithmetic.fixed, _prepared(arithmetic.monitor, list(streams)))
    again = (
        [part for index, part in parts if executions[index].rebuilds]
        if torch.is_grad_enabled()
        else []
    )
    rebuild = _rebuilds(again, streams, blocks, obstacle)
    if rebuild is None:
        return outside(engine)
    # Steps that begin with a run have it encode the streams: compiled transforms take the operator
    # only inside.
    encode = not rebuild or not executions[parts[0][0]].rebuilds
    states = [arithmetic.encode(stream) if encode else (stream, None) for stream in streams]
    aux: dict[str, Any] = {}
    run: list[tuple[int, BoundStep]] = []
    for index, part in parts:
        if rebuild and executions[index].rebuilds:
            run.append((index, part))
            continue
        if run:
            states, run = _reversibly(run, states, arithmetic), []
        states[part.target], extra = _stored(index, part, states, arithmetic)
        if extra is not None:
            aux[part.name] = extra
    if run:
        states = _reversibly(run, states, arithmetic)
    values = tuple(value for value, _ in states)
    return (*values, aux) if aux else values


def _rebuilds(
    again: Sequence[BoundStep], streams: Sequence[Any], blocks: Sequence[nn.Module], obstacle: str
) -> bool | None:
    """Check whether backward evaluates these steps again; None where only the engine can do so."""
    # Exporting is read as an attribute: torch 2.11 takes the function is_exporting() for true in
    # any graph.
    exporting = torch.compiler._is_exporting_flag
    hooks = hooked(blocks)
    if hooks and (exporting or not torch.compiler.is_dynamo_compiling()):
        raise ReversibleError(
            "a block has hooks, which do not run under torch.func, torch.export and functions that "
            "trace. Put them on its branches, or on the sequence."
        )
    if exporting:
        return False
    if not again:
        # Nothing has to be evaluated again, but hooks around the branches have to run.
        return None if hooks else False
    if not all(isinstance(stream, Tensor) for stream in streams):
        obstacle = obstacle or "a stream is a tree of tensors"
    if torch.compiler.is_dynamo_compiling():
        return _replayable(again, list(streams), list(blocks), obstacle) or None
    if inspecting() or torch.compiler.is_compiling() or _forward_mode() or obstacle:
        return False
    return not reason(again, streams, blocks)


def _stored(
    index: int, part: BoundStep, states: Sequence[Stream], arithmetic: Arithmetic
) -> tuple[Stream, Any]:
    """Return the target after an ordinary step, and the extra output of its branch."""
    target = states[part.target]
    out, extra = branch_output(
        part.fn(*(states[i][0] for i in part.source), **part.kwargs), target[0]
    )
    try:
        return arithmetic.combine(part.coupling, target, out, index), extra
    except (TypeError, ValueError) as error:
        raise ReversibleError(f"{part.name} {error}") from error


def outside(engine: Callable[[], Any]) -> Any:
    """Break the graph: what `engine` does is not compiled, except what compiles itself."""
    from .dynamo import call

    return call(engine)


def _replayable(
    parts: Sequence[BoundStep], streams: list[Any], blocks: list[nn.Module], obstacle: str
) -> bool:
    """Check whether the graph may evaluate the steps again, while it is traced."""
    from .dynamo import comptime, inspect, verdict

    # A plain tuple is the same to every version of the tracer.
    steps = [
        (part.name, part.fn, part.coupling, part.target, part.source, part.kwargs) for part in parts
    ]
    comptime(inspect)
    del steps
    return not verdict()


def _prepared(monitor: RangeMonitor | None, streams: list[Any]) -> RangeMonitor | None:
    """Allocate the monitor's memory while the graph is traced; return None if it is not told."""
    from .dynamo import comptime, prepare, told

    comptime(prepare)
    del streams
    return monitor if told() else None


def _forward_mode() -> bool:
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return any(
        level.key() == torch._C._functorch.TransformType.Jvp
        for level in retrieve_all_functorch_interpreters()
    )


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
    fixed: Fixed | None
    monitor: RangeMonitor | None
    # Of the CPU and of the streams' device: its type, whether autocast is enabled there, its dtype.
    autocast: tuple[tuple[str, bool, torch.dtype], tuple[str, bool, torch.dtype]]


def _reversibly(
    parts: Sequence[tuple[int, BoundStep]], states: list[Stream], arithmetic: Arithmetic
) -> list[Stream]:
    """Return the streams after the steps, by one operation whose backward rebuilds them."""
    table = _Tensors()
    streams = tuple([table.add(value) for value, _ in states])
    fixed = monitor = None
    residuals: tuple[int, ...] = ()
    if isinstance(arithmetic, FixedArithmetic):
        fixed, monitor = arithmetic.fixed, arithmetic.monitor
        # What a stored step left in a buffer, only the engine would read again.
        helds = [held.stream if isinstance(held, BufferedStream) else held for _, held in states]
        residuals = tuple([table.add(held.residual) for held in helds if held is not None])
    steps = []
    for index, part in parts:
        state = []
        # Every name of a tensor, but one of a module: functional_call would not find its way back
        # from a second.
        for prefix, module in part.fn.named_modules():
            # What named_parameters and named_buffers list; those take far longer to trace.
            start = f"{prefix}." if prefix else ""
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        state.append((f"{start}{name}", table.add(tensor)))
            state += [
                (f"{start}{name}", table.add(getattr(module, name)))
                for name in _tensor_attributes(part.name, prefix)
            ]
        kwargs = table.lift(part.kwargs)
        used = [slot for name, slot in state if not _is_unused(part.name, name)] + _slots(kwargs)
        differentiated = []
        for slot in used:
            if slot not in differentiated and _takes_gradient(table.tensors[slot]):
                differentiated.append(slot)
        steps.append(
            _Evaluation(BoundStep(*part[:5], kwargs), index, tuple(state), tuple(differentiated))
        )
    autocast = (_autocast("cpu"), _autocast(states[0][0].device.type))
    program = _Program(tuple(steps), streams, residuals, fixed, monitor, autocast)
    # Under the compiler, a Function none of whose tensors takes a gradient fails.
    walk = _Walk.apply if any(map(_takes_gradient, table.tensors)) else _up
    outputs = walk(program, *table.tensors)
    values = outputs[: len(streams)]
    held = (
        values
        if fixed is None
        else [Held(*parts) for parts in zip(values, outputs[len(streams) :], strict=True)]
    )
    return list(zip(values, held, strict=True))


def _is_unused(step: str, name: str) -> bool:
    """Check whether a branch does not depend on a parameter, which then has no gradient."""
    if not torch.compiler.is_dynamo_compiling():
        return False
    from .dynamo import is_unused

    return is_unused(step, name)


def _tensor_attributes(step: str, prefix: str) -> tuple[str, ...]:
    """Return the names of a module's attributes that are tensors: as inputs they are checked."""
    if not torch.compiler.is_dynamo_compiling():
        return ()
    from .dynamo import tensor_attributes

    return tensor_attributes(step, prefix)


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
        if program.fixed is not None:
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
    fixed = program.fixed
    values = [tensors[slot] for slot in program.streams]
    residuals = [tensors[slot] for slot in program.residuals]
    if fixed is not None and not residuals:
        for i, value in enumerate(values):
            values[i], residual = fixed.encode(value, program.monitor)
            residuals.append(residual)
    for step in program.steps:
        i = step.part.target
        sources = [values[j] for j in step.part.source]
        # A graph is traced while the modules have their tensors: to swap them in is a quarter of
        # the tracer's work.
        added = _evaluated(
            step, values[i], sources, tensors, swap=not torch.compiler.is_dynamo_compiling()
        )
        if fixed is None:
            values[i] = values[i] + added.to(values[i].dtype)
        else:
            values[i], residuals[i] = fixed.add(
                Held(values[i], residuals[i]), added, program.monitor, step.place
            )
    # Copies, because an output that is an input as well would be a view of it, and because torch
    # 2.11 loses the gradient of an output that has a second name in the graph, as `y.contiguous()`
    # in a branch may give it.
    return tuple([x.clone() for x in (*values, *residuals)])


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
    fixed = program.fixed
    count = len(program.streams)
    values = list(saved[:count])
    kept = count if fixed is None else 2 * count
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
    collected: list[Tensor | None] = [None] * len(tensors)
    for step in program.steps[::-1]:
        i = step.part.target
        with _autocasting(*program.autocast[0]), _autocasting(*program.autocast[1]):
            inputs = [values[j] for j in step.part.source] + [
                tensors[slot] for slot in step.differentiated
            ]
            evaluated: Any = vjp(_increment(step, values[i], tensors), *inputs)
        added, pull = evaluated
        if fixed is None:
            values[i] = values[i] - added.to(values[i].dtype)
        elif torch.compiler.is_compiling():
            values[i], residuals[i] = fixed.subtract(Held(values[i], residuals[i]), added)
        else:
            # The same numbers, and differentiable.
            values[i], residuals[i] = fixed_add(Held(values[i], residuals[i]), -added, fixed)
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
