"""What each step of a sequence costs under each execution: a rehearsal, after which all is as it was."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ._couplings import tree_leaves, tree_map
from ._engine import Call
from ._kept import compiled
from ._memory import _CpuMeter, _CudaMeter, _storages, _tensors_in
from ._program import Program
from ._replay import RandomState, devices_of
from ._sequence import ReversibleSequence, _Blocks
from ._solver import Chain, Cost
from ._steps import FixedArithmetic, Part
from ._streams import RangeMonitor
from ._traced import Arithmetic

# Of one kind, in the chain that is timed.
_REPEATED = 3
# What an accelerator of today reaches in low precision, where nothing is measured.
_FLOPS_PER_SECOND = 4e14
_BYTES_PER_SECOND = 2.5e12


class Rehearsal:
    """A sequence with stand-ins for its parameters, buffers, input and randomness, while a `with` lasts."""

    def __init__(self, net: Program, x: Any, kwargs: dict[str, Any]) -> None:
        self.net = net
        self.given = (x if isinstance(x, tuple) else (x,)), kwargs
        self.label = str(tree_leaves(self.given[0][0])[0].device)
        tensors = [*net.parameters(), *_tensors_in(self.given)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        # Where nothing is allocated, and times are estimated.
        self.mode: FakeTensorMode | None = fakes[0].fake_mode if fakes else None
        if self.mode is None and any(tensor.is_meta for tensor in tensors):
            self.mode = FakeTensorMode()
        # Parameters whose gradient is there already.
        self.filled: set[Tensor] = set()
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Rehearsal:
        with contextlib.ExitStack() as stack:
            if self.mode is None:
                devices = devices_of([*_tensors_in(self.given), *self.net.parameters()])
                stack.enter_context(RandomState(devices).restored())
            else:
                # The engine has a real tensor of its own, without elements that matter.
                stack.callback(setattr, self.mode, "allow_non_fake_inputs", self.mode.allow_non_fake_inputs)
                self.mode.allow_non_fake_inputs = True
                # An input that is fake already brings its mode, which may be entered.
                if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not self.mode:
                    stack.enter_context(self.mode)
            self.inputs, self.kwargs = pytree.tree_map_only(Tensor, self._alias, self.given)
            self.x = tree_leaves(self.inputs[0])[0]
            self._swap(stack)
            self.parts = [part for _, part in self.net._parts(self.inputs, self.kwargs)]
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stack.close()

    def _alias(self, tensor: Tensor) -> Tensor:
        """Another tensor with the same values and without a past: its gradient is not the original's."""
        if self.mode is not None and tensor.is_meta and not isinstance(tensor, FakeTensor):
            alias = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        elif self.mode is not None and not isinstance(tensor, FakeTensor):
            alias = self.mode.from_tensor(tensor).detach()
        else:
            alias = tensor.detach()
        return alias.requires_grad_(tensor.requires_grad)

    def _swap(self, stack: contextlib.ExitStack) -> None:
        """Put the stand-ins in their places, until `stack` closes."""
        net = self.net
        stack.callback(setattr, net, "_monitor", net._monitor)
        stack.callback(setattr, net, "execution", net.execution)
        if isinstance(net, _Blocks):
            # A plan is for the call in which no block is dropped.
            stack.callback(setattr, net, "layer_dropout", net.layer_dropout)
            net.layer_dropout = 0.0
        copies: dict[Tensor, Tensor] = {}
        for module in net.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                if hasattr(tensor, "placements"):
                    # Sharded parameters belong to their group; only their gradient is put aside.
                    copies[tensor] = tensor
                    stack.callback(setattr, tensor, "grad", tensor.grad)
                elif tensor not in copies and isinstance(tensor, nn.Parameter):
                    copies[tensor] = nn.Parameter(self._alias(tensor), tensor.requires_grad)
                elif tensor not in copies:
                    copies[tensor] = self._alias(tensor).clone()
                if tensor.is_leaf and tensor.grad is not None:
                    self.filled.add(copies[tensor])
                if copies[tensor] is tensor:
                    tensor.grad = None
                    continue
                stack.callback(setattr, module, name, tensor)
                setattr(module, name, copies[tensor])

    def chain(self) -> Chain:
        """Measures each kind of step once, in the order of the sequence, on the streams that reach it."""
        net = self.net
        names = [name for name in net._allowed if name != "offload" or self.x.is_cuda]
        arithmetic = net._arithmetic(*tree_leaves(self.inputs))
        streams = net._split(self.x) if isinstance(net, ReversibleSequence) else self.inputs
        needs_grad = [any(leaf.requires_grad for leaf in tree_leaves(value)) for value in streams]
        # Without a record, but with gradients: compiled branches are compiled for these.
        with torch.no_grad():
            call = self.call(streams, arithmetic, ["store"] * len(self.parts))
        kinds: dict[Any, int] = {}
        costs: list[dict[str, Cost]] = []
        steps: list[tuple[int, int]] = []
        for part in self.parts:
            values = [value for value, _ in call.streams]
            kind = _kind(part, values, needs_grad)
            if kind not in kinds:
                kinds[kind] = len(costs)
                stage = _Stage(self, part, values, needs_grad, arithmetic)
                costs.append(stage.costs([name for name in names if name != "select" or not compiled(part.fn)]))
            steps.append((kinds[kind], part.target))
            call.step(0, part)
            value = call.streams[part.target][0]
            needs_grad[part.target] = any(leaf.requires_grad for leaf in tree_leaves(value))
            call.streams = cast(Any, pytree.tree_map_only(Tensor, _leaf, call.streams))
        values = [value for value, _ in call.streams]
        with torch.no_grad():
            result = net._merge(*values) if isinstance(net, ReversibleSequence) else values
        sizes = tuple(memory.size for memory in _memories(call))
        return Chain(
            sizes=sizes,
            given=0 if isinstance(arithmetic, FixedArithmetic) else (1 << len(sizes)) - 1,
            kinds=tuple(costs),
            steps=tuple(steps),
            gradients=self.gradients(self.filled),
            overhead=sum(storage.nbytes() for storage in _storages(_tensors_in(result))),
        )

    def call(self, streams: Sequence[Any], arithmetic: Arithmetic, executions: Sequence[str]) -> Call:
        options = self.net._options
        # Under fake tensors there is no state of a generator to compare.
        options = replace(options, preserve_rng_state=options.preserve_rng_state and self.mode is None)
        return Call(streams, arithmetic, options, executions)

    def gradients(self, filled: set[Tensor]) -> tuple[int, ...]:
        """Bytes of parameter gradients that each step makes: those not there before and not made by a later step."""
        made = set(filled)
        gradients = []
        for part in reversed(self.parts):
            new = {parameter for parameter in _parameters(part.fn) if parameter.requires_grad} - made
            gradients.append(sum(parameter.numel() * parameter.element_size() for parameter in new))
            made |= new
        return tuple(gradients[::-1])

    def peak(self, executions: Sequence[str]) -> int:
        """Bytes at the peak of a run, which makes the gradients of all parameters."""
        self.net.execution = list(executions)
        # A new monitor looks at every step of its first call, and later ones at fewer.
        self.net._monitor = RangeMonitor()
        torch.clear_autocast_cache()
        meter = self.meter()
        with meter.watch():
            outputs = list(_tensors_in(self.net(*self.inputs, **self.kwargs)))
        wanted = [leaf for leaf in outputs if leaf.requires_grad]
        ones = [leaf.detach().new_ones(()).expand_as(leaf) for leaf in wanted]
        with meter.watch(), _outside_autocast():
            torch.autograd.backward(wanted, ones)
        for leaf in [*self.net.parameters(), *_tensors_in((self.inputs, self.kwargs))]:
            leaf.grad = None
        return int(meter.peak)

    def meter(self) -> Any:
        if self.mode is not None:
            return _FakeMeter()
        return _CudaMeter() if self.x.is_cuda else _CpuMeter()


class _Stage:
    """One step in a call of its own."""

    def __init__(
        self, rehearsal: Rehearsal, part: Part, values: list[Any], needs_grad: list[bool], arithmetic: Arithmetic
    ) -> None:
        self.rehearsal = rehearsal
        self.part = part
        self.values = values
        self.needs_grad = needs_grad
        self.arithmetic = arithmetic
        self.leaves = [*_parameters(part.fn), *_parameters(part.coupling)]
        self.leaves += [leaf for leaf in _tensors_in(part.kwargs) if leaf.is_leaf]

    def costs(self, executions: Sequence[str]) -> dict[str, Cost]:
        for execution in executions:
            self.run(execution)  # warm: workspaces, lazily made state, pools
        times = self.times(executions)
        return {execution: self.cost(execution, times[execution]) for execution in executions}

    def call(self, execution: str, steps: int = 1) -> Call:
        """A call whose streams are not leaves, so that nothing but the call and its graph holds them."""

        def fresh(value: Any, needs_grad: bool) -> Any:
            return tree_map(lambda leaf: leaf.detach().requires_grad_(needs_grad).clone(), value)

        streams = list(map(fresh, self.values, self.needs_grad))
        return self.rehearsal.call(streams, self.arithmetic, [execution] * steps)

    def run(self, execution: str, steps: int = 1) -> None:
        """Forward and backward of the step, or of a chain of its like."""
        call = self.call(execution, steps)
        for index in range(steps):
            call.step(index, self.part)
        root = _root(call)
        if root is not None:
            with _outside_autocast():
                root.backward()
        self.clear()

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        torch.clear_autocast_cache()

    def times(self, executions: Sequence[str]) -> dict[str, int]:
        """Nanoseconds of forward and backward: of runs in turn, the least disturbed."""
        if self.rehearsal.mode is not None:
            return {execution: self.estimate(execution) for execution in executions}
        found: dict[str, list[int]] = {execution: [] for execution in executions}
        began = time.perf_counter()
        for turn in range(9):
            for execution in executions:
                _synchronize(self.rehearsal.x.device)
                start = time.perf_counter_ns()
                # In a chain, as in a sequence, the host runs ahead of the device.
                self.run(execution, _REPEATED)
                _synchronize(self.rehearsal.x.device)
                found[execution].append((time.perf_counter_ns() - start) // _REPEATED)
            if turn >= 2 and time.perf_counter() - began > 1.0:
                break
        times = {execution: min(measured) for execution, measured in found.items()}
        # What does all of another's work and more takes no less: what says otherwise is noise.
        less_work = {"select": "store", "checkpoint": "store", "offload": "checkpoint", "invert": "checkpoint"}
        for execution in executions[1:]:
            times[execution] = max(times[execution], times[less_work[execution]])
        return times

    def estimate(self, execution: str) -> int:
        with _FakeMeter() as traffic, FlopCounterMode(display=False) as flops:
            self.run(execution)
        return int(1e9 * (flops.get_total_flops() / _FLOPS_PER_SECOND + traffic.written * 3 / _BYTES_PER_SECOND))

    def cost(self, execution: str, nanoseconds: int) -> Cost:
        meter = self.rehearsal.meter()
        with meter.watch():
            call = self.call(execution)
            before = _memories(call)
            call.step(0, self.part)
            after = _memories(call)[2 * self.part.target :][:2]
            # Holds the graph and not the streams. A node that Python made is held by its output alone.
            graph = _spring(call.start())
            call.__exit__()
            torch.clear_autocast_cache()
            if self.rehearsal.mode is None:
                _settle(self.rehearsal.x.device)
        keeps = [part for part, memory in enumerate(before) if memory.size and memory.alive()]
        shared = sum(before[part].size for part in keeps) + sum(memory.size for memory in after if memory.alive())
        own = max(0, meter.held - shared)
        del call, graph

        meter = self.rehearsal.meter()
        with meter.watch():
            call = self.call(execution)
            call.step(0, self.part)
            root = _root(call)
            if root is not None:
                with _outside_autocast():
                    root.backward()
        # In a longer call the state that backward has reached outlives this step: the call is held until here.
        del call
        self.clear()
        return Cost(own, sum(1 << part for part in keeps), meter.peak, nanoseconds)


class _Spring(torch.autograd.Function):
    """Where gradients come from that autograd then owns, as it owns those that later steps would have made."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> Tensor:
        ctx.like = [(value.shape, value.stride(), value.dtype, value.device) for value in values]
        return values[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device=device).fill_(1e-3)
            for shape, stride, dtype, device in ctx.like
        )


def _spring(values: Sequence[Any]) -> Tensor | None:
    wanted = [leaf for value in values for leaf in tree_leaves(value) if leaf.requires_grad]
    return _Spring.apply(*wanted) if wanted else None


@contextlib.contextmanager
def _outside_autocast() -> Iterator[None]:
    """As after the end of all contexts of autocast, where backward belongs: none of their casts is left."""
    enabled = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    for kind in enabled:
        torch.set_autocast_enabled(kind, False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()
        for kind, before in enabled.items():
            torch.set_autocast_enabled(kind, before)


def _root(call: Call) -> Tensor | None:
    """The tensor from which backward goes through a call, which ends here."""
    root = _spring(call.finish())
    call.__exit__()
    return root


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _Memory:
    """The memory of a part of a stream: its bytes, and whether it still is; does not hold it."""

    def __init__(self, storages: Sequence[torch.UntypedStorage]) -> None:
        self.size = sum(storage.nbytes() for storage in storages)
        self.storages = [weakref.ref(storage) for storage in storages]

    def alive(self) -> bool:
        return any(storage() is not None for storage in self.storages)


def _memories(call: Call) -> list[_Memory]:
    """Two for each stream: of the value that branches read, and of what else it is held as."""
    found = []
    for value, held in call.streams:
        read = {storage._cdata: storage for storage in _storages(_tensors_in(value))}
        rest = [storage for storage in _storages(_tensors_in(held)) if storage._cdata not in read]
        found += [_Memory(list(read.values())), _Memory(rest)]
    return found


def _parameters(fn: Any) -> list[Tensor]:
    module = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def _kind(part: Part, values: list[Any], needs_grad: list[bool]) -> Any:
    """Equal for steps that cost alike."""
    layouts = [(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in pytree.tree_leaves(values)]
    keywords = [_describe(value) for value in pytree.tree_leaves(part.kwargs)]
    work = _signature(part.fn), _signature(part.coupling)
    return work, part.target, part.source, tuple(needs_grad), tuple(layouts), tuple(keywords)


def _signature(fn: Any) -> Any:
    """Equal for branches that do the same work."""
    module = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    if not isinstance(module, nn.Module):
        return id(fn)
    found: list[Any] = [getattr(fn, "__name__", None)]
    for name, child in module.named_modules(remove_duplicate=False):
        settings = {key: value for key, value in sorted(vars(child).items()) if key[:1] != "_"}
        described = [(key, _describe(value)) for key, value in (settings | child._parameters | child._buffers).items()]
        hooks = len(child._forward_hooks), len(child._forward_pre_hooks), len(child._backward_hooks)
        found.append((name, type(child), tuple(described), hooks))
    return tuple(found)


def _describe(value: Any) -> Any:
    """What of a setting, or of a keyword, decides costs."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_describe(item) for item in value)
    return getattr(value if callable(value) else type(value), "__qualname__", type(value).__qualname__)


class _FakeMeter(TorchDispatchMode):
    """Counts the storages of tensors that operations make, for tensors that have no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self.written = 0
        self.alive: dict[int, weakref.ref[Any]] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _storages(_tensors_in((args, kwargs)))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(_tensors_in(out)):
            if storage._cdata not in known and storage._cdata not in self.alive:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.written += size
        self.held += size
        self.peak = max(self.peak, self.held)
        owner = weakref.ref(self)

        def freed(_: Any) -> None:
            meter = owner()
            if meter is not None:
                meter.held -= size
                meter.alive.pop(key, None)

        self.alive[key] = weakref.ref(storage, freed)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _settle(device: torch.device) -> None:
    """A tensor on its way to the host is freed by the first allocation after its copy."""
    if device.type == "cuda":
        _synchronize(device)
        torch.empty(1, device=device)
