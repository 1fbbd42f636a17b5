"""A replay sees everything that its call saw, and leaves no trace: one case for each kind of fault.

Each gradient is compared with that of the plain stored loop in float64; in fixed streams, with that
of stored steps, bit by bit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import revnet
from oracle import StoredSequence, assert_near, assert_same_gradients, gradients_of, weighted
from revnet import Coupling, Momentum, Reversible, ReversibleError, ReversibleSequence, Step
from revnet._engine.backward import Lock

WIDTH = 8
FLOAT = [("float", execution) for execution in ("invert", "checkpoint", "select", "offload")]
FIXED = [("fixed", execution) for execution in ("invert", "checkpoint", "select")]
MODES = [pytest.param(mode, id="-".join(mode)) for mode in FLOAT + FIXED]
FLOAT_MODES = [pytest.param(mode, id="-".join(mode)) for mode in FLOAT]

# torch itself scripts what it needs for forward mode.
JIT = "ignore:.*torch.jit.*:DeprecationWarning"

Make = Callable[..., nn.Module]
Run = Callable[[Any, Tensor], Tensor]


def twice(net: nn.Module, x: Tensor) -> Tensor:
    return weighted(net(x)) + weighted(net(2 * x))


def once(net: nn.Module, x: Tensor) -> Tensor:
    return weighted(net(x))


def pairs(branch: Callable[[], nn.Module], depth: int = 2) -> Make:
    """Return what builds a sequence of the given class with this branch in each f."""
    return lambda kind, route=None, **options: kind(
        [(branch(), nn.Linear(WIDTH, WIDTH)) for _ in range(depth)], route or {}, **options
    )


def picture(net: nn.Module) -> Any:
    """Return what tells whether the branches of a net, or anything in them, changed."""
    seen: dict[int, Any] = {}
    return [_picture(module, seen) for module in net.modules()]


def _picture(value: Any, seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return id(value)
    if isinstance(value, Tensor):
        return id(value), value.tolist()
    if value is None or isinstance(value, int | float | str | bytes | frozenset):
        return repr(value)
    seen[id(value)] = value
    parts: list[Any] = [id(value), type(value).__name__]
    if type(value).__module__.startswith("revnet."):
        # The library's own, such as what the range monitor has seen.
        return id(value)
    if isinstance(value, nn.Module):
        own = [name for name in vars(value) if "hook" not in name]
        return [*parts, *((name, _picture(vars(value)[name], seen)) for name in sorted(own))]
    if isinstance(value, dict):
        parts += [(repr(key), _picture(part, seen)) for key, part in value.items()]
    elif isinstance(value, set):
        parts += sorted(map(repr, value))
    elif isinstance(value, list | tuple | collections.deque):
        parts += [_picture(part, seen) for part in value]
    elif isinstance(value, types.FunctionType):
        parts += [_picture(cell.cell_contents, seen) for cell in value.__closure__ or ()]
    elif isinstance(value, functools.partial):
        parts += [_picture(part, seen) for part in (value.func, value.args, value.keywords)]
    elif isinstance(value, types.MethodType):
        return [*parts, _picture(value.__self__, seen)]
    elif isinstance(value, weakref.ref):
        parts.append(_picture(value(), seen))
    elif isinstance(value, torch.Generator):
        parts.append(value.get_state().tolist())
    elif isinstance(value, random.Random):
        parts.append(value.getstate())
    elif isinstance(value, np.ndarray):
        parts.append(value.tolist())
    elif isinstance(value, np.random.Generator):
        parts.append(repr(value.bit_generator.state))
    if hasattr(value, "__dict__") and not isinstance(value, type | types.FunctionType):
        parts.append(_picture(vars(value), seen))
    return parts


def outcome(net: nn.Module, run: Run, retain: bool = False) -> dict[str, Tensor | None]:
    """Return the gradients of one step from seed 1; check that backward left no trace."""
    net = net.double()
    torch.manual_seed(1)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = run(net, x)
    before, random = picture(net), torch.get_rng_state()
    if retain:
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    loss.backward()
    if retain:
        assert torch.equal(first, x.grad)
    for name, p in net.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    assert picture(net) == before, "backward left a trace in the modules"
    assert torch.equal(random, torch.get_rng_state()), "backward moved the generator"
    assert not revnet.replaying()
    found = {"loss": loss.detach(), "x": x.grad, **gradients_of(net)}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers()}


def check(make: Make, run: Run, mode: tuple[str, str], **options: Any) -> None:
    """Compare with the plain loop, or in fixed streams with stored steps."""
    streams, execution = mode
    torch.manual_seed(0)
    found = outcome(make(ReversibleSequence, streams=streams, execution=execution), run, **options)
    torch.manual_seed(0)
    if streams == "fixed":
        expected = outcome(make(ReversibleSequence, streams=streams, execution="store"), run)
        for name, value in expected.items():
            assert found[name] is None if value is None else torch.equal(found[name], value), name
    torch.manual_seed(0)
    plain = outcome(make(StoredSequence), run)
    assert_same_gradients(found, plain, 1e-12 if streams == "float" else 1e-5)


# --- attributes of every kind, changed by the call, by the user, and between two forwards


@dataclasses.dataclass
class Record:
    count: int = 0
    tensors: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Slots:
    count: int = 0


class Plain:
    def __init__(self) -> None:
        self.count = 0


class Dict(dict):
    pass


class Pair(NamedTuple):
    count: int
    log: list[int]


def _add(name: str) -> Callable[[nn.Module], float]:
    def advance(module: nn.Module) -> float:
        setattr(module.state, name, getattr(module.state, name) + 1)
        return getattr(module.state, name)

    return advance


def _key(module: nn.Module) -> float:
    module.state["count"] = module.state.get("count", 0) + 1
    return module.state["count"]


def _append(module: nn.Module) -> float:
    module.state.append(len(module.state))
    return len(module.state)


def _number(module: nn.Module) -> float:
    module.state += 1
    return module.state


def _string(module: nn.Module) -> float:
    module.state += "a"
    return len(module.state)


def _none(module: nn.Module) -> float:
    module.state = 3.0 if module.state is None else None
    return module.state or 1.0


def _set(module: nn.Module) -> float:
    module.state.add(len(module.state))
    return len(module.state)


def _nested(module: nn.Module) -> float:
    module.state["a"][0]["b"].append(1)
    return len(module.state["a"][0]["b"])


def _dataclass(module: nn.Module) -> float:
    module.state.count += 1
    module.state.tensors.append(torch.ones(()))
    return module.state.count + len(module.state.tensors)


def _tuple(module: nn.Module) -> float:
    module.state = (*module.state, len(module.state))
    return len(module.state)


def _named(module: nn.Module) -> float:
    module.state.log.append(1)
    module.state = module.state._replace(count=module.state.count + 1)
    return module.state.count + len(module.state.log)


def _tensor(module: nn.Module) -> Any:
    module.state = module.state + 1
    return module.state


def _in_place(module: nn.Module) -> Any:
    module.state += 1
    return module.state.clone()


def _tensors(module: nn.Module) -> Any:
    module.state.append(torch.ones(()) + len(module.state))
    return sum(module.state)


def _new(module: nn.Module) -> float:
    # An attribute that was not there, then goes.
    if hasattr(module, "extra"):
        del module.extra
        return 1.0
    module.extra = 2.0
    return 2.0


def _itself(module: nn.Module) -> float:
    assert module.state[0] is module.state
    module.state.append(1)
    return len(module.state)


def _cycle(module: nn.Module) -> float:
    assert module.state.other.other is module.state
    module.state.other.count += 1
    return module.state.other.other.other.count


def _cyclic() -> Any:
    one, two = Plain(), Plain()
    one.other, two.other = two, one
    return one


def _holds_itself() -> Any:
    state: list[Any] = []
    state.append(state)
    return state


def _shared(module: nn.Module) -> float:
    assert module.state["a"] is module.state["b"]
    module.state["a"].append(1)
    return len(module.state["b"])


def _pop(module: nn.Module) -> float:
    module.state.rotate(1)
    return module.state[0]


def _order(module: nn.Module) -> float:
    module.state.move_to_end(next(iter(module.state)))
    return next(iter(module.state.values()))


def _counter(module: nn.Module) -> float:
    module.state["a"] += 1
    return module.state["a"]


def _bytes(module: nn.Module) -> float:
    module.state[0] += 1
    return module.state[0]


def _iterator(module: nn.Module) -> float:
    return next(module.state)


def _user_dict(module: nn.Module) -> float:
    module.state["count"] = module.state.get("count", 0) + 1
    return module.state["count"]


def _call(module: nn.Module) -> Any:
    return module.state()


def _counting_closure() -> Any:
    count = 0

    def advance() -> int:
        nonlocal count
        count += 1
        return count

    return advance


def _counting_function() -> Any:
    def advance() -> int:
        advance.count += 1
        return advance.count

    advance.count = 0
    return advance


def _two_closures() -> Any:
    count = 0

    def advance() -> None:
        nonlocal count
        count += 1

    return {"advance": advance, "read": lambda: count}


def _read_shared(module: nn.Module) -> float:
    module.state["advance"]()
    return module.state["read"]()


def _late_closure() -> Any:
    # Its variable has no value before the first call.
    def advance() -> int:
        nonlocal log
        try:
            log = [*log, 1]
        except NameError:
            log = [1, 1]
        return len(log)

    if False:
        log: list[int] = []
    return advance


def _append_one(log: list[int], *, more: list[int]) -> int:
    log.append(1)
    more.append(1)
    return len(log) + len(more)


def _default(log: list[int] = [1]) -> Any:  # noqa: B006
    return lambda log=list(log): log.append(1) or len(log)


class Ticker:
    def __init__(self) -> None:
        self.count = 0

    def tick(self) -> int:
        self.count += 1
        return self.count


def _held_and_referred() -> Any:
    held = Plain()
    return held, weakref.ref(held)


def _through_reference(module: nn.Module) -> float:
    held, reference = module.state
    assert reference() is held
    reference().count += 1
    return held.count


_held_elsewhere: list[Plain] = []


def _referred() -> Any:
    _held_elsewhere.append(Plain())
    return weakref.ref(_held_elsewhere[-1])


def _through_reference_alone(module: nn.Module) -> float:
    module.state().count += 1
    return module.state().count


def _objects_as_keys() -> Any:
    key = Plain()
    return {"key": key, key: 0}


def _by_object(module: nn.Module) -> float:
    key = module.state["key"]
    key.count += 1
    module.state[key] += 1
    return key.count + module.state[key]


def _array(module: nn.Module) -> float:
    module.state[0] += 1
    return float(module.state[0])


def _two_views() -> Any:
    array = np.zeros(4)
    return array, array[1:]


def _by_view(module: nn.Module) -> float:
    module.state[1][0] += 1
    return float(module.state[0].sum())


def _twice_the_same() -> Any:
    log: list[int] = []
    return {"a": log, "b": log}


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "number": (lambda: 0, _number),
    "float": (lambda: 0.5, _number),
    "string": (lambda: "", _string),
    "none": (lambda: None, _none),
    "list": (list, _append),
    "dict": (dict, _key),
    "dict subclass": (Dict, _key),
    "ordered dict": (collections.OrderedDict, _key),
    "order of a dict": (lambda: collections.OrderedDict(a=1.0, b=2.0, c=3.0), _order),
    "default dict": (lambda: collections.defaultdict(int), _key),
    "user dict": (collections.UserDict, _user_dict),
    "user list": (collections.UserList, _append),
    "chain map": (collections.ChainMap, _key),
    "deque": (collections.deque, _append),
    "bounded deque": (lambda: collections.deque([1.0, 2.0, 3.0], maxlen=3), _pop),
    "set": (set, _set),
    "tuple": (tuple, _tuple),
    "named tuple": (lambda: Pair(0, []), _named),
    "nested": (lambda: {"a": ({"b": []},)}, _nested),
    "dataclass": (Record, _dataclass),
    "slots": (Slots, _add("count")),
    "namespace": (lambda: types.SimpleNamespace(count=0), _add("count")),
    "object": (Plain, _add("count")),
    "cycle of objects": (_cyclic, _cycle),
    "list in itself": (_holds_itself, _itself),
    "one list twice": (_twice_the_same, _shared),
    "attribute that comes and goes": (lambda: None, _new),
    "tensor rebound": (lambda: torch.ones(()), _tensor),
    "tensor list": (lambda: [torch.ones(())], _tensors),
    "closure": (_counting_closure, _call),
    "attribute of a function": (_counting_function, _call),
    "variable of two closures": (_two_closures, _read_shared),
    "variable without a value": (_late_closure, _call),
    "partial": (lambda: functools.partial(_append_one, [], more=[]), _call),
    "default": (_default, _call),
    "bound method": (lambda: Ticker().tick, _call),
    "weak reference": (_held_and_referred, _through_reference),
    "weak reference alone": (_referred, _through_reference_alone),
    "objects as keys": (_objects_as_keys, _by_object),
    "generator": (
        lambda: torch.Generator().manual_seed(3),
        lambda module: torch.rand(WIDTH, generator=module.state, dtype=torch.float64),
    ),
    "generator of Python": (lambda: random.Random(3), lambda module: module.state.random()),
    "generator of NumPy": (
        lambda: np.random.default_rng(3),
        lambda module: float(module.state.random()),
    ),
    "old generator of NumPy": (
        lambda: np.random.RandomState(3),
        lambda module: float(module.state.rand()),
    ),
    "array": (lambda: np.zeros(2), _array),
    "views of one array": (_two_views, _by_view),
}
# A user's write in place to a tensor raises, so only the call writes here.
WRITTEN = {"tensor in place": (lambda: torch.ones(()), _in_place)}
# What has no `__dict__` to copy: right, or an error that names it.
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "counter": (collections.Counter, _counter),
    "bytearray": (lambda: bytearray(b"\0\0"), _bytes),
    "iterator": (lambda: iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), _iterator),
    "cycle": (lambda: itertools.cycle([1.0, 2.0, 3.0]), _iterator),
    "mapped iterator": (lambda: map(float, iter(range(1, 9))), _iterator),
}


class Counting(nn.Module):
    """Scales by what its state says, and moves the state on."""

    def __init__(self, start: Callable[[], Any], advance: Callable[[Any], Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.state, self._advance = start(), advance

    def forward(self, x: Tensor) -> Tensor:
        return (self.lin(x) * self._advance(self)).tanh()


def by_user(net: Any, x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for part in (x, 2 * x):
        total = total + weighted(net(part))
        for block in net.blocks:
            block.f._advance(block.f)
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", [once, twice, by_user])
@pytest.mark.parametrize("kind", STATES)
def test_attribute(kind: str, run: Run, mode: tuple[str, str]) -> None:
    check(pairs(lambda: Counting(*STATES[kind])), run, mode, retain=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", [once, twice])
@pytest.mark.parametrize("kind", WRITTEN)
def test_tensor_attribute_written_by_the_call(kind: str, run: Run, mode: tuple[str, str]) -> None:
    check(pairs(lambda: Counting(*WRITTEN[kind])), run, mode, retain=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", OTHERS)
def test_attribute_that_holds_its_state_elsewhere(kind: str, mode: tuple[str, str]) -> None:
    with contextlib.suppress(ReversibleError):
        check(pairs(lambda: Counting(*OTHERS[kind])), once, mode)


class Scaling:
    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self) -> Tensor:
        return self.scale

    def read(self) -> Tensor:
        return self.scale


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "closure": lambda scale: lambda: scale,
    "default": lambda scale: lambda scale=scale: scale,
    "partial": lambda scale: functools.partial(torch.mul, scale, 1.0),
    "partial of a closure": lambda scale: functools.partial(lambda one: scale * one, 1.0),
    "bound method": lambda scale: Scaling(scale).read,
    "object": Scaling,
    "closure over an object": lambda scale: (lambda holder: lambda: holder())(Scaling(scale)),
}


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select", "offload"])
@pytest.mark.parametrize("hold", [None, *HOLDERS])
def test_user_write_in_place_to_an_attribute_raises(hold: str | None, execution: str) -> None:
    scales = []

    def start() -> Any:
        scales.append(torch.ones(WIDTH))
        return scales[-1] if hold is None else HOLDERS[hold](scales[-1])

    def branch() -> nn.Module:
        return Counting(start, lambda module: module.state if hold is None else _call(module))

    loss = pairs(branch)(ReversibleSequence, execution=execution)(torch.randn(2, WIDTH)).sum()
    scales[1].mul_(2)
    with pytest.raises(ReversibleError, match="block 1, branch f: attribute 'state' was changed"):
        loss.backward()


@pytest.mark.parametrize("hold", HOLDERS)
def test_user_write_in_place_to_what_a_function_reads_raises(hold: str) -> None:
    """Where the branch is a function itself."""
    scale, lin = torch.ones(WIDTH), nn.Linear(WIDTH, WIDTH)
    read = HOLDERS[hold](scale)
    steps = [Step(lambda x: lin(x).tanh() * read(), i % 2, (i + 1) % 2) for i in range(4)]
    y = Reversible(steps)(*torch.randn(2, 3, WIDTH).unbind())
    scale.mul_(2)
    with pytest.raises(ReversibleError, match=r"step 3.*attribute 'fn' was changed"):
        weighted(*y).backward()


@pytest.mark.parametrize("mode", MODES)
def test_state_shared_by_two_modules(mode: tuple[str, str]) -> None:
    class Writes(nn.Module):
        def __init__(self, log: list[Any]) -> None:
            super().__init__()
            self.log = log

        def forward(self, x: Tensor) -> Tensor:
            self.log.append(x.detach().mean())
            return x

    class Reads(nn.Module):
        def __init__(self, log: list[Any]) -> None:
            super().__init__()
            self.lin, self.log = nn.Linear(WIDTH, WIDTH), {"of": log}

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x).tanh() * sum(self.log["of"])

    def branch() -> nn.Module:
        log: list[Any] = []
        return nn.Sequential(Writes(log), Reads(log))

    check(pairs(branch), twice, mode, retain=True)


@pytest.mark.parametrize("mode", MODES)
def test_modules_in_a_plain_list(mode: tuple[str, str]) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)
            # Not registered: neither a parameter nor a buffer of the branch.
            self.parts = [Tracked()]

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](self.lin(x))

    class Tracked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.5).add_(x.detach().mean((0, 1)))
            return (x - self.mean).tanh()

    check(pairs(Hidden), twice, mode)


class Ticking(nn.Module):
    """Scales by a buffer and a number, both of which count its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls.clone()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hold", ["directly", "in a list", "by reference", "by a method"])
def test_modules_that_are_not_registered(hold: str, mode: tuple[str, str]) -> None:
    kept = []

    class Reaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)
            part = nn.Sequential(Ticking())
            kept.append(part)
            vars(self)["part"] = {
                "directly": part,
                "in a list": [part],
                "by reference": weakref.ref(part),
                "by a method": part.forward,
            }[hold]

        def forward(self, x: Tensor) -> Tensor:
            part = self.part
            if hold == "in a list":
                (part,) = part
            elif hold == "by reference":
                part = part()
            return part(self.lin(x)).tanh()

    check(pairs(Reaching), twice, mode)


class Listing(nn.Module):
    """Calls the modules of a plain list, and those that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.parts = nn.Linear(WIDTH, WIDTH), [nn.Sequential(Ticking())]

    def forward(self, x: Tensor, given: Any = ()) -> Tensor:
        for part in (*self.parts, *given):
            x = part(x)
        return self.lin(x).tanh()


@pytest.mark.parametrize("mode", MODES)
def test_modules_that_come_into_a_plain_list(mode: tuple[str, str]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        total = weighted(net(x))
        for block in net.blocks:
            block.f.parts.append(nn.Sequential(Ticking()))
        total = total + weighted(net(x))
        for block in net.blocks:
            block.f.parts[0] = Ticking()
        return total + weighted(net(x))

    check(pairs(Listing), run, mode)


@pytest.mark.parametrize("mode", MODES)
def test_modules_that_a_keyword_holds(mode: tuple[str, str]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        given = [nn.Sequential(Ticking())]
        return weighted(net(x, given=given)) + weighted(net(2 * x, given=given))

    check(lambda kind, **o: pairs(Listing)(kind, {"given": ((True, False),) * 2}, **o), run, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", [once, twice])
def test_attribute_of_the_network_around(run: Run, mode: tuple[str, str]) -> None:
    """A module that holds the branch is no part of it, but the branch may read its attributes."""

    class Tempered(nn.Module):
        def __init__(self, root: list[Any]) -> None:
            super().__init__()
            self.lin, self.root = nn.Linear(WIDTH, WIDTH), root

        def forward(self, x: Tensor) -> Tensor:
            return (self.lin(x) / self.root[0].temperature).tanh()

    def make(kind: Any, **options: Any) -> nn.Module:
        root: list[Any] = []
        net = pairs(lambda: Tempered(root))(kind, **options)
        root.append(net)
        net.temperature = 1.0
        return net

    def cooling(net: Any, x: Tensor) -> Tensor:
        loss = run(net, x)
        net.temperature = 0.2
        return loss

    check(make, cooling, mode)


@pytest.mark.parametrize("mode", MODES)
def test_buffer_registered_by_the_call(mode: tuple[str, str]) -> None:
    """In a module that had none before."""

    class Making(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.tables = nn.Linear(WIDTH, WIDTH), nn.Module()

        def forward(self, x: Tensor) -> Tensor:
            if hasattr(self.tables, "table"):
                self.tables.table = self.tables.table + 1
            else:
                self.tables.register_buffer("table", torch.rand(WIDTH, dtype=x.dtype))
            return self.lin(x) * self.tables.table

    check(pairs(Making), twice, mode, retain=True)


class Closing:
    """Ends with the file, say, that it stands for: a copy of it must not."""

    def __init__(self) -> None:
        self.count, self.ended = 0, []

    def __del__(self) -> None:
        self.ended.append(self.count)


@pytest.mark.parametrize("mode", MODES)
def test_objects_that_hold_what_cannot_be_copied(mode: tuple[str, str]) -> None:
    """Locks stay what they are, and objects that end something have no copies."""

    class Queueing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.waiting, self.closing = nn.Linear(WIDTH, WIDTH), queue.Queue(), Closing()
            self.waiting.put(1.0)

        def forward(self, x: Tensor) -> Tensor:
            value = self.waiting.get()
            self.waiting.put(1.5 * value)
            return (self.lin(x) * value).tanh()

    nets = []

    def make(kind: Any, **options: Any) -> nn.Module:
        nets.append(pairs(Queueing)(kind, **options))
        return nets[-1]

    check(make, twice, mode)
    assert all(not block.f.closing.ended for net in nets for block in net.blocks)


@pytest.mark.parametrize("mode", MODES)
def test_a_child_exchanged_between_forward_and_backward(mode: tuple[str, str]) -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.parts[0](x))

    def run(net: Any, x: Tensor) -> Tensor:
        loss = once(net, x)
        for block in net.blocks:
            block.f.act = nn.Sigmoid()
        loss = loss + once(net, x)
        for block in net.blocks:
            block.f.act = nn.ReLU()
        return loss

    check(pairs(Switch), run, mode)


@pytest.mark.parametrize("mode", MODES)
def test_training_flag_changed_between_forward_and_backward(mode: tuple[str, str]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        loss = once(net, x)
        net.eval()
        return loss

    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh())

    check(pairs(branch), run, mode)


# --- gradients of attributes


def _tripled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 3 * out


def _shifted(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + 1


def _scaled(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (2 * args[0],), kwargs


def _read_late(net: Any, x: Tensor) -> Tensor:
    loss = weighted(net(x))
    for block in net.blocks:
        block.f.lin.register_forward_hook(_tripled)
        block.f.lin.register_forward_pre_hook(_scaled, with_kwargs=True)
    return loss


def _steered(net: Any, x: Tensor) -> Tensor:
    """With hooks that are there during the call alone."""
    handles = []
    for block in net.blocks:
        handles.append(block.f.lin.register_forward_hook(_tripled))
        handles.append(block.f.lin.register_forward_pre_hook(_scaled, with_kwargs=True))
    loss = weighted(net(x))
    for handle in handles:
        handle.remove()
    return loss


def _in_order(net: Any, x: Tensor) -> Tensor:
    """With hooks of which the first is taken away and another one added."""
    handles = [block.f.lin.register_forward_hook(_tripled) for block in net.blocks]
    for block in net.blocks:
        block.f.lin.register_forward_hook(_shifted)
    loss = weighted(net(x))
    for handle in handles:
        handle.remove()
    return _read_late(net, x) + loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", [_read_late, _steered, _in_order])
def test_hooks_added_or_removed_between_forward_and_backward(
    run: Run, mode: tuple[str, str]
) -> None:
    check(pairs(lambda: Counting(lambda: 2.0, lambda module: module.state)), run, mode)


class Film(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.context: Any = None

    def forward(self, x: Tensor) -> Tensor:
        context = self.context
        if isinstance(context, dict):
            context = context["scale"][0]
        return self.lin(x).tanh() * context


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"scale": [t]}], ids=["bare", "nested"])
@pytest.mark.parametrize("cleared", [False, True])
def test_attribute_with_gradient(wrap: Any, cleared: bool, mode: tuple[str, str]) -> None:
    def make(kind: Any, **options: Any) -> nn.Module:
        net = pairs(Film)(kind, **options)
        net.encoder = nn.Linear(WIDTH, WIDTH)
        return net

    def run(net: Any, x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for part in (x[:1], x[1:]):
            context = net.encoder(part)
            for block in net.blocks:
                block.f.context = wrap(context)
            total = total + weighted(net(part))
        if cleared:
            for block in net.blocks:
                block.f.context = None
        return total

    check(make, run, mode)


@pytest.mark.parametrize("mode", MODES)
def test_attribute_that_is_a_leaf_with_gradient(mode: tuple[str, str]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        context = torch.ones(WIDTH, dtype=x.dtype, requires_grad=True)
        for block in net.blocks:
            block.f.context = context
        loss = once(net, x)
        (grad,) = torch.autograd.grad(loss, context, retain_graph=True)
        return loss + grad.sum().detach()

    check(pairs(Film), run, mode)


# --- aliases


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("view", [False, True])
def test_one_buffer_under_two_names(view: bool, mode: tuple[str, str]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)
            memory = torch.ones(3 * WIDTH, dtype=torch.float64)
            self.register_buffer("memory", memory)
            self.register_buffer("part", memory[WIDTH : 2 * WIDTH] if view else memory)

        def forward(self, x: Tensor) -> Tensor:
            self.memory.mul_(0.5).add_(x.detach().mean())
            return self.lin(x).tanh() * self.part[:WIDTH].clone()

    check(pairs(Both), twice, mode, retain=True)


@pytest.mark.parametrize("mode", MODES)
def test_large_buffers_that_share_memory(mode: tuple[str, str]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)
            memory = torch.ones(4096, dtype=torch.float64)
            self.register_buffer("memory", memory)
            self.register_buffer("part", memory.view(-1, WIDTH)[100])

        def forward(self, x: Tensor) -> Tensor:
            self.part.mul_(0.5).add_(x.detach().mean())
            return self.lin(x).tanh() * self.memory[800 : 800 + WIDTH].clone()

    check(pairs(Both), twice, mode, retain=True)


@pytest.mark.parametrize("mode", MODES)
def test_one_list_under_two_keywords(mode: tuple[str, str]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, one: list[Any], two: list[Any]) -> Tensor:
            assert one is two
            one.append(len(two) + 1.0)
            return self.lin(x).tanh() * sum(two)

    def run(net: Any, x: Tensor) -> Tensor:
        shared: list[Any] = []
        loss = weighted(net(x, one=shared, two=shared))
        shared.append(7.0)
        loss = loss + weighted(net(x, one=shared, two=shared))
        shared.clear()
        return loss

    route = dict.fromkeys(("one", "two"), ((True, False),) * 2)
    check(lambda kind, **o: pairs(Both)(kind, route, **o), run, mode)


@pytest.mark.parametrize("mode", MODES)
def test_one_list_as_keyword_and_attribute(mode: tuple[str, str]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)
            self.log: list[Any] = []

        def forward(self, x: Tensor, log: Any) -> Tensor:
            log["of"].append(len(self.log) + 1.0)
            return self.lin(x).tanh() * sum(self.log)

    def run(net: Any, x: Tensor) -> Tensor:
        shared: list[Any] = []
        for block in net.blocks:
            block.f.log = shared
        return weighted(net(x, log={"of": shared})) + weighted(net(x, log={"of": shared}))

    route = {"log": ((True, False),) * 2}
    check(lambda kind, **o: pairs(Both)(kind, route, **o), run, mode)


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select", "offload"])
def test_stream_read_twice_is_one_tensor(execution: str) -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            return self.lin(one).tanh() * 2 if one is two else self.lin(one) * two

    found = []
    for each in ("store", execution):
        torch.manual_seed(0)
        steps = [Step(Same(), i % 2, (1 - i % 2,) * 2) for i in range(4)]
        net = Reversible(steps, execution=each).double()
        x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
        weighted(*net(x, x.sin())).backward()
        found.append({"x": x.grad, **gradients_of(net)})
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select", "offload"])
def test_two_streams_that_are_one_tensor(execution: str) -> None:
    found = []
    for each in ("store", execution):
        torch.manual_seed(0)
        steps = [
            Step(nn.Bilinear(WIDTH, WIDTH, WIDTH), i % 3, ((i + 1) % 3, (i + 2) % 3))
            for i in range(6)
        ]
        net = Reversible(steps, execution=each).double()
        x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
        y = x.sin()
        weighted(*net(y, y, y)).backward()
        found.append({"x": x.grad, **gradients_of(net)})
    assert_same_gradients(found[1], found[0], 1e-11)


# --- keywords


class Given(nn.Module):
    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.lin, self._read = nn.Linear(WIDTH, WIDTH), read

    def forward(self, x: Tensor, given: Any) -> Tensor:
        return self.lin(x).tanh() * self._read(given)


class Encoding(collections.UserDict):
    """As tokenizers return it: a UserDict whose items are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


def _fresh() -> Tensor:
    return torch.rand(5, 1, dtype=torch.float64)


def _put_attribute(given: Any) -> None:
    given.mask = _fresh()


def _put_item(given: Any) -> None:
    given["mask"] = _fresh()


def _namespace() -> Any:
    return types.SimpleNamespace(mask=_fresh())


KEYWORDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "dict": (lambda: {"mask": _fresh()}, lambda g: g["mask"], _put_item),
    "dict subclass": (lambda: Dict(mask=_fresh()), lambda g: g["mask"], _put_item),
    "user dict": (lambda: collections.UserDict(mask=_fresh()), lambda g: g["mask"], _put_item),
    "encoding": (lambda: Encoding(mask=_fresh()), lambda g: g.mask, _put_item),
    "ordered": (lambda: collections.OrderedDict(mask=_fresh()), lambda g: g["mask"], _put_item),
    "list": (lambda: [_fresh()], lambda g: g[0], lambda g: g.__setitem__(0, _fresh())),
    "deque": (
        lambda: collections.deque([_fresh()]),
        lambda g: g[0],
        lambda g: g.__setitem__(0, _fresh()),
    ),
    "set": (lambda: {2.0}, lambda g: float(sum(g)), lambda g: g.add(3.0 + len(g))),
    "namespace": (_namespace, lambda g: g.mask, _put_attribute),
    "named tuple": (
        lambda: Pair(1, [2]),
        lambda g: g.count + sum(g.log),
        lambda g: g.log.append(3),
    ),
    "nested": (
        lambda: ({"a": [_namespace()]},),
        lambda g: g[0]["a"][0].mask,
        lambda g: _put_attribute(g[0]["a"][0]),
    ),
    "user list": (
        lambda: collections.UserList([_fresh()]),
        lambda g: g[0],
        lambda g: g.__setitem__(0, _fresh()),
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KEYWORDS)
def test_keyword_changed_between_forward_and_backward(kind: str, mode: tuple[str, str]) -> None:
    start, read, change = KEYWORDS[kind]

    def run(net: Any, x: Tensor) -> Tensor:
        given, total = start(), torch.zeros((), dtype=x.dtype)
        for part in (x, 2 * x):
            total = total + weighted(net(part, given=given))
            change(given)
        return total

    route = {"given": ((True, False),) * 2}
    check(lambda kind, **o: pairs(lambda: Given(read))(kind, route, **o), run, mode)


@pytest.mark.parametrize(
    "kind", ["dict", "dict subclass", "user dict", "encoding", "list", "namespace", "nested"]
)
def test_keyword_tensor_written_in_place_raises(kind: str) -> None:
    start, read, _ = KEYWORDS[kind]
    route = {"given": ((True, False),) * 2}
    net = pairs(lambda: Given(read))(ReversibleSequence, route).double()
    given = start()
    loss = net(torch.randn(2, 5, WIDTH, dtype=torch.float64), given=given).sum()
    read(given).mul_(2)
    with pytest.raises(ReversibleError, match="keyword tensor"):
        loss.backward()


class View(collections.abc.Mapping):
    """A mapping that is no dict, with its contents in a slot."""

    __slots__ = ("_items",)

    def __init__(self, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (lambda: (i for i in range(3)), "generator"),
        (lambda: iter([1, 2]), "list_iterator"),
        (lambda: map(str, [1]), "map"),
        (lambda: {"a": [zip([1], [2], strict=True)]}, "zip"),
        (lambda: types.MappingProxyType({"mask": 1}), "mappingproxy"),
        (lambda: {"a": 1}.keys(), "dict_keys"),
        (lambda: {"a": 1}.values(), "dict_values"),
        (lambda: memoryview(b"abc"), "memoryview"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_keyword_that_cannot_be_copied_raises(given: Any, name: str) -> None:
    route = {"given": ((True, False),) * 2}
    net = pairs(lambda: Given(lambda _: 1.0))(ReversibleSequence, route)
    with pytest.raises(ReversibleError, match=rf"'given'.*{name}"):
        net(torch.randn(2, WIDTH, requires_grad=True), given=given())


def test_mapping_with_slots() -> None:
    inner = {"mask": torch.ones(WIDTH, dtype=torch.float64)}
    route = {"given": ((True, False),) * 2}
    net = pairs(lambda: Given(lambda g: g["mask"]))(ReversibleSequence, route).double()
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = weighted(net(x, given=View(inner)))
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    inner["mask"] = torch.full((WIDTH,), 3.0, dtype=torch.float64)
    (found,) = torch.autograd.grad(loss, x)
    assert_near(found, expected)


# --- containers of more than a thousand leaves


@pytest.mark.parametrize("mode", FLOAT_MODES)
@pytest.mark.parametrize("kind", [dict, list, set])
def test_large_container_that_stays(kind: Any, mode: tuple[str, str]) -> None:
    def start() -> Any:
        return dict.fromkeys(range(2000), 1.5) if kind is dict else kind(range(2000))

    check(pairs(lambda: Counting(start, lambda m: len(m.state) / 1000)), twice, mode)


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_large_container_of_another_length_raises(mode: tuple[str, str]) -> None:
    net = pairs(lambda: Counting(lambda: list(range(2000)), lambda m: m.state[-1]))(
        ReversibleSequence, execution=mode[1]
    )
    loss = net(torch.randn(2, WIDTH)).sum()
    net.blocks[0].f.state.append(5)
    with pytest.raises(ReversibleError, match="list of 2000"):
        loss.backward()


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_large_container_changed_by_the_call_raises(mode: tuple[str, str]) -> None:
    net = pairs(lambda: Counting(lambda: list(range(2000)), _append))(
        ReversibleSequence, execution=mode[1]
    )
    with pytest.raises(ReversibleError):
        net(torch.randn(2, WIDTH)).sum().backward()


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_large_container_replaced_between_is_right(mode: tuple[str, str]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        loss = once(net, x)
        for block in net.blocks:
            block.f.state = [9.0] * 1500
        return loss

    check(pairs(lambda: Counting(lambda: [0.5] * 2000, lambda m: m.state[-1])), run, mode)


# --- buffers: the first write may come in any call


class Late(nn.Module):
    """Writes to a large buffer in some of its calls."""

    def __init__(self, first: int, every: bool, size: int = 4096, data: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.calls, self.first, self.every, self.data = 0, first, every, data
        self.register_buffer("table", torch.ones(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.lin(x).tanh() * self.table[:WIDTH].clone()
        if self.calls == self.first or (self.every and self.calls > self.first):
            table = self.table.data if self.data else self.table
            with torch.no_grad():
                table[:WIDTH].mul_(0.5).add_(x.detach().mean((0, 1)))
            out = out * self.table[:WIDTH].clone()
        return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("first", [1, 3, 50])
def test_first_write_to_a_large_buffer(
    first: int, every: bool, data: bool, mode: tuple[str, str]
) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        for i in range(first - 1):
            # Some of the calls before have a backward of their own.
            with torch.set_grad_enabled(i % 2 == 0):
                loss = once(net, x)
            if i % 2 == 0:
                loss.backward()
        return twice(net, x)

    check(pairs(lambda: Late(first, every, data=data)), run, mode)


@pytest.mark.parametrize("mode", FLOAT_MODES)
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("size", [WIDTH, 4096])
def test_first_write_by_a_later_call_is_right_or_raises(
    size: int, data: bool, mode: tuple[str, str]
) -> None:
    """The first of two calls before one backward left the buffer alone."""
    with contextlib.suppress(ReversibleError):
        check(pairs(lambda: Late(2, False, size=size, data=data)), twice, mode)


def test_large_buffer_written_in_every_call_is_right_for_many_steps() -> None:
    found = []
    for execution in ("store", "invert"):
        torch.manual_seed(0)
        net = pairs(lambda: Late(1, True, size=2**20))(
            ReversibleSequence, execution=execution
        ).double()
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
        for _ in range(4):
            weighted(net(x)).backward()
        found.append({"x": x.grad, "table": net.blocks[1].f.table, **gradients_of(net)})
    assert_same_gradients(found[1], found[0])


class Sometimes(Late):
    """Writes in every third call, from the first on."""

    def forward(self, x: Tensor) -> Tensor:
        self.first = self.calls + 1 + self.calls % 3
        return super().forward(x)


@pytest.mark.parametrize("mode", FLOAT_MODES)
@pytest.mark.parametrize("data", [False, True])
def test_writes_to_a_large_buffer_in_every_third_call(data: bool, mode: tuple[str, str]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        for _ in range(6):
            once(net, x).backward()
        return once(net, x)

    check(pairs(lambda: Sometimes(0, False, data=data)), run, mode)


def test_large_buffer_written_once_is_not_copied_in_later_calls() -> None:
    net = pairs(lambda: Late(2, False, size=2**20))(ReversibleSequence).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    peaks = [revnet.measure_memory(net, x).peak_bytes for _ in range(6)]
    nbytes = net.blocks[0].f.table.nbytes
    # The write copies; the call after it may copy once more.
    assert peaks[1] >= nbytes
    assert all(peak < nbytes for peak in (peaks[0], *peaks[3:])), peaks


class Cloning(TorchDispatchMode):
    """Counts copies of tensors, lazy ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::clone", "aten::_lazy_clone")
        return func(*args, **(kwargs or {}))


def test_small_tensors_that_nobody_writes_to_are_copied_once() -> None:
    class Holding(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.held[0]

    net = pairs(lambda: Holding(WIDTH, WIDTH))(ReversibleSequence)
    branches = [branch for block in net for branch in (block.f, block.g)]
    for i, branch in enumerate(branches):
        branch.held = [torch.full((), 1.0 + i)]
        branch.other = torch.ones(3)
    x = torch.randn(2, 5, WIDTH)
    counts = []
    for _ in range(3):
        with Cloning() as mode:
            net(x).sum().backward()
        counts.append(mode.count)
    assert counts[0] >= 2 * len(branches)
    assert counts[1] == counts[2] < len(branches)
    # A write without a version is noticed all the same.
    branches[0].held[0].data.mul_(3)
    found, expected = [], []
    for execution, gradients in (("store", expected), ("invert", found)):
        net.execution = execution
        net.zero_grad()
        net(x).sum().backward()
        gradients += [p.grad.clone() for p in net.parameters()]
    torch.testing.assert_close(found, expected)


class Codebook(nn.Module):
    """Vector quantisation with codes that move by `.data`."""

    def __init__(self, codes: int = 200) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("codes", torch.randn(codes, WIDTH))
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, x: Tensor) -> Tensor:
        z = self.lin(x)
        flat = z.detach().flatten(0, -2)
        # Remembered, because rounding may tip a tie.
        index = revnet.remember(torch.cdist(flat, self.codes).argmin(-1))
        hot = F.one_hot(index, len(self.codes)).to(z.dtype)
        quantised = self.codes[index].view_as(z)
        self.counts.data.mul_(0.9).add_(hot.sum(0), alpha=0.1)
        self.codes.data.copy_(
            torch.where(hot.sum(0)[:, None] > 0, 0.9 * self.codes + 0.1 * hot.mT @ flat, self.codes)
        )
        return z + (quantised - z).detach() + 0.1 * (z - quantised).tanh()


@pytest.mark.parametrize("mode", FLOAT_MODES)
@pytest.mark.parametrize("codes", [4, 200])
def test_codebook_moved_by_data(codes: int, mode: tuple[str, str]) -> None:
    check(pairs(lambda: Codebook(codes)), twice, mode, retain=True)


class Adaptive(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        # Before a batch norm a bias has no gradient but rounding noise.
        self.lin = nn.Linear(WIDTH, width, bias=False)
        self.back = nn.Linear(width, WIDTH)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x).flatten(0, -2)
        y = F.batch_norm(y, self.mean, self.var, training=True, momentum=0.3)
        y = y * self.var.clone() + self.mean
        return self.back(y).view_as(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [WIDTH, 1024])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_in_training_whatever_the_module(
    width: int, training: bool, mode: tuple[str, str]
) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        net.train(training)
        return twice(net, x)

    check(pairs(lambda: Adaptive(width)), run, mode, retain=True)


@pytest.mark.parametrize("mode", MODES)
def test_buffer_from_none(mode: tuple[str, str]) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("made", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.made is None:
                self.made = x.detach().mean((0, 1))
            else:
                self.made.mul_(0.5)
            return self.lin(x).tanh() * self.made.clone()

    def run(net: Any, x: Tensor) -> Tensor:
        loss = twice(net, x)
        for block in net.blocks:
            block.f.made = None
        return loss

    check(pairs(Made), run, mode, retain=True)


@pytest.mark.parametrize("mode", MODES)
def test_parameter_initialised_from_data_is_right_or_raises(mode: tuple[str, str]) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(WIDTH))
            self.done = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.done:
                with torch.no_grad():
                    self.scale.copy_(1 / x.std((0, 1)))
                self.done = True
            return (x * self.scale).tanh()

    with contextlib.suppress(ReversibleError):
        check(pairs(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Norm())), once, mode)


def test_parameter_data_moved_by_the_call_is_found_by_the_exact_check() -> None:
    """A write to `.data` of a parameter leaves no version: the replay would do it again."""

    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            out = self.lin(x).tanh()
            self.lin.weight.data.mul_(0.5)
            return out

    net = pairs(Clipped)(ReversibleSequence, streams="fixed", determinism_check="exact").double()
    loss = net(torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)).sum()
    with pytest.raises(ReversibleError, match="is not deterministic"):
        loss.backward()


# --- randomness, decisions and results


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select", "offload"])
@pytest.mark.parametrize("coupling", [None, lambda: Momentum(0.9)])
def test_noise_that_is_filled_after_it_was_saved(coupling: Any, execution: str) -> None:
    found = []
    for each in ("store", execution):
        torch.manual_seed(0)
        steps = [
            Step(
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.RReLU(0.1, 0.9)),
                i % 2,
                1 - i % 2,
                *([coupling()] if coupling else []),
            )
            for i in range(4)
        ]
        net = Reversible(steps, execution=each).double()
        x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
        loss = weighted(*net(x, x.sin()))
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        assert torch.equal(first, x.grad)
        found.append({"x": x.grad, **gradients_of(net)})
    assert_same_gradients(found[1], found[0])


class Draws(nn.Module):
    """Does something else in its replay than in its call, as a broken branch may."""

    def __init__(self, draw: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.lin, self._draw = nn.Linear(WIDTH, WIDTH), draw

    def forward(self, x: Tensor) -> Tensor:
        return self._draw(self.lin(x), revnet.replaying()).tanh()


def _twice_as_many(x: Tensor, again: bool) -> Tensor:
    x = F.dropout(x, 0.5)
    return x + 0 * torch.rand(3).sum().item() if again else x


def _fewer(x: Tensor, again: bool) -> Tensor:
    return x + torch.zeros_like(x) if again else x + torch.randn_like(x)


def _another_shape(x: Tensor, again: bool) -> Tensor:
    rows = 3 if again else 2
    return x + (torch.ones(rows, 4, dtype=x.dtype) @ torch.ones(4, WIDTH, dtype=x.dtype)).sum()


def _one_product_more(x: Tensor, again: bool) -> Tensor:
    if again:
        torch.ones(2, 2) @ torch.ones(2, 2)
    return x


def _another_type(x: Tensor, again: bool) -> Tensor:
    kind = torch.float32 if again else torch.float64
    return x + (torch.ones(2, 2, dtype=kind) @ torch.ones(2, 2, dtype=kind)).sum()


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
@pytest.mark.parametrize("draw", [_twice_as_many, _fewer])
def test_another_number_of_draws_raises(draw: Any, execution: str) -> None:
    net = pairs(lambda: Draws(draw))(ReversibleSequence, execution=execution).double()
    loss = net(torch.randn(2, WIDTH, dtype=torch.float64)).sum()
    with pytest.raises(ReversibleError):
        loss.backward()


@pytest.mark.parametrize("draw", [_another_shape, _one_product_more, _another_type])
def test_other_kept_results_raise(draw: Any) -> None:
    net = pairs(lambda: Draws(draw))(ReversibleSequence, execution="select").double()
    loss = net(torch.randn(2, WIDTH, dtype=torch.float64)).sum()
    with pytest.raises(ReversibleError):
        loss.backward()


class DropAdd(Coupling):
    """Drops part of the increment, and decides on a sign that replays must repeat."""

    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.decides, self.count = decides, 0
        self.register_buffer("mean", torch.ones(()))

    def increment(self, out: Any) -> Any:
        out = F.dropout(out, 0.5, self.training)
        if self.decides:
            self.count += 1
            sign = revnet.remember(torch.randint(0, 2, (1,)) * 2 - 1)
            self.mean.mul_(0.5)
            out = out * sign * self.count * self.mean.clone()
        return out


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        gate = revnet.remember(torch.rand(WIDTH) > 0.5)
        return self.drop(self.lin(x)).tanh() * gate


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select", "offload"])
@pytest.mark.parametrize("decides", [False, True])
@pytest.mark.parametrize("branch", [lambda: nn.Linear(WIDTH, WIDTH), Dropped])
@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_state_of_a_coupling(streams: str, branch: Any, decides: bool, execution: str) -> None:
    found = []
    for each in ("store", execution):
        torch.manual_seed(0)
        steps = [Step(branch(), i % 2, 1 - i % 2, DropAdd(decides)) for i in range(4)]
        net = Reversible(steps, execution=each, streams=streams).double()
        x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
        loss = weighted(*net(x, x.sin())) + weighted(*net(x, x.cos()))
        before, random = picture(net), torch.get_rng_state()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        assert torch.equal(first, x.grad)
        assert picture(net) == before
        assert torch.equal(random, torch.get_rng_state())
        found.append({"x": x.grad, **gradients_of(net)})
    assert_same_gradients(found[1], found[0])


# --- wrappers around a block


class Around(nn.Module):
    """Hands on the call of a module, and none of its attributes."""

    def __init__(self, module: nn.Module, again: bool) -> None:
        super().__init__()
        self.module, self.again = module, again

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.again:
            return checkpoint(self.module, *args, use_reentrant=False, **kwargs)
        return self.module(*args, **kwargs)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "wrapper of torch": checkpoint_wrapper,
    "checkpoint": lambda block: Around(block, again=True),
    "call": lambda block: Around(block, again=False),
    "two": lambda block: Around(checkpoint_wrapper(block), again=False),
}


def test_blocks_holds_what_is_no_block() -> None:
    net = pairs(lambda: nn.Linear(WIDTH, WIDTH))(ReversibleSequence)
    net.blocks[1] = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(TypeError, match="blocks holds a Linear with 0 ReversibleBlocks"):
        net(torch.randn(2, WIDTH))


@pytest.mark.parametrize("inner", ["invert", "checkpoint", "select", "store", "offload", "mixed"])
@pytest.mark.parametrize("streams", ["float", "fixed"])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_checkpoint_wrapper(wrapper: str, stateful: bool, streams: str, inner: str) -> None:
    def branch() -> nn.Module:
        parts = [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
        return nn.Sequential(*parts, nn.Dropout(0.4)) if stateful else nn.Sequential(*parts)

    make = pairs(branch, 3)
    execution: Any = ["invert", "checkpoint", "store"] * 2 if inner == "mixed" else inner
    torch.manual_seed(0)
    net = make(ReversibleSequence, streams=streams, execution=execution)
    for i in (0, 2):
        net.blocks[i] = WRAPPERS[wrapper](net.blocks[i])
    found = outcome(net, once)
    torch.manual_seed(0)
    expected = outcome(make(ReversibleSequence, streams=streams, execution="store"), once)
    assert len(found) == len(expected)
    for got, wanted in zip(found.values(), expected.values(), strict=True):
        assert_near(got, wanted)


# --- settings of the process


class Setting(NamedTuple):
    read: Callable[[], Any]
    change: Callable[[], Any]


@pytest.fixture
def settings() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    kernels = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_math_sdp(kernels[0])
    torch.backends.cuda.enable_flash_sdp(kernels[1])


SETTINGS = {
    "precision": Setting(
        torch.get_float32_matmul_precision, lambda: torch.set_float32_matmul_precision("high")
    ),
    "math": Setting(
        torch.backends.cuda.math_sdp_enabled, lambda: torch.backends.cuda.enable_math_sdp(False)
    ),
    "flash": Setting(
        torch.backends.cuda.flash_sdp_enabled, lambda: torch.backends.cuda.enable_flash_sdp(False)
    ),
    "autocast": Setting(
        lambda: torch.is_autocast_enabled("cpu"),
        lambda: torch.set_autocast_enabled("cpu", True),
    ),
    "dtype": Setting(torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float16)),
}


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select", "offload"])
@pytest.mark.parametrize("name", SETTINGS)
def test_setting_of_the_call_is_replayed(name: str, execution: str) -> None:
    setting = SETTINGS[name]
    seen: list[Any] = []

    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(setting.read())
            return self.lin(x).tanh()

    net = pairs(Sees)(ReversibleSequence, execution=execution, streams="float")
    first = setting.read()
    loss = net(torch.randn(2, WIDTH, requires_grad=True)).sum()
    try:
        setting.change()
        changed = setting.read()
        assert changed != first
        loss.backward()
        assert setting.read() == changed
    finally:
        torch.set_autocast_enabled("cpu", False)
    assert len(seen) == 4
    assert set(seen) == {first}


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
def test_sdpa_kernel_around_the_call_is_replayed(execution: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    seen: list[Any] = []

    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch._C._get_flash_sdp_enabled(), torch._C._get_math_sdp_enabled()))
            return F.scaled_dot_product_attention(self.lin(x), x, x)

    net = pairs(Sees)(ReversibleSequence, execution=execution).double()
    before = torch._C._get_flash_sdp_enabled(), torch._C._get_math_sdp_enabled()
    with sdpa_kernel(SDPBackend.MATH):
        loss = net(torch.randn(2, 3, WIDTH, dtype=torch.float64)).sum()
    loss.backward()
    assert set(seen) == {(False, True)}
    assert before == (torch._C._get_flash_sdp_enabled(), torch._C._get_math_sdp_enabled())


# --- revnet.replaying


@pytest.mark.parametrize(
    ("execution", "expected"),
    [
        ("store", [False, False]),
        ("invert", [False, False, True, True]),
        ("checkpoint", [False, False, True, True]),
        ("select", [False, False, True, True]),
        ("offload", [False, False, True, True]),
    ],
)
@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_replaying(streams: str, execution: str, expected: list[bool]) -> None:
    seen: list[bool] = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(revnet.replaying())
            return self.lin(x).tanh()

    net = pairs(Asks)(ReversibleSequence, execution=execution, streams=streams)
    loss = net(torch.randn(2, WIDTH, requires_grad=True)).sum()
    loss.backward()
    assert seen == expected
    assert not revnet.replaying()


def test_replaying_is_of_the_thread_and_ends_with_an_error() -> None:
    elsewhere: list[bool] = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            if revnet.replaying():
                thread = threading.Thread(target=lambda: elsewhere.append(revnet.replaying()))
                thread.start()
                thread.join()
                raise ZeroDivisionError
            return self.lin(x)

    loss = pairs(Asks)(ReversibleSequence)(torch.randn(2, WIDTH)).sum()
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert elsewhere == [False]
    assert not revnet.replaying()


# --- faults in the middle of a replay


class Stateful(nn.Module):
    """A bit of every kind of state."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)
        self.count, self.log, self.names = 0, [torch.ones(())], {"a": [1]}
        self.record = types.SimpleNamespace(steps=0)
        self.advance, self.generator = _counting_closure(), torch.Generator().manual_seed(1)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("table", torch.zeros(1024))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.log.append(x.detach().mean())
        self.names["a"].append(self.count)
        self.record.steps += self.advance()
        x = x + torch.rand(WIDTH, generator=self.generator)
        self.mean = 0.5 * self.mean + x.detach().mean((0, 1))
        self.table[:WIDTH] += self.mean
        keep = revnet.remember(torch.rand(WIDTH) > 0.3)
        out = self.drop(self.lin(x - self.mean)) * keep
        return out.tanh() * (self.count + sum(self.log) + len(self.names["a"]) + self.table[:WIDTH])


def modes() -> tuple[Any, ...]:
    """Return what torch keeps for a thread and a context manager that stops halfway leaves."""
    torch._C._vmapmode_increment_nesting()
    return (
        torch._C._vmapmode_decrement_nesting(),
        torch._C._functorch.maybe_get_level(torch.empty(0)),
        torch._C._functorch.peek_interpreter_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )


def _interrupted(
    loss: Tensor, inputs: list[Tensor], place: int, kind: type[BaseException], batched: bool
) -> bool:
    """Differentiate and raise at a line of the library; return whether that place was reached."""
    root = os.path.dirname(revnet.__file__)
    count = 0

    def local(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == place:
                sys.settrace(None)
                raise kind("interrupted")
        return local

    def trace(frame: Any, event: str, arg: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(root) else None

    previous = sys.gettrace()
    sys.settrace(trace)
    several = torch.ones(2, dtype=loss.dtype) if batched else None
    try:
        torch.autograd.grad(loss, inputs, several, retain_graph=True, is_grads_batched=batched)
    except kind:
        return True
    finally:
        sys.settrace(previous)
    return count >= place


@pytest.mark.parametrize(
    ("streams", "execution", "kind", "batched"),
    [
        ("float", "invert", KeyboardInterrupt, False),
        ("float", "checkpoint", RuntimeError, False),
        ("float", "select", KeyboardInterrupt, False),
        ("float", "invert", KeyboardInterrupt, True),
        ("fixed", "invert", KeyboardInterrupt, False),
    ],
)
def test_interrupt_anywhere_in_a_replay(
    streams: str, execution: str, kind: type[BaseException], batched: bool
) -> None:
    from revnet._state.decisions import thread

    torch.manual_seed(0)
    net = pairs(Stateful, 1)(ReversibleSequence, streams=streams, execution=execution).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    # The second call of the branches reads what the first left.
    loss = weighted(net(x)) + weighted(net(x.sin()))
    net.blocks[0].f.names = {"b": [3]}
    parameters = [x, *net.parameters()]
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    before, random, around = picture(net), torch.get_rng_state(), modes()
    failed, place, reached = [], 1, True
    while reached:
        reached = _interrupted(loss, parameters, place, kind, batched)
        if modes() != around:
            failed.append((place, "modes"))
            break
        if picture(net) != before:
            failed.append((place, "modules"))
            break
        if not torch.equal(random, torch.get_rng_state()):
            failed.append((place, "generator"))
            torch.set_rng_state(random)
        if revnet.replaying() or thread.active.decisions:
            failed.append((place, "decisions"))
            break
        place += 1
    assert not failed
    assert place > 500
    for found, wanted in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
def test_exception_in_the_branch_of_a_replay(execution: str) -> None:
    class Fails(Stateful):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if revnet.replaying() and Fails.fail:
                self.table.add_(5)
                self.log.clear()
                raise torch.OutOfMemoryError("no memory left")
            return out

    net = pairs(Fails)(ReversibleSequence, execution=execution).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = weighted(net(x))
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    before, random = picture(net), torch.get_rng_state()
    Fails.fail = True
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(loss, x, retain_graph=True)
    assert picture(net) == before
    assert torch.equal(random, torch.get_rng_state())
    Fails.fail = False
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_another_thread_replays() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            if revnet.replaying() and threading.current_thread() is not threading.main_thread():
                inside.set()
                go_on.wait(30)
            return self.lin(x)

    net = pairs(Waits)(ReversibleSequence)
    thread = threading.Thread(target=lambda: net(torch.randn(2, WIDTH)).sum().backward())
    thread.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # torch itself allows no backward in a child of a process that has run one.
            if not revnet.replaying() and Lock.lock.acquire(timeout=10):
                code = 0
        finally:
            os._exit(code)
    try:
        status, waited = 0, 0.0
        while waited < 20:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            threading.Event().wait(0.05)
            waited += 0.05
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        assert status == 0
    finally:
        go_on.set()
        thread.join(30)


# --- how often a branch runs


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
@pytest.mark.parametrize("reads", [1, 3])
def test_function_that_reads_what_it_saved_many_times(reads: int, execution: str) -> None:
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.sin(), x.cos(), x.exp())
            return x.sin() * x.exp()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            for _ in range(reads):
                sine, cosine, power = (
                    ctx.saved_tensors[0],
                    ctx.saved_tensors[1],
                    ctx.saved_tensors[2],
                )
            return grad * power * (sine + cosine)

    calls: list[int] = []

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return Op.apply(self.lin(x))

    net = ReversibleSequence([(Branch(), Branch()) for _ in range(3)], execution=execution)
    net(torch.randn(2, WIDTH)).sum().backward()
    assert len(calls) == 12


# --- transforms


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_jacobian_vectorized_with_dropout(streams: str, execution: str) -> None:
    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4), nn.Tanh())

    found = []
    for each in ("store", execution):
        torch.manual_seed(0)
        net = pairs(branch)(ReversibleSequence, execution=each, streams=streams).double()
        torch.manual_seed(1)
        x = torch.randn(3, WIDTH).double()
        found.append(torch.autograd.functional.jacobian(net, x, vectorize=True))
    assert_near(found[1], found[0])


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
def test_batched_gradients_of_a_stateful_branch(execution: str) -> None:
    found = []
    for each in ("store", execution):
        torch.manual_seed(0)
        net = pairs(Stateful)(ReversibleSequence, execution=each).double()
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
        y = net(x)
        before = picture(net)
        directions = torch.randn(3, *y.shape, dtype=torch.float64)
        found.append(torch.autograd.grad(y, x, directions, is_grads_batched=True)[0])
        assert picture(net) == before
    assert_near(found[1], found[0])


# torch looks at the gradient of whatever was saved, and warns of itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
def test_compiled_autograd_of_a_stateful_branch(execution: str) -> None:
    import torch._dynamo.compiled_autograd as compiled_autograd

    found = []
    for each in ("store", execution):
        torch.manual_seed(0)
        net = pairs(lambda: Counting(list, _append))(ReversibleSequence, execution=each)
        # Nothing outside of the sequence saves a tensor with a graph: torch itself warns of those.
        loss = (net(torch.randn(3, WIDTH)) * torch.arange(WIDTH)).sum()
        compiled = compiled_autograd._enable(torch.compile(backend="eager"))
        with contextlib.nullcontext() if each == "store" else compiled:
            loss.backward()
        found.append(gradients_of(net))
    assert_same_gradients(found[1], found[0], 1e-5)


@pytest.mark.filterwarnings(JIT)
@pytest.mark.parametrize("streams", ["float", "fixed"])
@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
def test_forward_mode(execution: str, streams: str) -> None:
    torch.manual_seed(0)
    net = pairs(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))(
        ReversibleSequence, execution=execution
    ).double()
    x, v = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    plain = StoredSequence([(block.f, block.g) for block in net.blocks])
    expected = torch.func.jvp(plain, (x,), (v,))[1]
    net.streams = streams
    assert_near(torch.func.jvp(net, (x,), (v,))[1], expected, tolerance=1e-6)


@pytest.mark.filterwarnings(JIT)
@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
def test_reverse_over_forward(execution: str) -> None:
    import torch.autograd.forward_ad as forward_ad

    found = []
    for kind, options in ((StoredSequence, {}), (ReversibleSequence, {"execution": execution})):
        torch.manual_seed(0)
        net = pairs(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))(kind, **options)
        net = net.double()
        x, v = torch.randn(2, 3, WIDTH, dtype=torch.float64)
        with forward_ad.dual_level():
            loss = net(forward_ad.make_dual(x, v)).pow(2).sum()
            tangent = forward_ad.unpack_dual(loss).tangent
            grads = torch.autograd.grad(tangent, list(net.parameters()))
        found.append(dict(zip(map(str, range(len(grads))), grads, strict=True)))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
@pytest.mark.parametrize("kind", ["script", "trace"])
@pytest.mark.filterwarnings(JIT)
def test_scripted_pieces(kind: str, execution: str) -> None:
    def piece() -> nn.Module:
        linear = nn.Linear(WIDTH, WIDTH).double()
        if kind == "script":
            return torch.jit.script(linear)
        return torch.jit.trace(linear, torch.randn(2, 5, WIDTH, dtype=torch.float64))

    check(
        pairs(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), piece(), nn.Dropout(0.3))),
        once,
        ("float", execution),
    )


def test_expanded_input_without_elements() -> None:
    x = torch.randn(1, WIDTH, requires_grad=True)
    pairs(lambda: nn.Linear(WIDTH, WIDTH))(ReversibleSequence)(x.expand(0, WIDTH)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()),
        lambda: nn.MultiheadAttention(WIDTH, 2),
    ],
)
def test_module_that_only_looks_like_a_pair_is_refused(module: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        ReversibleSequence([module() for _ in range(3)])


@pytest.mark.parametrize("kind", [tuple, list, nn.ModuleList])
def test_pairs_are_tuples_lists_and_module_lists(kind: Any) -> None:
    net = ReversibleSequence(
        [kind([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]) for _ in range(2)]
    )
    assert len(net.blocks) == 2
