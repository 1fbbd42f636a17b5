"""A replay sees what the forward saw, and leaves no trace: buffers, weights, caches, contexts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from cases import Case, Linear, Mlp, build, every, named, noted, randn, with_dropout
from oracle import (
    Evaluations,
    OperationLog,
    Results,
    assert_alike,
    assert_near,
    assert_same_gradients,
    assert_same_step,
    gradients_of,
    stored_copy,
    train_step,
    weighted,
)
from revnet import Reversible, ReversibleError, ReversibleSequence, Step


class EmaInPlace(nn.Module):
    """Reads its running mean, then updates it in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x - self.mean).tanh()
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean(tuple(range(x.dim() - 1))))
            self.steps += 1
        return out


class EmaReassigned(EmaInPlace):
    """Puts a new tensor in the buffer's place first, then reads it."""

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + x.detach().mean(tuple(range(x.dim() - 1)))
        self.steps = self.steps + 1
        return self.linear(x - self.mean).tanh()


class BatchNorm(nn.Module):
    """Linear, then batch norm over (batch, width)."""

    def __init__(self, width: int, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.linear, self.norm = (
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width, momentum=momentum),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).tanh()


class RawBatchNorm(nn.Module):
    """Calls the function on buffers of its own. torch writes them without a new version, and there
    is no counter.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return nn.functional.batch_norm(
            out, self.mean, self.variance, training=self.training
        ).tanh()


def cumulative(width: int) -> nn.Module:
    """Batch norm whose statistics depend on how often it ran."""
    return BatchNorm(width, momentum=None)


def spectral(width: int) -> nn.Module:
    """The parametrization: power iteration in each training forward."""
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(width, width)), nn.Tanh()
    )


def spectral_by_hook(width: int) -> nn.Module:
    """The older form: a pre-forward hook that sets a plain attribute."""
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(width, width)), nn.Tanh())


class AttributeInPlace(nn.Module):
    """Keeps its state in a tensor that is no buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = torch.ones(width, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x).tanh() * self.scale.clone()
        self.scale.mul_(1.5)
        return out


class AttributeReassigned(AttributeInPlace):
    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x).tanh() * self.scale
        self.scale = 0.5 + out.detach().mean(0)
        return out


class AttributeMade(AttributeReassigned):
    """Has a tensor from its first call on, and in its place until then a number."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale: Any = 1.25


class AttributeAdded(AttributeReassigned):
    """The same, and until then nothing."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.scale

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = x.new_full((), 1.25)
        return super().forward(x)


class BufferMade(AttributeReassigned):
    """The same in a buffer that is None at first."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.scale
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return self.linear(x).tanh() + self._first(x)
        return super().forward(x)

    def _first(self, x: Tensor) -> float:
        self.scale = 1 + x.detach().mean(0)
        return 1.25


STATEFUL = {
    "batchnorm": BatchNorm,
    "batchnorm-cumulative": cumulative,
    "batchnorm-raw": RawBatchNorm,
    "ema-in-place": EmaInPlace,
    "ema-reassigned": EmaReassigned,
    "attribute-in-place": AttributeInPlace,
    "attribute-reassigned": AttributeReassigned,
    "attribute-made": AttributeMade,
    "attribute-added": AttributeAdded,
    "buffer-made": BufferMade,
    "spectral": spectral,
    "spectral-by-hook": spectral_by_hook,
}
stateful = pytest.mark.parametrize("branch", STATEFUL.values(), ids=STATEFUL)


def both(branch: object, depth: int = 3) -> tuple:
    pairs = build([(branch, branch)] * depth, 8)
    return ReversibleSequence(pairs), stored_copy(pairs)


@stateful
def test_buffers_move_once_per_step(branch: object):
    net, oracle = both(branch)
    for seed in range(3):
        x = randn(6, 8, seed=seed, requires_grad=True)
        assert_same_step(train_step(net, x), train_step(oracle, x), tolerance=1e-11)


def test_counting_buffers_count_the_forward_alone():
    net = ReversibleSequence(build([(BatchNorm, EmaInPlace)] * 2, 8))
    out = net(randn(6, 8, requires_grad=True))
    for _ in range(2):
        assert [int(block.f.norm.num_batches_tracked) for block in net.blocks] == [1, 1]
        assert [int(block.g.steps) for block in net.blocks] == [1, 1]
        weighted(out).backward(retain_graph=True)


@stateful
def test_two_forwards_before_the_backward_see_their_own_buffers(branch: object):
    net, oracle = both(branch)
    found = []
    for module in (net, oracle):
        xs = [randn(6, 8, seed=seed, requires_grad=True) for seed in range(2)]
        first, second = (weighted(module(x)) for x in xs)
        first.backward()
        middle = {name: buffer.clone() for name, buffer in module.named_buffers()}
        second.backward()
        found.append(
            {**{f"x{i}": x.grad for i, x in enumerate(xs)}, **gradients_of(module), **middle}
            | {f"{name} at last": buffer.clone() for name, buffer in module.named_buffers()}
        )
    assert_same_gradients(*found, tolerance=1e-11)


@stateful
def test_backward_twice_sees_the_same_buffers(branch: object):
    net, oracle = both(branch)

    def run(module: nn.Module) -> Results:
        x = randn(6, 8, requires_grad=True)
        loss = weighted(module(x))
        loss.backward(retain_graph=True)
        loss.backward()
        return {"x": x.grad, **dict(module.named_buffers())}

    assert_alike(net, oracle, run, tolerance=1e-11)


@stateful
def test_a_stateful_branch_shared_between_depths(branch: object):
    pairs = build([(branch, branch)], 8) * 3
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    x = randn(6, 8, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(oracle, x), tolerance=1e-11)


def test_a_buffer_keeps_its_identity():
    net = ReversibleSequence(build([(BatchNorm, EmaInPlace)], 8))
    before = dict(net.named_buffers())
    weighted(net(randn(6, 8, requires_grad=True))).backward()
    assert all(buffer is before[name] for name, buffer in net.named_buffers())


def test_batch_norm_in_eval_mode_stays_put():
    case = named("convolution-L3-batchnorm")[0]
    pairs = case.pairs()
    net, oracle = ReversibleSequence(pairs, **case.options), stored_copy(pairs, **case.options)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.eval()
    oracle.eval()
    outcome = train_step(net, case.input())
    assert_same_step(outcome, train_step(oracle, case.input()))
    assert_same_gradients(outcome.buffers, before)


class Graph(nn.Module):
    """Mixes rows by a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("matrix", torch.eye(3).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.matrix, self.linear(x)).tanh()


def test_sparse_buffers():
    pairs = [(Graph().double(), Graph().double()) for _ in range(3)]
    net, oracle, x = ReversibleSequence(pairs), stored_copy(pairs), randn(3, 4)
    assert_same_step(train_step(net, x), train_step(oracle, x))


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_modules_are_made_by_the_first_forward():
    def lazy() -> nn.Module:
        return nn.Sequential(
            nn.LazyBatchNorm1d(dtype=torch.float64), nn.LazyLinear(8, dtype=torch.float64)
        )

    pairs = [(lazy(), lazy()) for _ in range(2)]
    net = ReversibleSequence(pairs)
    x = randn(3, 8, requires_grad=True)
    loss = weighted(net(x))
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    oracle, expected = stored_copy(pairs), randn(3, 8, requires_grad=True)
    weighted(oracle(expected)).backward()
    loss.backward()
    assert_near(x.grad, expected.grad)
    assert_same_gradients(gradients_of(net), gradients_of(oracle))
    assert_same_gradients(dict(net.named_buffers()), buffers)


@pytest.mark.parametrize("branch", [with_dropout(Mlp), BatchNorm], ids=["dropout", "batchnorm"])
def test_functional_call_replays_with_the_weights_it_was_given(branch: object):
    net, oracle = both(branch)
    own = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    found = []
    for module in (net, oracle):
        given = {
            name: randn(*parameter.shape, seed=place, requires_grad=True) * 0.3
            for place, (name, parameter) in enumerate(module.named_parameters())
        }
        given = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        x = randn(6, 8, requires_grad=True)
        torch.manual_seed(0)
        weighted(torch.func.functional_call(module, {**given, **buffers}, (x,))).backward()
        assert all(parameter.grad is None for parameter in module.parameters())
        found.append(
            {"x": x.grad, **{name: tensor.grad for name, tensor in given.items()}, **buffers}
        )
    assert_same_gradients(*found)
    assert_same_gradients(
        {name: parameter.detach() for name, parameter in net.named_parameters()}, own
    )


def test_functional_call_with_weights_that_are_results_of_other_operations():
    """As in meta-learning: the weights of the inner step carry a graph."""
    net, oracle = both(Mlp)
    found = []
    for module in (net, oracle):
        names, values = zip(*module.named_parameters(), strict=True)
        x = randn(2, 6, 8)
        slopes = torch.autograd.grad(weighted(module(x)), values, create_graph=True)
        stepped = {n: p - 0.01 * s for n, p, s in zip(names, values, slopes, strict=True)}
        weighted(torch.func.functional_call(module, stepped, (x,))).backward()
        found.append(gradients_of(module))
    assert_same_gradients(*found, tolerance=1e-11)


class Scaled(AttributeInPlace):
    """Reads a tensor attribute and buffers, and changes none."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("shift", torch.full((width,), 0.5))
        self.register_buffer("index", torch.arange(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x)[..., self.index] * self.shift).tanh() * self.scale


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_call_replays_with_the_buffers_it_was_given(training: bool):
    net, oracle = both(Scaled)
    found = []
    for module in (net.train(training), oracle.train(training)):
        given = {name: buffer.flip(0) * 3 % 8 for name, buffer in module.named_buffers()}
        x = randn(6, 8, requires_grad=True)
        weighted(torch.func.functional_call(module, given, (x,))).backward()
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*found)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["shift", "index", "scale"])
def test_a_buffer_put_in_anothers_place_after_forward_takes_no_part(name: str, training: bool):
    net, oracle = both(Scaled)
    found = []
    for module in (net.train(training), oracle.train(training)):
        x = randn(6, 8, requires_grad=True)
        loss = weighted(module(x))
        branches = [branch for branch in module.modules() if isinstance(branch, Scaled)]
        others = [getattr(branch, name).flip(0) * 3 for branch in branches]
        for branch, other in zip(branches, others, strict=True):
            setattr(branch, name, other)
        loss.backward()
        assert all(
            getattr(branch, name) is other for branch, other in zip(branches, others, strict=True)
        )
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*found)


def test_a_parameter_or_branch_put_in_anothers_place_after_forward_takes_no_part():
    net, oracle = both(Mlp, depth=3)
    found = []
    for module in (net, oracle):
        x = randn(2, 6, 8, requires_grad=True)
        old = dict(module.named_parameters())
        loss = weighted(module(x))
        module.blocks[0].f.enter.weight = nn.Parameter(
            torch.zeros_like(module.blocks[0].f.enter.weight)
        )
        module.blocks[2].g = build([(Mlp, Mlp)], 8, seed=9)[0][0]
        replaced = module.blocks[0].f.enter.weight
        loss.backward()
        assert replaced.grad is None
        assert module.blocks[0].f.enter.weight is replaced
        found.append({"x": x.grad, **{name: parameter.grad for name, parameter in old.items()}})
    assert_same_gradients(*found)


class Shifted(nn.Module):
    """Shifts by a parameter where it has one, and makes it in its first call if it is told to."""

    def __init__(self, width: int, makes: bool = False):
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.makes = makes
        self.register_parameter("shift", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.makes and self.shift is None:
            self.shift = nn.Parameter(x.new_ones(x.shape[-1]))
        y = self.enter(x).tanh()
        y = y if self.shift is None else y + self.shift
        return y * self.scale if hasattr(self, "scale") else y


def test_a_parameter_that_was_put_where_none_was_after_forward_takes_no_part():
    net, oracle = both(Shifted, depth=3)
    found = []
    for module in (net, oracle):
        x = randn(2, 6, 8, requires_grad=True)
        loss = weighted(module(x))
        branches = [branch for branch in module.modules() if isinstance(branch, Shifted)]
        for branch in branches:
            branch.shift = nn.Parameter(randn(8))
            branch.scale = nn.Parameter(randn(8))
            branch.register_parameter("offset", None)
        loss.backward()
        for branch in branches:
            assert list(branch._parameters) == ["shift", "scale", "offset"]
            assert branch.shift.grad is branch.scale.grad is branch.offset is None
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*found)


def test_a_parameter_that_the_first_call_made_takes_part_in_replays():
    net, oracle = both(lambda width: Shifted(width, makes=True), depth=3)
    found = []
    for module in (net, oracle):
        x = randn(2, 6, 8, requires_grad=True)
        weighted(module(x)).backward()
        found.append({"x": x.grad, **gradients_of(module)})
    assert found[0]["blocks.0.f.shift"] is not None
    assert_same_gradients(*found)


class Slotted(nn.Module):
    """Counts its calls, and keeps what it counted, in slots."""

    __slots__ = ("calls", "seen", "first")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        first = getattr(self, "first", 3)
        self.first = 1
        return self.linear(x).tanh() * self.calls * len(self.seen) * first


def test_what_modules_hold_in_slots():
    found = []
    for execution in ("invert", "store"):
        # torch copies no slots.
        module = ReversibleSequence(build([(Slotted, Slotted)] * 3, 8), execution=execution)
        x = randn(6, 8, requires_grad=True)
        loss = weighted(module(x)) + weighted(module(x.cos()))
        branches = [branch for branch in module.modules() if isinstance(branch, Slotted)]
        for branch in branches:
            branch.calls = 7
            del branch.first
        loss.backward()
        assert [(branch.calls, branch.seen) for branch in branches] == [(7, [1, 2])] * 6
        assert not any(hasattr(branch, "first") for branch in branches)
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*found)


class ScaledBy(nn.Module):
    """Scales by an attribute, a buffer and a keyword."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("factor", torch.full((width,), 2.0, dtype=torch.float64))
        self.held = [torch.full((width,), 0.5, dtype=torch.float64)]

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x).tanh() * self.factor * self.held[0] * scale


@pytest.mark.parametrize("frozen", [True, False])
def test_tensors_that_are_frozen_or_thawed_after_forward(frozen: bool):
    pairs = build([(ScaledBy, ScaledBy)] * 3, 8)
    route = {"scale": ((True, True),) * 3}
    found = []
    for module in (ReversibleSequence(pairs, route), stored_copy(pairs, route)):
        x, scale = randn(6, 8, requires_grad=True), randn(8)
        branches = [branch for branch in module.modules() if isinstance(branch, ScaledBy)]
        tensors = [scale, *(branch.factor for branch in branches)]
        tensors += [branch.held[0] for branch in branches]
        for tensor in tensors:
            tensor.requires_grad_(frozen)
        loss = weighted(module(x, scale=scale))
        for tensor in tensors:
            tensor.requires_grad_(not frozen)
        loss.backward()
        assert all(tensor.requires_grad is not frozen for tensor in tensors)
        gradients = {str(i): tensor.grad for i, tensor in enumerate(tensors)} if frozen else {}
        found.append({"x": x.grad, **gradients, **gradients_of(module)})
    assert_same_gradients(*found)


class AsksItsHolder(nn.Module):
    """Shifts by a parameter, and scales by a buffer, of the network that holds it."""

    def __init__(self, width: int, holder: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        object.__setattr__(self, "holder", holder)

    def forward(self, x: Tensor) -> Tensor:
        self.holder.calls.add_(1)
        y = self.linear(x).tanh() * self.holder.calls.clone() + self.holder.shift
        y = y + self.holder.offset
        return y if self.holder.factor is None else y * self.holder.factor


class Holder(nn.Module):
    def __init__(self, execution: str) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((8,), 0.5, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("offset", torch.ones((), dtype=torch.float64))
        self.register_buffer("factor", None)
        torch.manual_seed(0)
        pairs = [(AsksItsHolder(8, self), AsksItsHolder(8, self)) for _ in range(3)]
        self.net = ReversibleSequence(pairs, execution=execution).double()


def test_what_a_branch_reads_of_the_module_that_holds_it():
    found = []
    for execution in ("store", "invert"):
        holder = Holder(execution)
        x, shift = randn(6, 8, requires_grad=True), holder.shift
        loss = weighted(holder.net(x))
        holder.shift, holder.factor = nn.Parameter(randn(8)), randn(8)
        holder.calls.add_(1)
        holder.offset.add_(1)
        loss.backward()
        assert int(holder.calls) == 7
        assert int(holder.offset) == 2
        found.append({"x": x.grad, "shift": shift.grad, **gradients_of(holder.net)})
    assert_same_gradients(*found)


class OfMethods(nn.Module):
    """A program whose branches are methods, of which one moves a buffer on."""

    def __init__(self, execution: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)
        steps = [Step((self.f, self.g)[i % 2], i % 2, (i + 1) % 2) for i in range(4)]
        self.net = Reversible(steps, execution=execution)

    def f(self, x: Tensor) -> Tensor:
        return self.norm(x).tanh()

    def g(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def test_methods_of_one_module_of_which_one_moves_a_buffer_on():
    found = []
    for execution in ("store", "invert"):
        module = OfMethods(execution).double()
        x = randn(6, 8, requires_grad=True)
        weighted(module.net(x, x.cos())[0]).backward()
        assert int(module.norm.num_batches_tracked) == 2
        found.append({"x": x.grad, "mean": module.norm.running_mean, **gradients_of(module)})
    assert_same_gradients(*found)


def test_a_parameter_that_is_changed_in_place_after_another_took_its_place():
    """A bias, which autograd does not save, but a replay reads."""
    net, _ = both(Linear)
    loss = weighted(net(randn(6, 8, requires_grad=True)))
    branch = net.blocks[2].g
    old, branch.bias = branch.bias, nn.Parameter(torch.zeros(8, dtype=torch.float64))
    with torch.no_grad():
        old.add_(1)
    with pytest.raises(
        ReversibleError, match="block 2, branch g: parameter 'bias' was changed in place"
    ):
        loss.backward()


class Remembers(nn.Module):
    """Appends what it computed to its own place in a cache, and reads all of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.key = ""

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        new = self.linear(x).tanh()
        cache[self.key] = torch.cat((cache[self.key], new), 1) if self.key in cache else new
        return new * cache[self.key].mean(1, keepdim=True)


class Appends(Remembers):
    """Appends to a list that every branch shares, and reads the last two entries."""

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        new = self.linear(x).tanh()
        cache.append(new)
        return new * sum(entry.mean(1, keepdim=True) for entry in cache[-2:])


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize(
    ("branch", "empty"), [(Remembers, dict), (Appends, list)], ids=["dict", "list"]
)
def test_a_cache_is_written_once_per_forward(branch: type[Remembers], empty: type, calls: int):
    pairs = build([(branch, branch)] * 3, 8)
    for place, module in enumerate(branch for pair in pairs for branch in pair):
        module.key = str(place)
    route = {"cache": every(3, True, True)}
    net, oracle = ReversibleSequence(pairs, route), stored_copy(pairs, route)
    found = []
    for module in (net, oracle):
        cache = empty()
        xs = [randn(2, 3, 8, seed=seed, requires_grad=True) for seed in range(calls)]
        losses = [weighted(module(x, cache=cache)) for x in xs]
        entries = cache if empty is list else [cache[str(place)] for place in range(6)]
        assert [len(entries), entries[0].shape[1]] == (
            [6 * calls, 3] if empty is list else [6, 3 * calls]
        )
        written = [entry.detach().clone() for entry in entries]
        (sum(losses) + entries[-1].sum()).backward()
        assert len(entries) == len(written)
        assert all(torch.equal(now, then) for now, then in zip(entries, written, strict=True))
        found.append(
            {f"x{i}": x.grad for i, x in enumerate(xs)}
            | {f"entry {i}": entry for i, entry in enumerate(written)}
            | gradients_of(module)
        )
    assert_same_gradients(*found)


def test_the_containers_given_are_the_users_own_afterwards():
    pairs = build([(Remembers, Remembers)] * 2, 8)
    for place, module in enumerate(branch for pair in pairs for branch in pair):
        module.key = str(place)
    cache: dict[str, Tensor] = {"another": torch.ones(1)}
    net = ReversibleSequence(pairs, {"cache": every(2, True, True)})
    weighted(net(randn(2, 3, 8, requires_grad=True), cache=cache)).backward()
    assert sorted(cache) == ["0", "1", "2", "3", "another"]


class ReadsContainers(Linear):
    """Reads tensors out of nested containers and a plain object."""

    def forward(self, x: Tensor, settings: dict, pair: tuple) -> Tensor:
        return super().forward(x * settings["scales"][0] + pair[0]).tanh() * pair[1]


def test_keywords_may_be_containers_of_tensors_that_need_gradients():
    pairs = build([(ReadsContainers, ReadsContainers)] * 3, 8)
    route = {"settings": every(3, True, True), "pair": every(3, True, True)}
    net, oracle = ReversibleSequence(pairs, route), stored_copy(pairs, route)

    def run(module: nn.Module) -> Results:
        x, scale, shift = (randn(2, 6, 8, seed=seed, requires_grad=True) for seed in range(3))
        weighted(
            module(x, settings={"scales": [scale.exp()], "name": "any"}, pair=(shift, 0.5))
        ).backward()
        return {"x": x.grad, "scale": scale.grad, "shift": shift.grad}

    assert_alike(net, oracle, run)


class AddsBias(Linear):
    """Adds a buffer and a keyword, which autograd needs not save."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("offset", torch.zeros(width, dtype=torch.float64))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return (super().forward(x) + bias + self.offset).tanh()


def test_tensors_made_in_inference_mode():
    pairs = build([(AddsBias, AddsBias)] * 2, 8)
    with torch.inference_mode():
        bias = randn(8)
        for f, g in pairs:
            f.offset, g.offset = randn(8, seed=1), randn(8, seed=2)
    route = {"bias": ((True, True),) * 2}
    net = ReversibleSequence(pairs, route)
    found = []
    for execution in ("store", "invert", "checkpoint"):
        net.execution = execution
        net.zero_grad()
        x = randn(6, 8, requires_grad=True)
        weighted(net(x, bias=bias)).backward()
        found.append(
            {"x": x.grad, **{name: grad.clone() for name, grad in gradients_of(net).items()}}
        )
    for others in found[1:]:
        assert_same_gradients(others, found[0])


def test_context_fn_gives_each_branch_its_forward_and_its_replay_context():
    events: Counter[str] = Counter()

    @contextlib.contextmanager
    def context(kind: str) -> Iterator[None]:
        events[f"enter {kind}"] += 1
        yield
        events[f"leave {kind}"] += 1

    pairs = build([(with_dropout(Mlp), with_dropout(Mlp))] * 3, 8)
    net = ReversibleSequence(pairs, context_fn=lambda: (context("forward"), context("replay")))
    oracle = stored_copy(pairs)
    x = randn(2, 6, 8, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(oracle, x))
    assert events == {
        f"{verb} {kind}": 6 for verb in ("enter", "leave") for kind in ("forward", "replay")
    }


SELECTIVE = functools.partial(
    create_selective_checkpoint_contexts,
    [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default],
)


@pytest.mark.parametrize("case", named("mlp-L8-dropout", "attention-L8-dropout"), ids=str)
def test_selective_recomputation_keeps_the_matrix_products(case: Case):
    pairs = case.pairs()
    net, oracle = ReversibleSequence(pairs, context_fn=SELECTIVE), stored_copy(pairs)
    products, others, found = [], [], []
    for module in (net, oracle):
        x = case.input()
        torch.manual_seed(0)
        loss = weighted(module(x))
        with OperationLog() as log:
            loss.backward()
        products.append(sum(name.split(".")[1] in ("mm", "addmm", "bmm") for name in log.names))
        others.append(log.names.count("aten.gelu.default"))
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*found)
    assert products[0] == products[1] > 0
    assert others[0] > 0 == others[1]


def test_selective_recomputation_keeps_torchs_limit_of_one_backward():
    net = ReversibleSequence(build([(Mlp, Mlp)] * 2, 8), context_fn=SELECTIVE)
    loss = weighted(net(randn(2, 6, 8, requires_grad=True)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


class Observes(nn.Module):
    """Notes, in each evaluation, all that a branch can see of its surroundings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        noted(self).append(
            {
                "layout": (x.shape, x.stride(), x.dtype, x.device),
                "gradient": (
                    x.requires_grad,
                    torch.is_grad_enabled(),
                    torch.is_inference_mode_enabled(),
                ),
                "training": self.training,
                "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
                "scale": None if scale is None else (scale.requires_grad, scale.stride()),
            }
        )
        return self.linear(x).sin()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("needs", [True, False], ids=["x-grad", "x-none"])
@pytest.mark.parametrize(
    "options", [{}, {"split": "chunk", "merge": "concat"}], ids=["copy", "chunk"]
)
def test_a_replay_sees_the_surroundings_of_the_forward(options: dict, needs: bool, autocast: bool):
    width = 4 if options else 8
    pairs = build([(Observes, Observes)] * 3, width, dtype=torch.float32)
    net = ReversibleSequence(pairs, {"scale": every(3, True, False)}, **options)
    net.blocks[1].f.requires_grad_(False)
    net.blocks[2].g.eval()
    x = randn(2, 6, 8, dtype=torch.float32).requires_grad_(needs)
    scale = randn(8, dtype=torch.float32).requires_grad_() * 2
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = net(x, scale=scale).sum()
    net.train()
    with torch.no_grad():
        loss.backward()
    for block in net.blocks:
        for branch in (block.f, block.g):
            forward, replay = noted(branch)
            assert replay == forward


def test_each_branch_is_evaluated_once_per_backward():
    for case in named("mlp-L8-dropout", "attention-L8-dropout", "shared-L4", "linear-L8-2d"):
        net = ReversibleSequence(case.pairs(), **case.options)
        counted = Evaluations(net)
        loss = weighted(net(case.input()))
        forward = counted.take()
        loss.backward()
        assert Counter(counted.take()) == Counter(forward)


def test_a_partial_gradient_replays_only_what_it_must():
    net = ReversibleSequence(build([(Mlp, Mlp)] * 8, 8))
    counted = Evaluations(net)
    loss = weighted(net(randn(2, 6, 8, requires_grad=True)))
    counted.take()
    torch.autograd.grad(loss, net.blocks[6].f.leave.weight, retain_graph=True)
    assert sorted(counted.take()) == ["6.f", "6.g", "7.f", "7.g"]


def test_store_replays_nothing():
    net = ReversibleSequence(build([(Mlp, Mlp)] * 3, 8), execution="store")
    counted = Evaluations(net)
    loss = weighted(net(randn(2, 6, 8, requires_grad=True)))
    assert len(counted.take()) == 6
    loss.backward()
    assert counted.take() == []


Pair = namedtuple("Pair", ["scales", "log"])


@dataclasses.dataclass
class Notes:
    scales: Tensor
    log: list[Tensor]


class WritesNotes(Linear):
    """Reads what its earlier calls left in the container it is given."""

    def forward(self, x: Tensor, notes: Any) -> Tensor:
        scales, log = (
            (notes["scales"], notes["log"])
            if isinstance(notes, dict)
            else (notes.scales, notes.log)
        )
        log.append(super().forward(x).tanh() * scales)
        if isinstance(notes, Notes):
            notes.scales = notes.scales * 0.5
        return sum(log)


CONTAINERS = {
    "defaultdict": lambda **items: defaultdict(list, items),
    "ordered": OrderedDict,
    "namedtuple": Pair,
    "dataclass": Notes,
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_that_branches_write_to(container: Callable):
    pairs = build([(WritesNotes, WritesNotes)] * 3, 8)
    route = {"notes": every(3, True, True)}
    net, oracle = ReversibleSequence(pairs, route), stored_copy(pairs, route)

    def run(module: nn.Module) -> Results:
        x, scale = (randn(2, 6, 8, seed=seed, requires_grad=True) for seed in range(2))
        notes = container(scales=scale.exp(), log=[])
        weighted(module(x, notes=notes)).backward()
        assert len(notes["log"] if isinstance(notes, dict) else notes.log) == 6
        return {"x": x.grad, "scale": scale.grad}

    assert_alike(net, oracle, run)


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_a_tensor_in_a_container_that_was_changed(container: Callable):
    net = ReversibleSequence(
        build([(WritesNotes, WritesNotes)] * 2, 8), {"notes": every(2, True, True)}
    )
    scales = torch.ones(8, dtype=torch.float64)
    loss = weighted(net(randn(2, 6, 8, requires_grad=True), notes=container(scales=scales, log=[])))
    scales.zero_()
    with pytest.raises(ReversibleError, match="keyword tensor"):
        loss.backward()
