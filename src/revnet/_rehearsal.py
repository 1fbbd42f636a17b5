"""What each step of a sequence costs under each execution: a rehearsal, after which all is as it was."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ._couplings import tree_leaves
from ._engine import Call
from ._kept import compiled
from ._memory import _CpuMeter, _CudaMeter, _storages, _tensors_in
from ._program import Program
from ._replay import RandomState, devices_of
from ._sequence import ReversibleSequence, _Blocks
from ._solver import Chain, Cost, Solution, simulate
from ._steps import FixedArithmetic, FloatArithmetic
from ._streams import RangeMonitor
from ._traced import Part


class Rehearsal:
    """Runs steps of a sequence on copies of its parameters' identities, its buffers and its randomness."""

    def __init__(self, net: Program, x: Any, kwargs: dict[str, Any]) -> None:
        self.net = net
        self.original = x if isinstance(x, tuple) else (x,)
        tensors = [*net.parameters(), *_tensors_in((self.original, kwargs))]
        fakes = [t for t in tensors if isinstance(t, FakeTensor)]
        self.label = str(tree_leaves(self.original[0])[0].device)
        self.mode: FakeTensorMode | None = None
        if fakes:
            self.mode = fakes[0].fake_mode
        elif any(t.is_meta for t in tensors):
            self.mode = FakeTensorMode()
        self.estimated = self.mode is not None
        self.given = kwargs
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Rehearsal:
        with contextlib.ExitStack() as stack:
            if self.mode is not None:
                # The engine has a real tensor of its own, without elements that matter.
                stack.callback(setattr, self.mode, "allow_non_fake_inputs", self.mode.allow_non_fake_inputs)
                self.mode.allow_non_fake_inputs = True
                # An input that is fake already brings its mode, which may be entered.
                if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not self.mode:
                    stack.enter_context(self.mode)
            else:
                stack.enter_context(
                    RandomState(devices_of([*_tensors_in(self.original), *self.net.parameters()])).restored()
                )
            self.inputs: tuple[Any, ...] = pytree.tree_map_only(Tensor, self._alias, self.original)
            self.x = tree_leaves(self.inputs[0])[0]
            self.kwargs = pytree.tree_map_only(Tensor, self._alias, self.given)
            self._swap(stack)
            self.device = self.x.device
            options = self.net._options
            # Under fake tensors there is no state of a generator to compare.
            self.options = replace(options, preserve_rng_state=options.preserve_rng_state and self.mode is None)
            self.sites = [part for _, part in self.net._parts(self.inputs, self.kwargs)]
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stack.close()

    def _alias(self, tensor: Tensor) -> Tensor:
        """Another tensor with the same values and without a past: its gradient is not the original's."""
        if tensor.is_meta and self.mode is not None:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad
            )
        if self.mode is not None and not isinstance(tensor, FakeTensor):
            return self.mode.from_tensor(tensor).detach().requires_grad_(tensor.requires_grad)
        return tensor.detach().requires_grad_(tensor.requires_grad)

    def _swap(self, stack: contextlib.ExitStack) -> None:
        """Put stand-ins in the place of parameters and buffers, until `stack` closes."""
        net = self.net
        stack.callback(setattr, net, "_monitor", net._monitor)
        net._monitor = RangeMonitor()
        stack.callback(setattr, net, "execution", net.execution)
        if isinstance(net, _Blocks):
            # A plan is for the call in which no block is dropped.
            stack.callback(setattr, net, "layer_dropout", net.layer_dropout)
            net.layer_dropout = 0.0
        copies: dict[int, Any] = {}
        self.accumulated: dict[int, bool] = {}
        for module in net.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if hasattr(parameter, "placements"):
                    # Sharded parameters belong to their group; only their gradient is put aside.
                    stack.callback(setattr, parameter, "grad", parameter.grad)
                    self.accumulated[id(parameter)] = parameter.grad is not None
                    parameter.grad = None
                    continue
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(self._alias(parameter), parameter.requires_grad)
                    self.accumulated[id(copies[id(parameter)])] = parameter.grad is not None
                stack.callback(setattr, module, name, parameter)
                setattr(module, name, copies[id(parameter)])
            for name, buffer in list(module._buffers.items()):
                if buffer is None:
                    continue
                if id(buffer) not in copies:
                    copies[id(buffer)] = self._alias(buffer).clone()
                stack.callback(module._buffers.__setitem__, name, buffer)
                module._buffers[name] = copies[id(buffer)]

    def streams(self) -> tuple[Any, ...]:
        return self.net._split(self.x) if isinstance(self.net, ReversibleSequence) else self.inputs

    def arithmetic(self) -> FloatArithmetic | FixedArithmetic:
        return self.net._arithmetic(self.x)

    def chain(self) -> Chain:
        """Measures each kind of step once, in the order of the sequence, on the streams that reach it."""
        names = [name for name in self.net._allowed if name != "offload" or self.device.type == "cuda"]
        arithmetic = self.arithmetic()
        kinds: dict[Any, int] = {}
        costs: list[dict[str, Cost]] = []
        steps: list[tuple[int, int]] = []
        needs_grad = [any(leaf.requires_grad for leaf in tree_leaves(value)) for value in self.streams()]
        with torch.no_grad():
            call = Call(self.streams(), arithmetic, self.options, ["store"] * len(self.sites))
        sizes, parts = _parts(call)
        given = () if isinstance(arithmetic, FixedArithmetic) else tuple(range(len(sizes)))
        for site in self.sites:
            values = [value for value, _ in call.streams]
            key = self._key(site, values, needs_grad)
            if key not in kinds:
                kinds[key] = len(kinds)
                possible = [name for name in names if name != "select" or not compiled(site.fn)]
                costs.append(self._costs(site, values, needs_grad, arithmetic, possible))
            steps.append((kinds[key], site.target))
            reached = any(needs_grad[i] for i in site.source) or any(p.requires_grad for p in _parameters(site.fn))
            needs_grad[site.target] |= reached or any(
                isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(site.kwargs)
            )
            # With gradients, for which measured steps are compiled already, if they are compiled.
            call.step(0, site.fn, site.target, site.source, site.coupling, site.kwargs, site.name)
            call.streams = [
                cast(Any, pytree.tree_map_only(Tensor, partial(_fresh, requires_grad=grad), stream))
                for stream, grad in zip(call.streams, needs_grad, strict=True)
            ]
        result = 0
        if isinstance(self.net, ReversibleSequence):
            with torch.no_grad():
                result = _size(self.net._merge(*(value for value, _ in call.streams)))
        return Chain(
            sizes=sizes,
            streams=parts,
            given=given,
            kinds=tuple(costs),
            steps=tuple(steps),
            gradients=self._gradients(self.accumulated),
            result=result,
            ending=2 * result,
            handed=not isinstance(self.net, ReversibleSequence),
            # Merging by a sum gives both streams one gradient, a tensor that exists once.
            credit=_size(call.streams[0][0]) if self._sums() else 0,
        )

    def _sums(self) -> bool:
        return isinstance(self.net, ReversibleSequence) and self.net.merge != "concat"

    def _key(self, site: Part, values: list[Any], needs_grad: list[bool]) -> Any:
        """Equal for steps that cost alike."""
        layouts = [(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in pytree.tree_leaves(values)]
        return (
            _signature(site.fn),
            _signature(site.coupling),
            site.target,
            site.source,
            tuple(needs_grad),
            tuple(layouts),
            tuple(_describe(value) for value in pytree.tree_leaves(site.kwargs)),
        )

    def _gradients(self, accumulated: Mapping[int, bool]) -> tuple[int, ...]:
        """Bytes of parameter gradients that each step makes: those not there before and not made by a later step."""
        made: set[int] = set()
        gradients = []
        for site in reversed(self.sites):
            total = 0
            for parameter in _parameters(site.fn):
                if parameter.requires_grad and id(parameter) not in made and not accumulated.get(id(parameter)):
                    total += parameter.numel() * parameter.element_size()
                made.add(id(parameter))
            gradients.append(total)
        return tuple(gradients[::-1])

    def _costs(
        self,
        site: Part,
        values: list[Any],
        needs_grad: list[bool],
        arithmetic: FloatArithmetic | FixedArithmetic,
        names: Sequence[str],
    ) -> dict[str, Cost]:
        stage = _Stage(self, site, values, needs_grad, arithmetic)
        for name in names:
            stage.run(name)  # warm: workspaces, lazily made state, pools
        times = stage.times(names)
        return {name: stage.cost(name, times[name]) for name in names}

    def excess(self, solution: Solution, chain: Chain) -> int:
        """Bytes by which the peak of a run exceeds what the model says of it."""
        # Stand-ins have no gradients, so a run makes all of them: the model is asked about such a run.
        predicted = simulate(replace(chain, gradients=self._gradients({})), solution.executions).peak
        self.net.execution = list(solution.executions)
        # A new monitor looks at every step of its first call, and later ones at fewer.
        self.net._monitor = RangeMonitor()
        torch.clear_autocast_cache()
        meter = _meter(self.device, self.mode)
        with meter.watch():
            outputs = list(_tensors_in(self.net(*self.inputs, **self.kwargs)))
        wanted = [leaf for leaf in outputs if leaf.requires_grad]
        ones = [leaf.detach().new_ones(()).expand_as(leaf) for leaf in wanted]
        with meter.watch():
            torch.clear_autocast_cache()
            torch.autograd.backward(wanted, ones)
        _clear(self.net)
        for leaf in _tensors_in((self.inputs, self.kwargs)):
            leaf.grad = None
        return int(meter.peak - predicted)


# Steps in the chain that is timed.
_REPEATED = 3


class _Stage:
    """One step in a call of its own."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        site: Part,
        values: list[Any],
        needs_grad: list[bool],
        arithmetic: FloatArithmetic | FixedArithmetic,
    ) -> None:
        self.rehearsal = rehearsal
        self.site = site
        self.values = values
        self.needs_grad = needs_grad
        self.arithmetic = arithmetic
        self.leaves = [*_parameters(site.fn), *_parameters(site.coupling)]
        self.leaves += [leaf for leaf in _tensors_in(site.kwargs) if leaf.is_leaf]

    def call(self, execution: str, steps: int = 1) -> Call:
        """A call whose streams are not leaves, so that nothing but the call and its graph holds them."""
        streams = [
            pytree.tree_map_only(Tensor, partial(_fresh, requires_grad=grad), value)
            for value, grad in zip(self.values, self.needs_grad, strict=True)
        ]
        return Call(streams, self.arithmetic, self.rehearsal.options, [execution] * steps)

    def step(self, call: Call, index: int = 0) -> None:
        site = self.site
        call.step(index, site.fn, site.target, site.source, site.coupling, site.kwargs, site.name)

    def run(self, execution: str, steps: int = 1) -> None:
        """Forward and backward of the step, or of a chain of its like."""
        call = self.call(execution, steps)
        for index in range(steps):
            self.step(call, index)
        root = _root(call.finish())
        call.__exit__()
        if root is not None:
            root.backward()
        self.clear()

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        torch.clear_autocast_cache()

    def times(self, names: Sequence[str]) -> dict[str, int]:
        """Nanoseconds of forward and backward: of runs in turn, the least disturbed."""
        if self.rehearsal.estimated:
            return {name: self._estimate(name) for name in names}
        device = self.rehearsal.device
        found: dict[str, list[int]] = {name: [] for name in names}
        began = time.perf_counter()
        for turn in range(9):
            for name in names:
                _synchronize(device)
                start = time.perf_counter_ns()
                # In a chain, as in a sequence, the host runs ahead of the device.
                self.run(name, _REPEATED)
                _synchronize(device)
                found[name].append((time.perf_counter_ns() - start) // _REPEATED)
            if turn >= 2 and time.perf_counter() - began > 1.0:
                break
        return _ordered({name: min(values) for name, values in found.items()})

    def _estimate(self, name: str) -> int:
        with _FakeMeter() as traffic, FlopCounterMode(display=False) as flops:
            self.run(name)
        return int(1e9 * (flops.get_total_flops() / _FLOPS_PER_SECOND + traffic.written * 3 / _BYTES_PER_SECOND))

    def cost(self, execution: str, nanoseconds: int) -> Cost:
        rehearsal = self.rehearsal
        meter = _meter(rehearsal.device, rehearsal.mode)
        with meter.watch():
            call = self.call(execution)
        incoming = meter.held
        before = _weak_parts(call)
        with meter.watch():
            self.step(call)
        forward = meter.peak - incoming
        after = _weak_parts(call)
        site = self.site
        # Holds the graph and not the streams. A node that Python made is held by its output alone.
        graph = _root([value for value, _ in call.streams])
        with meter.watch():
            call.streams, call.aux = [], {}
            torch.clear_autocast_cache()
        width = len(before) // len(self.values)
        keeps = tuple(part for part, (alive, _) in enumerate(before) if alive())
        own_parts = range(site.target * width, (site.target + 1) * width)
        keeps_result = tuple(part for part in own_parts if after[part][0]())
        kept = sum(before[part][1] for part in keeps) + sum(after[part][1] for part in keeps_result)
        own = max(0, meter.held - kept)
        del call, graph

        meter = _meter(rehearsal.device, rehearsal.mode)
        with meter.watch():
            call = self.call(execution)
            self.step(call)
            root = _root(call.finish())
            call.__exit__()
        torch.clear_autocast_cache()
        meter.peak = meter.held
        if root is not None:
            with meter.watch():
                root.backward()
        backward = meter.peak
        # In a longer call the state that backward has reached outlives this step: the call is held until here.
        del call
        self.clear()
        return Cost(own, keeps, keeps_result, forward, backward, nanoseconds)


def _ordered(times: dict[str, int]) -> dict[str, int]:
    """`times` such that doing all of another's work and more takes no less: what says otherwise is noise."""
    for less, more in (
        ("store", "select"),
        ("store", "checkpoint"),
        ("checkpoint", "offload"),
        ("checkpoint", "invert"),
    ):
        if less in times and more in times:
            times[more] = max(times[less], times[more])
    return times


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


def _root(streams: Sequence[Any]) -> Tensor | None:
    wanted = [leaf for value in streams for leaf in tree_leaves(value) if leaf.requires_grad]
    return _Spring.apply(*wanted) if wanted else None


def _fresh(leaf: Tensor, requires_grad: bool) -> Tensor:
    return leaf.detach().requires_grad_(requires_grad and leaf.is_floating_point()).clone()


def _parts(call: Call) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Bytes of the parts of the streams, and which parts each stream has."""
    sizes: list[int] = []
    streams = []
    for value, held in call.streams:
        both = [value] if value is held else [value, held]
        streams.append(tuple(range(len(sizes), len(sizes) + len(both))))
        sizes += [_size(tree) for tree in both]
    return tuple(sizes), tuple(streams)


def _weak_parts(call: Call) -> list[tuple[Callable[[], bool], int]]:
    """For each part of the streams: whether it is alive, and its bytes."""
    return [
        (_Alive(tree), _size(tree))
        for value, held in call.streams
        for tree in ([value] if value is held else [value, held])
    ]


class _Alive:
    """Tells whether the memory of a part of a stream still is, without holding it."""

    def __init__(self, tree: Any) -> None:
        self.storages = [weakref.ref(storage) for storage in _storages(_tensors_in(tree))]

    def __call__(self) -> bool:
        return any(storage() is not None for storage in self.storages)


def _size(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in _tensors_in(tree))


def _parameters(fn: Any) -> list[Tensor]:
    module = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def _clear(fn: Any) -> None:
    """Drop the gradients of the parameters of `fn`."""
    for parameter in _parameters(fn):
        parameter.grad = None


def _signature(fn: Any) -> Any:
    """Equal for branches that do the same work."""
    module = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    if not isinstance(module, nn.Module):
        return id(fn)
    found: list[Any] = [getattr(fn, "__name__", None)]
    for name, child in module.named_modules(remove_duplicate=False):
        settings = [(key, _describe(value)) for key, value in sorted(child.__dict__.items()) if key[:1] != "_"]
        tensors = [
            (key, _describe(value)) for owned in (child._parameters, child._buffers) for key, value in owned.items()
        ]
        hooks = [len(child._forward_hooks), len(child._forward_pre_hooks), len(child._backward_hooks)]
        found.append((name, type(child), tuple(settings), tuple(tensors), tuple(hooks)))
    return tuple(found)


def _describe(value: Any) -> Any:
    """What of a setting, or of a keyword, decides costs."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_describe(item) for item in value)
    return type(value).__qualname__ if not callable(value) else getattr(value, "__qualname__", type(value).__qualname__)


# What an accelerator of today reaches in low precision, where nothing was measured.
_FLOPS_PER_SECOND = 4e14
_BYTES_PER_SECOND = 2.5e12


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
        known = {
            leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), known)
        return out

    def _count(self, storage: Any, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self.alive:
            return
        size = storage.nbytes()
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


def _meter(device: torch.device, mode: FakeTensorMode | None) -> Any:
    if mode is not None:
        return _FakeMeter()
    return _CudaMeter() if device.type == "cuda" else _CpuMeter()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
