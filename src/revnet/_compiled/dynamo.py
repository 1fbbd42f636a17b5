"""Dynamo integration of the compiled path; imported only while Dynamo traces."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import mark_static_address
from torch._dynamo.comptime import comptime as comptime
from torch._dynamo.exc import unimplemented
from torch.utils import _pytree as pytree

from .._state.structure import Layers
from .purity import forget, unsupported_reason, unused_names
from .watch import WatchingCompiler

_found: list[str] = []
_told: list[bool] = []
# The memory of the monitor, to which every call of the graph writes.
_cells: list[Tensor] = []
# Pairs of the name of a step and of a parameter on which its branch does not depend.
_unused: set[tuple[str, str]] = set()
_tensors: dict[tuple[str, str], tuple[str, ...]] = {}
_layers: list[tuple[str, ...]] = []


def inspect(ctx: Any) -> None:
    """Find out why the steps of the function that is traced cannot be replayed in the graph.

    Reads its locals `steps`, `streams`, `blocks` and `unsupported`. Under fullgraph=True, what is
    unsupported raises at once.
    """
    tracer = getattr(ctx, "_ComptimeContext__tx", None)
    try:
        steps, streams, blocks, unsupported = (
            _value(ctx, name) for name in ("steps", "streams", "blocks", "unsupported")
        )
        # What functions and global variables hold may have changed since they were inspected for
        # another graph.
        forget()
        _found[:] = [
            _vmapped()
            or _hooks()
            or unsupported
            or _changed(ctx, steps)
            or unsupported_reason(steps, streams, blocks)
        ]
        _unused.clear()
        _tensors.clear()
        if not _found[0]:
            _unused.update((name, unused) for name, fn, *_ in steps for unused in unused_names(fn))
            for name, fn, *_ in steps:
                for prefix, module in fn.named_modules():
                    _tensors[name, prefix] = tuple(
                        key for key, value in vars(module).items() if isinstance(value, Tensor)
                    )
            _watch(ctx, steps, streams)
    except _UnknownError as error:
        _found[:] = [f"a branch is given {error}, which the graph makes or changes"]
    if _found[0] and getattr(tracer, "one_graph", False):
        unimplemented(
            gb_type="revnet: branch that cannot be replayed in a graph",
            context=_found[0],
            explanation=f"{_found[0]}. The backward pass inside one graph evaluates each branch a "
            "second time, and the second evaluation would differ.",
            hints=[
                "Compile without fullgraph=True: the sequence then runs outside the graph, with "
                "right gradients.",
                "Compile the branches instead: `net.compile()` of the sequence.",
                "Or keep the activations: `net.execution = 'store'`.",
            ],
        )


def _watch(ctx: Any, steps: Sequence[Any], streams: Sequence[Tensor]) -> None:
    """Have the graph that is traced refuse its backward after a write to what the steps read."""
    graph = ctx._ComptimeContext__tx.output
    if not isinstance(graph.compiler_fn, WatchingCompiler):
        graph.compiler_fn = WatchingCompiler(graph.compiler_fn)
    graph.compiler_fn.add(steps, (*streams, *_cells))


def _changed(ctx: Any, steps: Sequence[Any]) -> str:
    """Return the first attribute of a branch that the graph changes, which happens after it."""
    effects = _effects(ctx)
    for name, fn, *_ in steps:
        for module in fn.modules() if isinstance(fn, nn.Module) else ():
            own = {
                key: value
                for key, value in vars(module).items()
                if key not in ("_parameters", "_buffers")
            }
            for attribute, value in own.items():
                if _modified(effects.id_to_variable.get(id(value)), effects):
                    return f"{name}: the graph changes what its attribute {attribute!r} holds"
            changes = effects.store_attr_mutations.get(effects.id_to_variable.get(id(module)), {})
            for attribute, variable in changes.items():
                known = variable.is_python_constant()
                if (
                    not known
                    or attribute not in own
                    or variable.as_python_constant() != own[attribute]
                ):
                    return f"{name}: the graph changes its attribute {attribute!r}"
    return ""


def _effects(ctx: Any) -> Any:
    """Return what the graph has changed so far, and will write back after the call."""
    return ctx._ComptimeContext__tx.output.side_effects


def _modified(variable: Any, effects: Any) -> bool:
    return getattr(variable, "mutation_type", None) is not None and effects.is_modified(variable)


class _UnknownError(Exception):
    """A value that exists only after the call."""


def _vmapped() -> str:
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    kinds = [level.key() for level in retrieve_all_functorch_interpreters()]
    return (
        "it runs under torch.func.vmap" if torch._C._functorch.TransformType.Vmap in kinds else ""
    )


def _hooks() -> str:
    # Those of a checkpoint around the model, say. Entering a transform would fail, and leave all
    # hooks disabled.
    active = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return "hooks on saved tensors are active" if active else ""


def prepare(ctx: Any) -> None:
    """Allocate the memory of the local `monitor` on the devices of the local `streams`.

    Transforms allow no write to it, nor can findings that are distributed be written there:
    `takes_findings` says whether it is written to.
    """
    monitor, streams = _value(ctx, "monitor"), pytree.tree_leaves(_value(ctx, "streams"))
    distributed = any(hasattr(stream, "placements") for stream in streams)
    _told[:] = [not distributed and torch._C._functorch.peek_interpreter_stack() is None]
    _cells.clear()
    if monitor is not None and _told[0]:
        for stream in streams:
            _cells.append(monitor.prepare(stream.device).key)
            # So that CUDA graphs of the compiler may write to it.
            mark_static_address(_cells[-1], guard=False)


def find_layers(ctx: Any) -> None:
    """Find out which kinds of layers the local `program` may enter."""
    _layers[:] = [Layers(_value(ctx, "program")).kinds]


def layers_found() -> tuple[str, ...]:
    """Return what `find_layers` found."""
    return _layers[0]


def reason_found() -> str:
    """Return what `inspect` found."""
    return _found[0]


def takes_findings() -> bool:
    """Return what `prepare` found."""
    return _told[0]


def is_unused(step: str, parameter: str) -> bool:
    """Check whether `inspect` found that a branch does not depend on this parameter."""
    return (step, parameter) in _unused


def tensor_attributes(step: str, prefix: str) -> tuple[str, ...]:
    """Return the names of the attributes that `inspect` found to be tensors."""
    return _tensors.get((step, prefix), ())


# torch.compile calls such a function once, while it traces, and takes the result for a constant.
for constant in (layers_found, reason_found, takes_findings, is_unused, tensor_attributes):
    vars(constant)["_dynamo_marked_constant"] = True


@torch.compiler.disable(
    reason="revnet: a sequence that cannot be replayed in a graph runs outside it"
)  # type: ignore[untyped-decorator]
def call(engine: Callable[[], Any]) -> Any:
    """Return what `engine` returns, computed outside the graph."""
    return engine()


def _value(ctx: Any, name: str) -> Any:
    return _realized(
        ctx.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker(), _effects(ctx)
    )


def _realized(variable: Any, effects: Any) -> Any:
    """Return the value of a variable of the traced function, its tensors without memory."""
    from torch._dynamo.variables import ConstDictVariable, TensorVariable
    from torch._dynamo.variables.lists import BaseListVariable
    from torch._dynamo.variables.tensor import SymNodeVariable
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    variable = variable.realize()
    if isinstance(variable, TensorVariable):
        tensor = variable.as_proxy().node.meta["example_value"]
        for size in (*tensor.shape, *tensor.stride()):
            # Makes a symbolic size a number, so that another size is another graph: the tracer
            # would make every comparison of symbolic sizes inside the operation one of its outputs,
            # and fail on those.
            int(size)
        return tensor
    if isinstance(variable, SymNodeVariable):
        # A number that has changed between calls: a graph for each value, as for sizes.
        return guard_scalar(variable.sym_num)
    if isinstance(variable, BaseListVariable):
        items = [_realized(item, effects) for item in variable.items]
        return _container(variable.python_type(), items)
    if isinstance(variable, ConstDictVariable):
        pairs = [
            (key.vt.as_python_constant(), _realized(item, effects))
            for key, item in variable.items.items()
        ]
        return _container(variable.python_type(), pairs)
    if hasattr(variable, "value"):
        if not isinstance(variable.value, nn.Module) and _modified(variable, effects):
            raise _UnknownError(type(variable.value).__name__)
        return variable.value
    return variable.as_python_constant()


def _container(kind: type, items: list[Any]) -> Any:
    """Return a container of this type, made past the methods of its class.

    Args:
        kind: the type. What is none of a container, as of a range, gives a tuple.
        items: what it holds; of a dict, pairs of key and value.
    """
    # From its type `unsupported_reason` knows where gradients would not find tensors. Up to torch
    # 2.13 a deque comes here, in 2.15 a named tuple or any subclass of list, tuple or dict, too.
    if issubclass(kind, tuple):
        try:
            return tuple.__new__(kind, items)
        except TypeError:  # A type written in C, such as torch.Size.
            return kind(items)
    bases: tuple[Any, ...] = (OrderedDict, defaultdict, dict, list, deque)
    for base in bases:
        if issubclass(kind, base):
            made = base.__new__(kind)
            fill = base.update if issubclass(base, dict) else base.extend
            fill(made, items)
            return made
    return tuple(items)
