"""What each step of a sequence costs under each execution, measured on stand-ins for its tensors.

`Measurement.chain` goes through the steps once. Of each kind of step, a `_StepMeasurement` runs the
first under every execution, in calls of its own, and measures bytes and seconds: steps of the same
kind cost the same. `Measurement.peak` runs the whole sequence. With fake tensors the same code
counts bytes, and times are estimated.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .._cycle import ReversibleCycle
from .._engine import Call
from .._execution import BY_NAME, INVERT, STORE, Execution
from .._memory import CpuMeter, CudaMeter, FakeMeter, all_tensors_in, storages_of
from .._sequence import ReversibleSequence
from .._state.branch import is_compiled
from .._step import BoundStep, hands_on
from .._streams.arithmetic import FixedArithmetic
from .._streams.monitor import RangeMonitor
from .._trees import tree_leaves, tree_map
from .solver import Chain, Cost
from .stand_ins import StandIns

# Steps of one kind in the call that is timed.
_REPEATED = 3
# By how much the least of several times may be wrong.
_NOISE = 0.03
# What an accelerator of today reaches in low precision, where nothing is measured.
_FLOPS_PER_SECOND = 4e14
_BYTES_PER_SECOND = 2.5e12


class Measurement:
    """Measures the steps of a sequence.

    Args:
        replaced: the sequence, with stand-ins for its tensors.
        tile: tokens in a tile of each tiled step, 0 to leave these as they are.
    """

    def __init__(self, replaced: StandIns, tile: int = 0) -> None:
        self.replaced = replaced
        self.net = replaced.net
        self.tile = tile
        if tile:
            self.net._retile(tile)
        self.mode = replaced.mode
        self.x = tree_leaves(replaced.inputs[0])[0]
        self.inputs: Sequence[Any] = replaced.inputs
        if isinstance(self.net, ReversibleSequence | ReversibleCycle):
            self.inputs = self.net._split(replaced.inputs[0])
        self.steps = [step for _, step in self.net._parts(self.inputs, replaced.kwargs)]
        self.arithmetic = self.net._arithmetic(*tree_leaves(replaced.inputs))
        self.streams = tree_leaves(list(self.inputs))

    def chain(self) -> Chain:
        """Measure each kind of step once, in order, on the streams that reach it."""
        call = self.call(self.inputs, [STORE])
        # Without a record, but with gradients: compiled branches are compiled for these.
        call.recording = False
        kinds: dict[Any, int] = {}
        costs: list[dict[str, Cost]] = []
        steps: list[tuple[int, int]] = []
        for step in self.steps:
            call.streams = cast(Any, pytree.tree_map_only(Tensor, _as_leaf, call.streams))
            last = _StepMeasurement(self, step, call.start())
            number = kinds.setdefault(_kind(step, last.values), len(costs))
            if number == len(costs):
                costs.append(last.costs())
            steps.append((number, step.target))
            call.step(0, step)
        values = call.start()
        # A stream in tiles is there once, not beside the tensor in which it was read.
        sizes = tuple(
            memory.size
            for memory in _stream_memory(self.call(values, [STORE]) if call.tape.tiled else call)
        )
        meter = self.meter()
        with torch.no_grad(), meter.watch():
            result = self.end(values), call.aux
        held = sum(storage.nbytes() for storage in storages_of(all_tensors_in(result)))
        # The last step is a kind of its own: what follows it shares tensors with it.
        costs.append(last.costs_at_end(costs[steps[-1][0]], held))
        steps[-1] = len(costs) - 1, steps[-1][1]
        keywords = [leaf for leaf in all_tensors_in(self.replaced.kwargs) if leaf.requires_grad]
        return Chain(
            sizes=sizes,
            given=0 if isinstance(self.arithmetic, FixedArithmetic) else (1 << len(sizes)) - 1,
            kinds=tuple(costs),
            steps=tuple(steps),
            # Gradients of keywords add up, those of parameters are no activations.
            overhead=held + sum(storage.nbytes() for storage in storages_of(keywords)),
            end=sum(sizes) + meter.peak - held,
        )

    def end(self, values: Sequence[Any]) -> Any:
        """Return the result of the sequence, from the streams after its last step."""
        return self.net._tapped(*values)

    def call(self, streams: Sequence[Any], executions: Sequence[Execution]) -> Call:
        """Return a call in which steps of the sequence can run."""
        return Call(streams, self.arithmetic, self.net._settings.options, executions)

    def fill_gradients(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Give parameters gradients, beside which activations are counted; return the gradients."""
        gradients = []
        for parameter in parameters:
            if parameter in self.replaced.filled:
                parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        return gradients

    def peak(self, executions: Sequence[str]) -> int:
        """Return the bytes at the peak of a run, beside the gradients of parameters."""
        given = self.replaced
        if self.tile:
            self.net._retile(self.tile)
        self.net.execution = cast(Any, list(executions))
        # A new monitor looks at every step of its first call, and at fewer in later ones.
        self.net._monitor = RangeMonitor()
        given.renew()
        torch.clear_autocast_cache()
        self.fill_gradients(given.filled)
        meter = self.meter()
        with meter.watch():
            result = self.net(*given.inputs, **given.kwargs)
            outputs = [leaf for leaf in all_tensors_in(result) if leaf.requires_grad]
            del result
        ones = [leaf.detach().new_ones(()).expand_as(leaf) for leaf in outputs]
        with meter.watch(), _outside_autocast():
            torch.autograd.backward(outputs, ones)
        _clear([*self.net.parameters(), *all_tensors_in((given.inputs, given.kwargs))])
        return int(meter.peak)

    def meter(self) -> CpuMeter | CudaMeter | FakeMeter:
        """Return a meter for the tensors of the sequence."""
        if self.mode is not None:
            return FakeMeter()
        return CudaMeter() if self.x.is_cuda else CpuMeter()


@dataclass
class _StepMeasurement:
    """Runs one step in calls of its own.

    Attributes:
        whole: the measurement of the sequence.
        step: the step.
        values: of the streams that reach it.
    """

    whole: Measurement
    step: BoundStep
    values: Sequence[Any]

    def costs(self) -> dict[str, Cost]:
        """Return what the step costs under each execution that differs from the others here."""
        executions = [BY_NAME[name] for name in self.whole.net._allowed]
        if not self.whole.x.is_cuda:
            executions = [execution for execution in executions if not execution.on_host]
        if hands_on(self.step.fn):
            # To keep what takes no time to undo is of no use.
            executions = [execution for execution in executions if execution in (STORE, INVERT)]
        if is_compiled(self.step.fn):
            executions = [execution for execution in executions if not execution.keeps_results]
        for execution in executions:
            self.run(execution)  # Warm up: workspaces, lazily made state, pools of memory.
        times = self.times(executions)
        return {e.name: self.cost(e, times[e]) for e in executions}

    def costs_at_end(self, costs: Mapping[str, Cost], held: int) -> dict[str, Cost]:
        """Return these costs for the last step, beside `held` bytes of the result."""
        found = {}
        for name, cost in costs.items():
            forward, peak = self.peaks(BY_NAME[name], at_end=True)
            found[name] = cost._replace(forward=forward, peak=peak - held)
        return found

    def call(self, execution: Execution, steps: int = 1) -> Call:
        """Return a call on streams that nothing but the call and its graph holds."""
        streams = [tree_map(lambda leaf: _as_leaf(leaf).clone(), value) for value in self.values]
        return self.whole.call(streams, [execution] * steps)

    def run(
        self,
        execution: Execution,
        steps: int = 1,
        watch: Callable[[], Any] = contextlib.nullcontext,
        at_end: bool = False,
    ) -> None:
        """Run forward and backward of the step, or of a chain of such steps, each under `watch`.

        At the end the result of the sequence is made of the streams, and held.
        """
        with watch():
            call = self.call(execution, steps)
            for index in range(steps):
                call.step(index, self.step)
            values, aux = call.finish(), call.aux
            call.__exit__()
        if at_end:
            with watch():
                values = [self.whole.end(values), aux]
            roots = [leaf for leaf in all_tensors_in(values) if leaf.requires_grad]
        else:
            with watch():
                root = _root([*values, aux])
            roots = [] if root is None else [root]
            del values, aux
        ones = [leaf.detach().new_ones(()).expand_as(leaf) for leaf in roots]
        with watch(), _outside_autocast():
            if roots:
                torch.autograd.backward(roots, ones)
        # In a longer call the state that backward has reached outlives this step, so the call is
        # held until here.
        del call
        keywords = [leaf for leaf in all_tensors_in(self.step.kwargs) if leaf.is_leaf]
        _clear([*self.step.fn.parameters(), *keywords])

    def times(self, executions: Sequence[Execution]) -> dict[Execution, int]:
        """Return the nanoseconds of forward and backward."""
        if self.whole.mode is not None:
            return {execution: self.estimate(execution) for execution in executions}
        measured: dict[Execution, list[int]] = {execution: [] for execution in executions}
        empty: list[int] = []
        began = time.perf_counter()
        for turn in range(9):
            for execution in executions:
                # In a chain, as in a sequence, the host runs ahead of the device.
                measured[execution].append(self.time(execution, _REPEATED))
            empty.append(self.time(STORE, 0))
            if turn >= 2 and time.perf_counter() - began > 1.0:
                break
        # The least disturbed run counts, without what a call costs whatever its steps are: a
        # sequence is one call.
        least = {
            execution: max(0, min(runs) - min(empty)) // _REPEATED
            for execution, runs in measured.items()
        }
        undone = least.get(INVERT, 0)
        for execution, nanoseconds in least.items():
            keeps = execution.keeps_target or execution.keeps_results
            if keeps and nanoseconds > (1 - _NOISE) * undone:
                # Memory is not spent on a gain that noise explains: the plan could be slower.
                least[execution] = max(nanoseconds, undone + 1)
        # Noise cannot make more work take less time.
        return {a: max(least[b] for b in executions if _works_at_least(a, b)) for a in executions}

    def time(self, execution: Execution, steps: int) -> int:
        """Return the nanoseconds of a call with some such steps."""
        _synchronize(self.whole.x.device)
        start = time.perf_counter_ns()
        self.run(execution, steps)
        _synchronize(self.whole.x.device)
        return time.perf_counter_ns() - start

    def estimate(self, execution: Execution) -> int:
        """Return nanoseconds that follow from floating-point operations and bytes written."""
        with FakeMeter() as traffic, FlopCounterMode(display=False) as flops:
            self.run(execution)
        computing = flops.get_total_flops() / _FLOPS_PER_SECOND
        moving = traffic.written * 3 / _BYTES_PER_SECOND
        return int(1e9 * (computing + moving))

    def cost(self, execution: Execution, nanoseconds: int) -> Cost:
        """Return the bytes that the step takes, with its time."""
        self.whole.replaced.renew()
        meter = self.whole.meter()
        with meter.watch():
            call = self.call(execution)
            before = _stream_memory(call)
            call.step(0, self.step)
            after = _stream_memory(call)[2 * self.step.target :][:2]
            # This holds the graph and not the streams. A node made in Python is held by its output
            # alone.
            graph = _root([*call.start(), call.aux])
            call.__exit__()
            torch.clear_autocast_cache()
            if self.whole.mode is None:
                _synchronize(self.whole.x.device)
        kept = [part for part, memory in enumerate(before) if memory.size and memory.alive()]
        shared = sum(memory.size for memory in (*before, *after) if memory.alive())
        # The root of the graph is one element, and belongs to no step.
        root = 0 if graph is None else graph.nbytes
        own = max(0, meter.current - shared - root)
        del call, graph

        return Cost(own, sum(1 << part for part in kept), *self.peaks(execution), nanoseconds)

    def peaks(self, execution: Execution, at_end: bool = False) -> tuple[int, int]:
        """Return the bytes at the worst moments of forward and backward."""
        # Held until the meter is off, which does not know what was allocated before.
        gradients = self.whole.fill_gradients(self.step.fn.parameters())
        meter = self.whole.meter()
        peaks: list[int] = []

        @contextlib.contextmanager
        def watch() -> Iterator[None]:
            meter.peak = meter.current
            with meter.watch():
                yield
            peaks.append(meter.peak)

        self.run(execution, watch=watch, at_end=at_end)
        del gradients
        forward, _, backward = peaks
        return forward, backward


def _works_at_least(a: Execution, b: Execution) -> bool:
    """Check whether the first execution of a step does all of the work of the second."""
    # Not of undoing a step and keeping its target: the one evaluates all of the branch, but where
    # kernels are small, saving the target and stopping a replay early take the host longer.
    alike = (a.rebuilds, a.keeps_results, a.keeps_target) == (True, b.keeps_results, b.keeps_target)
    return a is b or not b.rebuilds or (alike and a.on_host >= b.on_host)


class _FreshGradients(torch.autograd.Function):
    """Root node that hands autograd fresh gradients, so that their memory counts."""

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


def _root(values: Sequence[Any]) -> Tensor | None:
    """Return a tensor whose backward reaches all of these, or None if none needs a gradient."""
    wanted = [leaf for leaf in tree_leaves(list(values)) if leaf.requires_grad]
    return _FreshGradients.apply(*wanted) if wanted else None


@contextlib.contextmanager
def _outside_autocast() -> Iterator[None]:
    """Leave all contexts of autocast for a while, and drop their casts."""
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
    """Drop the gradients and casts that a run has left."""
    for leaf in leaves:
        leaf.grad = None
    torch.clear_autocast_cache()


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _WeakMemory:
    """The memory of a part of a stream: its bytes, and whether it is still allocated.

    It refers to the memory without holding it.
    """

    def __init__(self, storages: Sequence[torch.UntypedStorage]) -> None:
        self.size = sum(storage.nbytes() for storage in storages)
        self.storages = [weakref.ref(storage) for storage in storages]

    def alive(self) -> bool:
        return any(storage() is not None for storage in self.storages)


def _stream_memory(call: Call) -> list[_WeakMemory]:
    """Return two for each stream: the value that branches read, and the rest of its encoding."""
    memory = []
    for value, encoded in call.streams:
        read = {storage._cdata: storage for storage in storages_of(all_tensors_in(value))}
        encoding = storages_of(all_tensors_in(encoded))
        rest = [storage for storage in encoding if storage._cdata not in read]
        memory += [_WeakMemory(list(read.values())), _WeakMemory(rest)]
    return memory


def _kind(step: BoundStep, values: Sequence[Any]) -> Any:
    """Return a key that is equal for steps whose branches do the same work on equal streams."""
    work: list[Any] = []
    for name, module in itertools.chain(
        step.fn.named_modules(remove_duplicate=False), step.coupling.named_modules()
    ):
        settings = {key: value for key, value in sorted(vars(module).items()) if key[:1] != "_"}
        settings |= module._parameters | module._buffers
        described = _describe(list(settings.values()))
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
        work.append((name, type(module), tuple(settings), described, tuple(map(len, hooks))))
    leaves = pytree.tree_leaves(values)
    strides = tuple(leaf.stride() for leaf in leaves)
    tensors = _describe([*leaves, *pytree.tree_leaves(step.kwargs)])
    return tuple(work), step.target, step.source, repr(step.tile), strides, tensors


def _describe(value: Any) -> Any:
    """Return what of a setting, or of a keyword, decides costs."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_describe(item) for item in value)
    kind = type(value).__qualname__
    return getattr(value, "__qualname__", kind) if callable(value) else kind


def _synchronize(device: torch.device) -> None:
    """Wait for a device, and for copies to the host: the next allocation frees their sources."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.empty(1, device=device)
