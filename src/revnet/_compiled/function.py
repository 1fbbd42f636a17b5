"""Sequences as one differentiable operation, for `torch.compile` and transforms of `torch.func`.

Neither allows saved-tensor hooks, on which the engine rests. Here a run of steps that are not
stored is one `torch.autograd.Function` that saves the streams after its last step and the tensors
that its branches read. Its backward walks down: it evaluates each branch once with
`torch.func.vjp`, undoes the step with the result, and pulls the gradient through. Stored steps
between such runs are ordinary operations: what stays of them, autograd or the compiler decides.
Every other execution rebuilds, because what else it would keep is not the graph's to promise.

A second evaluation is right only for branches that are functions of their tensors. What draws
random numbers, moves statistics, has hooks or returns more than its update is found beforehand
(`purity`): a compiled graph then breaks, and the engine runs between its parts; under a transform
all steps are ordinary operations, whose activations stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ReversibleError
from .._execution import Execution
from .._state.structure import Memory
from .._step import BoundStep, branch_output
from .._streams.arithmetic import FixedArithmetic, Stream
from .._streams.buffer import BufferedStream
from .._streams.monitor import RangeMonitor
from .._taps import Taps
from .purity import hooked, inspecting, unsupported_reason
from .walk import (
    Arithmetic,
    _autocast,
    _Evaluation,
    _held,
    _Program,
    _slots,
    _takes_gradient,
    _Tensors,
    _up,
    _Walk,
)


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
    unsupported: str = "",
    taps: Taps | None = None,
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
        unsupported: why the steps should be left to the engine, if they should.
        taps: reads streams on the way; what it read follows the streams.
    """
    if torch.compiler.is_dynamo_compiling() and isinstance(arithmetic, FixedArithmetic):
        arithmetic = FixedArithmetic(arithmetic.fixed, _prepared(arithmetic.monitor, list(streams)))
    again = (
        [part for index, part in parts if executions[index].rebuilds]
        if torch.is_grad_enabled()
        else []
    )
    rebuild = _rebuilds(again, streams, blocks, unsupported)
    if rebuild is None:
        return outside(engine)
    # Steps that begin with a run have it encode the streams: compiled transforms take the operator
    # only inside.
    encode = not rebuild or not executions[parts[0][0]].rebuilds
    states = [arithmetic.encode(stream) if encode else (stream, None) for stream in streams]
    aux: dict[str, Any] = {}
    run: list[tuple[int, BoundStep]] = []
    for index, part in parts:
        if taps is not None and taps.waits_before(index):
            # The operation that rebuilds ends here, and keeps its last streams.
            if run:
                states, run = _reversibly(run, states, arithmetic), []
            taps.reach(index, [value for value, _ in states])
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
    values: tuple[Any, ...] = tuple(value for value, _ in states)
    if taps is not None:
        taps.reach(len(executions), values)
        values = (*values, taps.results())
    return (*values, aux) if aux else values


def _rebuilds(
    again: Sequence[BoundStep],
    streams: Sequence[Any],
    blocks: Sequence[nn.Module],
    unsupported: str,
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
        unsupported = unsupported or "a stream is a tree of tensors"
    if torch.compiler.is_dynamo_compiling():
        return _replayable(again, list(streams), list(blocks), unsupported) or None
    if inspecting() or torch.compiler.is_compiling() or _forward_mode() or unsupported:
        return False
    return not unsupported_reason(again, streams, blocks)


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
    parts: Sequence[BoundStep], streams: list[Any], blocks: list[nn.Module], unsupported: str
) -> bool:
    """Check whether the graph may evaluate the steps again, while it is traced."""
    from .dynamo import comptime, inspect, reason_found

    # A plain tuple is the same to every version of the tracer.
    steps = [
        (part.name, part.fn, part.coupling, part.target, part.source, part.kwargs) for part in parts
    ]
    comptime(inspect)
    del steps
    return not reason_found()


def kinds_of_layers(program: nn.Module, memory: Memory) -> tuple[str, ...]:
    """Return which of "conv" and "rnn" are among the layers that a program may enter."""
    if not torch.compiler.is_dynamo_compiling():
        return memory.layers(program).kinds
    from .dynamo import comptime, find_layers, layers_found

    comptime(find_layers)
    del program
    return layers_found()


def _prepared(monitor: RangeMonitor | None, streams: list[Any]) -> RangeMonitor | None:
    """Allocate the monitor's memory while the graph is traced; None if no graph writes to it."""
    from .dynamo import comptime, prepare, takes_findings

    comptime(prepare)
    del streams
    return monitor if takes_findings() else None


def _forward_mode() -> bool:
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return any(
        level.key() == torch._C._functorch.TransformType.Jvp
        for level in retrieve_all_functorch_interpreters()
    )


def _reversibly(
    parts: Sequence[tuple[int, BoundStep]], states: list[Stream], arithmetic: Arithmetic
) -> list[Stream]:
    """Return the streams after the steps, by one operation whose backward rebuilds them."""
    table = _Tensors()
    streams = tuple([table.add(value) for value, _ in states])
    residuals: tuple[int, ...] = ()
    if arithmetic.exact:
        # What a stored step left in a buffer, only the engine would read again.
        pairs = [
            encoded.stream if isinstance(encoded, BufferedStream) else encoded
            for _, encoded in states
        ]
        residuals = tuple([table.add(encoded.residual) for encoded in pairs if encoded is not None])
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
    program = _Program(tuple(steps), streams, residuals, arithmetic, autocast)
    # Under the compiler, a Function none of whose tensors takes a gradient fails.
    walk = _Walk.apply if any(map(_takes_gradient, table.tensors)) else _up
    outputs = walk(program, *table.tensors)
    values = outputs[: len(streams)]
    return list(zip(values, _held(values, outputs[len(streams) :]), strict=True))


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
