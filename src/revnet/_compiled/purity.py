"""Check whether a branch is a pure function of its tensors."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .._state.decisions import Decisions
from .._state.results import arguments, draws
from .stand_ins import Held, imitate, size_of, stand_in_for

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def unsupported_reason(
    steps: Sequence[Any], streams: Sequence[Any], blocks: Sequence[nn.Module]
) -> str:
    """Return why the steps cannot be evaluated twice, without a full stop; empty if they can.

    Args:
        steps: as tuples in the order of `BoundStep`.
        streams: the streams before them, of which only shape, strides, dtype and device count.
        blocks: modules around the branches, which the traced path does not call.
    """
    if hooked(blocks):
        return "a block has hooks"
    for name, fn, coupling, target, source, kwargs, *_ in steps:
        if not coupling.translates or target in source or any(True for _ in coupling.parameters()):
            return (
                f"{name}: its coupling, {coupling.state_owner}, is not supported in a compiled "
                "graph: use an additive coupling whose branch does not read its target"
            )
        found = branch_unsupported_reason(fn, [streams[i] for i in source], streams[target], kwargs)
        if found:
            return f"{name} {found}"
    return ""


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Check whether a call of one of these modules would run hooks."""
    for module in modules:
        for hooks in HOOKS:
            if getattr(module, hooks, None):
                return True
    return False


# Per branch, what was found; the keys are all that can make a difference.
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()
_MOST_KNOWN = 64
_PLAIN = (
    bool,
    int,
    float,
    str,
    type(None),
    type,
    torch.dtype,
    torch.device,
    FunctionType,
    BuiltinFunctionType,
)


def branch_unsupported_reason(
    fn: Callable[..., Any], sources: Sequence[Any], target: Any, kwargs: Mapping[str, Any]
) -> str:
    """Return why a branch is no function of its tensors alone, as the end of a sentence.

    A copy of the branch runs once on tensors without memory, so nothing of it is changed.

    Args:
        fn: the branch.
        sources: the streams that it reads: tensors, of which only shape, strides, dtype and device
            count.
        target: the stream that it updates.
        kwargs: its keywords.
    """
    if not isinstance(fn, nn.Module):
        return "is no module, so the tensors that it reads are unknown"
    modules = list(fn.modules())
    if hooked(modules):
        return "has hooks"
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return "contains a scripted or traced module"
    if parametrize._cache_enabled:
        return "may read weights from torch.nn.utils.parametrize.cached(), which no replay finds"
    held = _held(kwargs)
    if held:
        return (
            f"takes tensors in {held} (not in a dict, list or tuple), in which gradients would not "
            "find them"
        )
    leaves, structure = pytree.tree_flatten((tuple(sources), target, dict(kwargs)))
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    key = (tuple(map(_key, leaves)), structure, tuple(map(_settings, modules)), transformed)
    known = _known.setdefault(fn, {})
    if key not in known:
        # A branch that counts its calls has other settings in each of them.
        if len(known) == _MOST_KNOWN:
            known.clear()
        # The compiler may be at work on the functions around this one, and then lets nobody change
        # its stance.
        known[key] = torch.compiler.disable(_run)(
            fn, sources, target, kwargs, transformed, _unused.setdefault(fn, TensorSet())
        )
    return known[key]


class TensorSet:
    """Tensors by identity, without keeping them."""

    def __init__(self) -> None:
        self.references: dict[int, weakref.ref[Tensor]] = {}

    def replace(self, tensors: Iterable[Tensor]) -> None:
        """Hold these tensors and no others."""
        self.references = {id(tensor): weakref.ref(tensor) for tensor in tensors}

    def __contains__(self, tensor: Tensor) -> bool:
        reference = self.references.get(id(tensor))
        return reference is not None and reference() is tensor


# Per branch, the parameters on which its output did not depend when it was last inspected.
_unused: weakref.WeakKeyDictionary[nn.Module, TensorSet] = weakref.WeakKeyDictionary()


def unused_names(fn: nn.Module) -> list[str]:
    """Return the names of the parameters on which the output of a branch does not depend."""
    unused = _unused.get(fn)
    if unused is None:
        return []
    named = fn.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter in unused]


def forget() -> None:
    """Inspect every branch anew."""
    _known.clear()


def _held(kwargs: Mapping[str, Any]) -> str:
    """Return the type of a keyword, or of a part of one, whose tensors would not be found."""
    for leaf in pytree.tree_leaves(
        kwargs, is_leaf=lambda value: type(value) not in (dict, list, tuple)
    ):
        if not isinstance(leaf, Tensor) and _holds_tensor(leaf):
            return type(leaf).__name__
    return ""


def _holds_tensor(value: Any) -> bool:
    """Check for a tensor in a value, also in containers of classes that pytrees do not know."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple | deque | set | frozenset):
        return any(map(_holds_tensor, value))
    return any(isinstance(part, Tensor) for part in pytree.tree_leaves(value))


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return what a module's result depends on: a rate or a child may change between calls."""
    found = [
        (name, _setting(value))
        for name, value in vars(module).items()
        if not name.endswith("_hooks")
    ]
    return type(module), tuple(found)


def _setting(value: Any, depth: int = 5) -> Any:
    """What is equal only for attributes that do the same."""
    if isinstance(value, _PLAIN):
        return value
    # What tensors and modules hold is looked at elsewhere.
    if isinstance(value, Tensor | nn.Module):
        return type(value)
    if depth and isinstance(value, dict):
        return type(value), tuple((key, _setting(item, depth - 1)) for key, item in value.items())
    if depth and isinstance(value, list | tuple | set):
        return type(value), tuple(_setting(item, depth - 1) for item in value)
    if depth and type(value).__basicsize__ == _Bare.__basicsize__ and hasattr(value, "__dict__"):
        return type(value), _setting(vars(value), depth - 1)
    # Other objects change unnoticed.
    return object()


class _Bare:
    """Has, as a configuration mostly does, what its `__dict__` holds and nothing else."""


def _key(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return (
        tuple(map(size_of, leaf.shape)),
        tuple(map(size_of, leaf.stride())),
        leaf.dtype,
        leaf.device,
    )


def _run(
    fn: nn.Module,
    sources: Sequence[Any],
    target: Any,
    kwargs: Mapping[str, Any],
    transformed: bool,
    unused: TensorSet,
) -> str:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_transforms())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_hookless())
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        copies: dict[nn.Module, nn.Module] = {}
        tensors: dict[Tensor, Tensor] = {}
        stand_in = stand_in_for(fn, copies, tensors, fake)
        held = Held(copies.values())
        inner = stack.enter_context(_Inner())
        given = pytree.tree_map_only(
            Tensor, lambda x: imitate(x, fake), (tuple(sources), dict(kwargs))
        )
        for source in pytree.tree_leaves(given[0]):
            source.requires_grad_()
        leaves, structure = pytree.tree_flatten(given)
        watch = stack.enter_context(_Watch(own=tensors, transformed=transformed))
        storages = list(map(_storage, tensors.values()))
        decisions = Decisions("")
        stack.enter_context(decisions)
        try:
            out = stand_in(*given[0], **given[1])
        except Exception as error:
            return (
                f"cannot be evaluated on tensors without memory ({type(error).__name__}: {error})"
            )
    if watch.found:
        return str(watch.found)
    if decisions.tensors:
        return "remembers decisions"
    if inner.found:
        return "contains a reversible sequence"
    if storages != list(map(_storage, tensors.values())):
        return "gives a buffer or a parameter other memory, as by `.data`"
    if name := held.changed():
        return f"changes its attribute {name!r}"
    after, structure_after = pytree.tree_flatten(given)
    if structure != structure_after or any(a is not b for a, b in zip(leaves, after, strict=True)):
        return "changes its keywords"
    if isinstance(out, tuple):
        return "returns extra outputs"
    if not isinstance(out, Tensor) or out.shape != imitate(target, fake).shape:
        return "returns no tensor of the shape of its stream"
    nodes = _nodes(out)
    if any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes):
        return "contains a torch.autograd.Function"
    reached = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    unused.replace(tensor for tensor, fake in tensors.items() if id(fake) not in reached)
    return ""


@contextlib.contextmanager
def _hookless() -> Iterator[None]:
    """Hooks on saved tensors, as a checkpoint in the branch has, raise: no transform takes them."""
    hooks = torch._C._autograd
    before = hooks._saved_tensors_hooks_get_disabled_error_message()
    hooks._saved_tensors_hooks_disable("hooks on saved tensors", False)
    try:
        yield
    finally:
        if before is None:
            hooks._saved_tensors_hooks_enable()
        else:
            hooks._saved_tensors_hooks_disable(before, False)


@contextlib.contextmanager
def _without_transforms() -> Iterator[None]:
    if torch._C._functorch.peek_interpreter_stack() is None:
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def _nodes(out: Tensor) -> set[Any]:
    """Return every node of the graph behind a tensor."""
    waiting, seen = [out.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return seen


class _Running(threading.local):
    """The inspections under way in this thread."""

    inner: tuple[_Inner, ...] = ()


_running = _Running()


class _Inner:
    """Notices reversible sequences that run inside of it."""

    def __init__(self) -> None:
        self.found = False

    def __enter__(self) -> _Inner:
        _running.inner = (*_running.inner, self)
        return self

    def __exit__(self, *exception: Any) -> None:
        _running.inner = _running.inner[:-1]


def inspecting() -> bool:
    """Whether a branch is being inspected in which a sequence now runs."""
    for inner in _running.inner:
        inner.found = True
    return bool(_running.inner)


class _Watch(TorchDispatchMode):
    """Looks out for operations that a second evaluation would not repeat."""

    def __init__(self, own: Mapping[Tensor, Tensor], transformed: bool) -> None:
        super().__init__()
        self.own = own
        self.transformed = transformed
        # Storages that outlive the call: of parameters, buffers, and, by their absence from `made`,
        # of what is given.
        self.made: set[int] = set()
        self.results: list[Tensor] = []
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = arguments(func, args, kwargs)
        if draws(func, args, kwargs):
            self._find(f"draws random numbers ({func.name()})")
        for argument, value in named:
            for leaf in pytree.tree_leaves(value):
                if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor) or leaf in self.own:
                    continue
                if leaf.requires_grad:
                    self._find(
                        "reads a tensor that needs a gradient and is not among its parameters"
                    )
                if self.transformed:
                    # A transform may differentiate it without a sign; and until it pulls, it may
                    # become another one.
                    self._find(
                        "reads a tensor that is neither a parameter, nor a buffer, nor a keyword"
                    )
            written = argument.alias_info is not None and argument.alias_info.is_write
            for leaf in pytree.tree_leaves(value) if written else ():
                if isinstance(leaf, Tensor) and _storage(leaf) not in self.made:
                    self._find(f"changes a buffer, its input or a keyword in place ({func.name()})")
        if _moves_statistics(func, named):
            self._find(f"changes a buffer in place ({func.name()})")
        out = func(*args, **kwargs)
        given = {
            _storage(leaf)
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self.made.add(_storage(leaf))
                # Held, because the address of a freed storage may be given to another one.
                self.results.append(leaf)
        return out

    def _find(self, what: str) -> None:
        self.found = self.found or what


def _storage(x: Tensor) -> int:
    address: int = x.untyped_storage()._cdata
    return address


def _moves_statistics(func: Any, named: Sequence[tuple[Any, Any]]) -> bool:
    # The schema of batch norm does not say that it writes its statistics.
    values = {argument.name: value for argument, value in named}
    training = values.get("training", values.get("train", values.get("use_input_stats", False)))
    return "norm" in func.name() and values.get("running_mean") is not None and bool(training)
