"""Layers on several streams in turn: gradients, memory and forms are those of the plain loop."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cases
import revnet
from revnet.testing import check_inverse

pytestmark = cases.COMPILER_WARNINGS


def layers(count: int, width: int = 8, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(1)
    return [
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh()).to(dtype)
        for _ in range(count)
    ]


def plain(branches: list[nn.Module], x: Tensor, streams: int) -> Tensor:
    """The definition, by a loop that stores everything."""
    held = [x / (streams - 1) for _ in range(streams)]
    for k, branch in enumerate(branches):
        target = k % streams
        others = [held[j] for j in range(streams) if j != target]
        held[target] = held[target] + branch(torch.stack(others).sum(0))
    return (streams - 1) / streams * torch.stack(held).sum(0)


def gradients(function: Any, x: Tensor, branches: list[nn.Module]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    parameters = [p for branch in branches for p in branch.parameters()]
    y = function(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@settings(max_examples=40)
@given(
    streams=st.integers(2, 5),
    count=st.integers(1, 8),
    execution=st.sampled_from(["invert", "store", "checkpoint", "select", "offload"]),
)
def test_outputs_and_gradients_are_those_of_the_loop(streams: int, count: int, execution: str):
    branches, x = layers(count), torch.randn(3, 8, dtype=torch.float64)
    net = revnet.ReversibleCycle(branches, streams, execution=execution)  # type: ignore[arg-type]
    expected = gradients(lambda x: plain(branches, x, streams), x, branches)
    for ours, theirs in zip(gradients(net, x, branches), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams", [2, 3, 4])
def test_fixed_streams_equal_stored_execution_in_every_bit(streams: int, dtype: torch.dtype):
    branches, x = layers(7, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    found = [
        gradients(
            revnet.ReversibleCycle(branches, streams, streams="fixed", execution=execution),
            x,
            branches,
        )
        for execution in ("invert", "store")
    ]
    assert all(map(torch.equal, *found))


def test_two_streams_are_a_sequence():
    branches, x = layers(6), torch.randn(3, 8, dtype=torch.float64)
    pairs = list(zip(branches[::2], branches[1::2], strict=True))
    expected = gradients(revnet.ReversibleSequence(pairs), x, branches)
    found = gradients(revnet.ReversibleCycle(branches, 2), x, branches)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_memory_does_not_grow_with_depth(streams: Any):
    def kept(count: int) -> tuple[int, int]:
        net = revnet.ReversibleCycle(layers(count, 16, torch.float32), streams=streams)
        report = revnet.measure_memory(net, torch.randn(64, 16, requires_grad=True))
        return report.saved_bytes, report.peak_bytes

    short, long = kept(6), kept(24)
    # A stream is 4 bytes an element, or 6 as integers. Kept for good: three of them.
    size = 3 * 64 * 16 * (4 if streams == "float" else 6)
    # And for each layer, what its replay needs to know.
    assert size <= short[0] <= long[0] <= size + 400
    # The gradients of 18 layers more.
    more = 18 * (16 * 16 + 3 * 16) * 4
    assert long[1] - short[1] <= more + 512


def test_backward_costs_one_more_forward():
    branches, x = layers(7), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def flops(execution: Any, backward: bool) -> int:
        net = revnet.ReversibleCycle(branches, execution=execution)
        with FlopCounterMode(display=False) as counter:
            y = net(x)
            if backward:
                y.sum().backward()
        return counter.get_total_flops()

    assert flops("invert", True) - flops("store", True) == flops("store", False)


class Scaled(nn.Module):
    """A layer with a keyword, randomness and an extra output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.dropout(self.linear(x), 0.5, self.training)
        return gain * y, y.detach().mean()


def test_keywords_randomness_and_extra_outputs():
    torch.manual_seed(0)
    branches = [Scaled() for _ in range(5)]
    x, gain = torch.randn(3, 8), torch.tensor(0.5, requires_grad=True)
    found = []
    for execution in ("store", "invert"):
        net = revnet.ReversibleCycle(
            branches, args_route="signature", streams="fixed", execution=execution
        )
        torch.manual_seed(2)
        y, aux = net(x, gain=gain)
        found.append([y, *torch.autograd.grad(y.sum(), [gain, *net.parameters()])])
        assert list(aux) == [f"step {k}" for k in range(5)]
        assert net.with_aux(x, gain=gain)[1].keys() == aux.keys()
    assert all(map(torch.equal, *found))


def test_taps_are_early_exits():
    branches, x = layers(7), torch.randn(3, 8, dtype=torch.float64)
    net = revnet.ReversibleCycle(branches)
    y, hidden = net(x, taps=[0, 3, -1])
    for tap, seen in zip((1, 4, 7), hidden, strict=True):
        assert torch.equal(seen, net[:tap](x))
    assert torch.equal(hidden[-1], y)
    assert net[3].fn is branches[3]
    with pytest.raises(IndexError, match="there is no layer 7 among 7"):
        net(x, taps=[7])


def test_streams_come_back():
    net = revnet.ReversibleCycle(layers(7), streams="fixed")
    streams = torch.randn(3, 2, 8, dtype=torch.float64).unbind()
    back = net.inverse(*net.run(*streams))
    for ours, theirs in zip(back, streams, strict=True):
        assert torch.allclose(ours, theirs, atol=2**-24)
    check_inverse(net, *streams, tolerance=1e-6)
    parts = net[3:].run(*net[:3].run(*streams))
    assert all(map(torch.equal, parts, net.run(*streams)))


class Halves(nn.Module):
    """A layer on pairs of tensors."""

    def __init__(self, aux: bool) -> None:
        super().__init__()
        self.linear, self.aux = nn.Linear(8, 8), aux

    def forward(self, x: tuple[Tensor, Tensor]) -> Any:
        y = self.linear(x[0]), self.linear(x[1])
        return (y, y[0].detach().sum()) if self.aux else y


@pytest.mark.parametrize("kind", ["cycle", "sequence"])
def test_extra_outputs_are_told_from_pairs(kind: str):
    x = torch.randn(2, 8), torch.randn(2, 8)
    for aux in (False, True):
        parts = [Halves(aux) for _ in range(4)]
        net: Any = (
            revnet.ReversibleCycle(parts)
            if kind == "cycle"
            else revnet.ReversibleSequence(zip(parts[::2], parts[1::2], strict=True))
        )
        y, extra = net.with_aux(x)
        assert isinstance(y, tuple)
        assert [half.shape for half in y] == [(2, 8), (2, 8)]
        assert len(extra) == 4 * aux


@pytest.mark.parametrize("execution", ["invert", "checkpoint"])
def test_second_derivatives_autocast_copies_and_shared_layers(execution: Any):
    (layer,) = layers(1)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    net = revnet.ReversibleCycle([layer] * 5, execution=execution)
    assert torch.autograd.gradgradcheck(net, (x,))
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(x), net(x))
    low, found = layers(5, dtype=torch.float32), []
    for each in ("store", execution):
        with torch.autocast("cpu", torch.bfloat16):
            net = revnet.ReversibleCycle(low, execution=each)
            found.append(gradients(net, torch.linspace(-1, 1, 24).view(3, 8), low))
    assert all(map(torch.equal, *found))


def test_trees_plans_copies_and_state_dicts():
    branches = layers(6)

    class Both(nn.Module):
        def __init__(self, branch: nn.Module) -> None:
            super().__init__()
            self.branch = branch

        def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: self.branch(leaf) for name, leaf in x.items()}

    x = torch.randn(3, 8, dtype=torch.float64)
    net = revnet.ReversibleCycle(branches)
    tree = revnet.ReversibleCycle([Both(branch) for branch in branches])({"a": x, "b": 2 * x})
    assert torch.allclose(tree["a"], net(x))
    assert torch.allclose(tree["b"], net(2 * x))
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    twin.execution = ["store", "invert", "checkpoint"] * 2
    expected = gradients(net, x, branches)
    mixed = gradients(twin, x, [step.fn for step in twin])  # type: ignore[misc]
    assert all(map(torch.allclose, mixed, expected))
    assert len(revnet.plan(net, x.requires_grad_(), None).executions) == 6


def test_a_compiled_cycle_is_the_loop():
    branches, x = layers(4), torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(revnet.ReversibleCycle(branches), fullgraph=True, backend="aot_eager")
    expected = gradients(lambda x: plain(branches, x, 3), x, branches)
    assert all(map(torch.allclose, gradients(compiled, x, branches), expected))


def test_compile_compiles_layers_of_one_class_once():
    from torch._dynamo.testing import CompileCounter

    branches, x = layers(5), torch.randn(3, 8, dtype=torch.float64)
    expected = gradients(lambda x: plain(branches, x, 3), x, branches)
    net, counter = revnet.ReversibleCycle(branches), CompileCounter()
    net.compile(backend=counter)
    assert all(map(torch.allclose, gradients(net, x, branches), expected))
    assert counter.frame_count == 1


def test_errors_say_what_to_give():
    with pytest.raises(ValueError, match="layers is empty: give at least one module"):
        revnet.ReversibleCycle([])
    with pytest.raises(ValueError, match="num_streams is 1: a cycle has at least two streams"):
        revnet.ReversibleCycle(layers(2), 1)
    with pytest.raises(TypeError, match="layer 1 is function, but a layer is a module"):
        revnet.ReversibleCycle([nn.Linear(8, 8), lambda x: x])  # type: ignore[list-item]
    net = revnet.ReversibleCycle(layers(2))
    with pytest.raises(TypeError, match=r"x is torch.int64, but a stream is floating-point"):
        net(torch.zeros(2, 8, dtype=torch.int64))
    for call in (net.run, net.inverse):
        with pytest.raises(ValueError, match="got 2 streams, but num_streams is 3: run"):
            call(*torch.zeros(2, 2, 8))
        with pytest.raises(ValueError, match=r"the streams differ: stream 0 is \(2, 8\)"):
            call(*torch.zeros(2, 2, 8), torch.zeros(1, 8))
    with pytest.raises(TypeError, match="with_aux takes no taps"):
        net.with_aux(torch.zeros(2, 8), taps=[0])
