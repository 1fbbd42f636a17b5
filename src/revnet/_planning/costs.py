"""What each step of a sequence costs under each execution: a rehearsal, after which all is as it was.

Inside `rehearsing`, stand-ins take the places of parameters, buffers and inputs. `Rehearsal.chain`
goes through the steps once. Of each kind of step, a `_Stage` runs the first under every execution,
in calls of its own, and measures bytes and seconds; steps of the same kind cost the same.
`Rehearsal.peak` runs the whole sequence. With fake tensors the same code counts bytes, and times
are estimated.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .._engine import Call
from .._execution import resolve
from .._memory import _CpuMeter, _CudaMeter, _storages, _tensors_in
from .._program import Program
from .._sequence import ReversibleSequence, _Blocks
from .._state.branch import is_compiled
from .._state.random import RandomState, devices_of
from .._step import BoundStep
from .._streams.arithmetic import FixedArithmetic
from .._streams.monitor import RangeMonitor
from .._trees import tree_leaves, tree_map
from .solver import Chain, Cost

# Of one kind, in the chain that is timed.
_REPEATED = 3
# What an accelerator of today reaches in low precision, where nothing is measured.
_FLOPS_PER_SECOND = 4e14
_BYTES_PER_SECOND = 2.5e12


@contextlib.contextmanager
def rehearsing(net: Program, x: Any, kwargs: dict[str, Any]) -> Iterator[Rehearsal]:
    """`net` with stand-ins for its parameters, buffers, input and randomness."""
    given = (x if isinstance(x, tuple) else (x,)), kwargs
    tensors = [*net.parameters(), *_tensors_in(given)]
    mode = next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    if mode is None and any(tensor.is_meta for tensor in tensors):
        mode = FakeTensorMode()
    with contextlib.ExitStack() as stack:
        if mode is None:
            stack.enter_context(RandomState(devices_of(tensors)).restored())
        else:
            # The engine has a real tensor of its own, without elements that matter.
            _set(stack, mode, "allow_non_fake_inputs", True)
            stack.enter_context(mode)
            # There is no state of a generator to compare.
            options = replace(net._settings.options, preserve_rng_state=False)
            _set(stack, net._settings, "options", options)
        label = str(tree_leaves(given[0][0])[0].device)
        inputs, kwargs = pytree.tree_map_only(Tensor, lambda tensor: _alias(tensor, mode), given)
        filled = _swap(stack, net, mode)
        yield Rehearsal(net, inputs, kwargs, mode, filled, label)


def _set(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until `stack` closes."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _alias(tensor: Tensor, mode: FakeTensorMode | None) -> Tensor:
    """Another tensor with the same values and without a past: its gradient is not the original's."""
    if mode is None or isinstance(tensor, FakeTensor):
        alias = tensor.detach()
    else:
        device = "cpu" if tensor.is_meta else tensor.device
        alias = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        )
    return alias.requires_grad_(tensor.requires_grad)


def _swap(stack: contextlib.ExitStack, net: Program, mode: FakeTensorMode | None) -> set[Tensor]:
    """Put the stand-ins in their places, until `stack` closes; those of parameters that have a gradient already."""
    stand_ins: dict[Tensor, Tensor] = {}
    filled = {tensor for tensor in net.parameters() if tensor.grad is not None}
    for module in net.modules():
        own = vars(module)
        for held in cast(list[dict[str, Any]], [own, module._parameters, module._buffers]):
            stack.callback(_put_back, held, dict(held))
            for name, tensor in held.items():
                # As in replays, attributes count among the buffers; a fake operation writes to no
                # real one.
                if isinstance(tensor, Tensor) and (
                    held is not own or not (mode or tensor.requires_grad)
                ):
                    if tensor not in stand_ins:
                        stand_ins[tensor] = _stand_in(stack, tensor, mode)
                    held[name] = stand_ins[tensor]
    # A plan in force may be for a smaller input.
    net.execution = "store"
    if isinstance(net, _Blocks):
        # A plan is for the call in which no block is dropped.
        net.layer_dropout = 0.0
    return {stand_ins[tensor] for tensor in filled}


def _put_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    """Also what branches have set in the meantime, such as a loss, which would hold the graph of a run."""
    held.clear()
    held.update(before)


def _stand_in(stack: contextlib.ExitStack, tensor: Tensor, mode: FakeTensorMode | None) -> Tensor:
    if hasattr(tensor, "placements"):
        # Sharded parameters belong to their group; only their gradient is put aside.
        _set(stack, tensor, "grad", None)
        return tensor
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(_alias(tensor, mode), tensor.requires_grad)
    return _alias(tensor, mode).clone()


@dataclass
class Rehearsal:
    """A sequence under rehearsal.

    Attributes:
        net, inputs, kwargs: the sequence and what it is given, stand-ins all.
        mode: under which nothing is allocated, and times are estimated; None where tensors are
            real.
        filled: parameters whose gradient is there already.
        label: the device of the input that the stand-in is for.
    """

    net: Program
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: FakeTensorMode | None
    filled: set[Tensor]
    label: str

    def __post_init__(self) -> None:
        self.x = tree_leaves(self.inputs[0])[0]
        self.parts = [part for _, part in self.net._parts(self.inputs, self.kwargs)]
        self.arithmetic = self.net._arithmetic(*tree_leaves(self.inputs))

    def chain(self) -> Chain:
        """Measures each kind of step once, in the order of the sequence, on the streams that reach it."""
        net = self.net
        call = self.call(
            net._split(self.x) if isinstance(net, ReversibleSequence) else self.inputs, ["store"]
        )
        # Without a record, but with gradients: compiled branches are compiled for these.
        call.recording = False
        kinds: dict[Any, int] = {}
        costs: list[dict[str, Cost]] = []
        steps: list[tuple[int, int]] = []
        for part in self.parts:
            call.streams = cast(Any, pytree.tree_map_only(Tensor, _leaf, call.streams))
            number = kinds.setdefault(_kind(part, call.start()), len(costs))
            if number == len(costs):
                costs.append(_Stage(self, part, call.start()).costs())
            steps.append((number, part.target))
            call.step(0, part)
        with torch.no_grad():
            result = (
                net._merge(*call.start()) if isinstance(net, ReversibleSequence) else call.start()
            )
        sizes = tuple(memory.size for memory in _memories(call))
        return Chain(
            sizes=sizes,
            given=0 if isinstance(self.arithmetic, FixedArithmetic) else (1 << len(sizes)) - 1,
            kinds=tuple(costs),
            steps=tuple(steps),
            gradients=self.gradients(self.filled),
            overhead=sum(storage.nbytes() for storage in _storages(_tensors_in(result))),
        )

    def call(self, streams: Sequence[Any], executions: Sequence[str]) -> Call:
        return Call(
            streams,
            self.arithmetic,
            self.net._settings.options,
            resolve(executions, len(executions)),
        )

    def gradients(self, filled: set[Tensor]) -> tuple[int, ...]:
        """Bytes of parameter gradients that each step makes: those not there before and not made by a later step."""
        made = set(filled)
        gradients = []
        for part in reversed(self.parts):
            new = {
                parameter for parameter in part.fn.parameters() if parameter.requires_grad
            } - made
            gradients.append(sum(parameter.numel() * parameter.element_size() for parameter in new))
            made |= new
        return tuple(gradients[::-1])

    def peak(self, executions: Sequence[str]) -> int:
        """Bytes at the peak of a run, beside the gradients that are there already."""
        self.net.execution = list(executions)
        # A new monitor looks at every step of its first call, and later ones at fewer.
        self.net._monitor = RangeMonitor()
        torch.clear_autocast_cache()
        for parameter in self.filled:
            parameter.grad = torch.zeros_like(parameter)
        meter = self.meter()
        with meter.watch():
            outputs = [
                leaf
                for leaf in _tensors_in(self.net(*self.inputs, **self.kwargs))
                if leaf.requires_grad
            ]
        ones = [leaf.detach().new_ones(()).expand_as(leaf) for leaf in outputs]
        with meter.watch(), _outside_autocast():
            torch.autograd.backward(outputs, ones)
        _clear([*self.net.parameters(), *_tensors_in((self.inputs, self.kwargs))])
        return int(meter.peak)

    def meter(self) -> Any:
        if self.mode is not None:
            return _FakeMeter()
        return _CudaMeter() if self.x.is_cuda else _CpuMeter()


@dataclass
class _Stage:
    """One step in calls of its own, with the values of the streams that reach it."""

    rehearsal: Rehearsal
    part: BoundStep
    values: Sequence[Any]

    def costs(self) -> dict[str, Cost]:
        """What the step costs under each execution that is another one here."""
        same = {"offload": not self.rehearsal.x.is_cuda, "select": is_compiled(self.part.fn)}
        executions = [
            execution for execution in self.rehearsal.net._allowed if not same.get(execution)
        ]
        for execution in executions:
            self.run(execution)  # warm: workspaces, lazily made state, pools
        times = self.times(executions)
        return {execution: self.cost(execution, times[execution]) for execution in executions}

    def call(self, execution: str, steps: int = 1) -> Call:
        """A call whose streams are not leaves, so that nothing but the call and its graph holds them."""
        streams = [tree_map(lambda leaf: _leaf(leaf).clone(), value) for value in self.values]
        return self.rehearsal.call(streams, [execution] * steps)

    def run(self, execution: str, steps: int = 1) -> None:
        """Forward and backward of the step, or of a chain of its like."""
        call = self.call(execution, steps)
        for index in range(steps):
            call.step(index, self.part)
        root = _spring(call.finish())
        call.__exit__()
        if root is not None:
            with _outside_autocast():
                root.backward()
        # In a longer call the state that backward has reached outlives this step: the call is held
        # until here.
        del call
        _clear(
            [
                *self.part.fn.parameters(),
                *(leaf for leaf in _tensors_in(self.part.kwargs) if leaf.is_leaf),
            ]
        )

    def times(self, executions: Sequence[str]) -> dict[str, int]:
        """Nanoseconds of forward and backward: of runs in turn, the least disturbed."""
        if self.rehearsal.mode is not None:
            return {execution: self.estimate(execution) for execution in executions}
        found: dict[str, list[int]] = {execution: [] for execution in executions}
        began = time.perf_counter()
        for turn in range(9):
            for execution in executions:
                _settle(self.rehearsal.x.device)
                start = time.perf_counter_ns()
                # In a chain, as in a sequence, the host runs ahead of the device.
                self.run(execution, _REPEATED)
                _settle(self.rehearsal.x.device)
                found[execution].append((time.perf_counter_ns() - start) // _REPEATED)
            if turn >= 2 and time.perf_counter() - began > 1.0:
                break
        times = {execution: min(measured) for execution, measured in found.items()}
        # What does all of another's work and more takes no less: what says otherwise is noise.
        less_work = {
            "select": "store",
            "checkpoint": "store",
            "offload": "checkpoint",
            "invert": "checkpoint",
        }
        for execution in executions[1:]:
            times[execution] = max(times[execution], times[less_work[execution]])
        return times

    def estimate(self, execution: str) -> int:
        with _FakeMeter() as traffic, FlopCounterMode(display=False) as flops:
            self.run(execution)
        return int(
            1e9
            * (
                flops.get_total_flops() / _FLOPS_PER_SECOND
                + traffic.written * 3 / _BYTES_PER_SECOND
            )
        )

    def cost(self, execution: str, nanoseconds: int) -> Cost:
        meter = self.rehearsal.meter()
        with meter.watch():
            call = self.call(execution)
            before = _memories(call)
            call.step(0, self.part)
            after = _memories(call)[2 * self.part.target :][:2]
            # Holds the graph and not the streams. A node that Python made is held by its output
            # alone.
            graph = _spring(call.start())
            call.__exit__()
            torch.clear_autocast_cache()
            if self.rehearsal.mode is None:
                _settle(self.rehearsal.x.device)
        keeps = sum(
            1 << part for part, memory in enumerate(before) if memory.size and memory.alive()
        )
        shared = sum(memory.size for memory in (*before, *after) if memory.alive())
        own = max(0, meter.held - shared)
        del call, graph

        meter = self.rehearsal.meter()
        with meter.watch():
            self.run(execution)
        return Cost(own, keeps, meter.peak, nanoseconds)


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
    """The tensor from which backward goes to all of these; None where none needs a gradient."""
    wanted = [leaf for leaf in tree_leaves(list(values)) if leaf.requires_grad]
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


def _clear(leaves: Sequence[Tensor]) -> None:
    """Forget what a run left behind."""
    for leaf in leaves:
        leaf.grad = None
    torch.clear_autocast_cache()


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


def _kind(part: BoundStep, values: Sequence[Any]) -> Any:
    """Equal for steps that cost alike: those of branches that do the same work on the same streams."""
    work: list[Any] = []
    for name, module in part.fn.named_modules(remove_duplicate=False):
        settings = {key: value for key, value in sorted(vars(module).items()) if key[:1] != "_"}
        settings |= module._parameters | module._buffers
        hooks = (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        )
        work.append(
            (name, type(module), tuple(settings), _describe(list(settings.values())), hooks)
        )
    leaves = pytree.tree_leaves(values)
    strides = tuple(leaf.stride() for leaf in leaves)
    return (
        tuple(work),
        part.target,
        part.source,
        strides,
        _describe([*leaves, *pytree.tree_leaves(part.kwargs)]),
    )


def _describe(value: Any) -> Any:
    """What of a setting, or of a keyword, decides costs."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_describe(item) for item in value)
    return getattr(
        value if callable(value) else type(value), "__qualname__", type(value).__qualname__
    )


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

        def freed(_: Any) -> None:
            self.held -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)


def _settle(device: torch.device) -> None:
    """Wait for a device; a tensor on its way to the host is freed by the first allocation after its copy."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.empty(1, device=device)
