"""Streams that are read on the way: values, gradients, and no other memory than their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Gate, Linear, Mlp, build, randn, with_dropout
from oracle import assert_near, assert_same_gradients, gradients_of, stored_copy, weighted
from revnet import Reversible, ReversibleSequence, SequentialSequence, Step, measure_memory

DEPTH = 6
TAPS = [1, -3, 4]
EXECUTIONS = ["invert", "checkpoint", "offload", "select", "store"]
IN_A_GRAPH = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def hidden_by_hand(pairs: Any, x: Tensor, streams: int = 2) -> list[Tensor]:
    """Return what a plain loop has after each block: the mean of two streams, or the only one."""
    x1 = x2 = x
    found = []
    for f, g in pairs:
        x1 = x1 + f(x2 if streams == 2 else x1)
        if streams == 2:
            x2 = x2 + g(x1)
        else:
            x1 = x1 + g(x1)
        found.append((x1 + x2) / 2 if streams == 2 else x1)
    return found


def trained(net: nn.Module, x: Tensor, taps: Any = TAPS) -> dict[str, Any]:
    """Return outputs and gradients of a loss on the output and the taps."""
    net.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(0)
    y, hidden = net(x, taps=taps)
    assert isinstance(hidden, list)
    weighted(y, *hidden).backward()
    outputs = {f"hidden {i}": each.detach() for i, each in enumerate(hidden)}
    return {"y": y.detach(), **outputs, "x": x.grad, **gradients_of(net)}


def expected_of(net: Any, pairs: Any, x: Tensor, streams: int) -> dict[str, Any]:
    net.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(0)
    found = hidden_by_hand(pairs, x, streams)
    hidden = [found[tap] for tap in TAPS]
    weighted(found[-1], *hidden).backward()
    outputs = {f"hidden {i}": each.detach() for i, each in enumerate(hidden)}
    return {"y": found[-1].detach(), **outputs, "x": x.grad, **gradients_of(net)}


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_taps_of_a_reversible_sequence(execution: str):
    pairs = build([(with_dropout(Mlp), Gate)] * DEPTH, 8)
    net = ReversibleSequence(pairs, execution=execution)
    x = randn(2, 6, 8)
    assert_same_gradients(trained(net, x), expected_of(net, pairs, x, 2))


@pytest.mark.parametrize("execution", EXECUTIONS[1:])
def test_taps_of_a_sequential_sequence(execution: str):
    pairs = build([(with_dropout(Mlp), Gate)] * DEPTH, 8)
    net = SequentialSequence(pairs, execution=execution)
    x = randn(2, 6, 8)
    assert_same_gradients(trained(net, x), expected_of(net, pairs, x, 1))


@pytest.mark.parametrize("execution", EXECUTIONS[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_fixed_streams_gradients_are_stored_ones_in_every_bit(dtype: Any, execution: str):
    pairs = build([(with_dropout(Mlp), Gate)] * DEPTH, 8)
    net = ReversibleSequence(pairs, streams="fixed").to(dtype)
    x, results = randn(2, 6, 8).to(dtype), []
    for net.execution in ("store", execution):
        results.append(trained(net, x))
    for name, found in results[0].items():
        assert torch.equal(found, results[1][name]), name


def test_splits_and_merges_hold_for_taps_too():
    pairs = build([(Mlp, Linear)] * DEPTH, 4)
    net = ReversibleSequence(pairs, split="chunk", merge="concat")
    x = randn(2, 6, 8)
    _, hidden = net(x, taps=range(DEPTH))
    for depth, found in enumerate(hidden):
        expected = stored_copy(pairs[: depth + 1], split="chunk", merge="concat")(x)
        assert_near(found, expected)


def test_taps_of_a_program_are_all_its_streams():
    fns = [f for pair in build([(Mlp, Gate)] * 3, 8) for f in pair]
    net = Reversible([Step(f, i % 3, (i + 1) % 3) for i, f in enumerate(fns)])
    streams = [x.requires_grad_() for x in randn(3, 2, 8).unbind()]
    *last, hidden = net(*streams, taps=[2, 0])
    for tap, found in zip([2, 0], hidden, strict=True):
        assert len(found) == 3
        for a, b in zip(found, net[: tap + 1](*streams), strict=True):
            assert torch.equal(a, b)
    weighted(*last, *hidden[0], *hidden[1]).backward()
    found = gradients_of(net)
    net.zero_grad()
    weighted(*net(*streams), *net[:3](*streams), *net[:1](*streams)).backward()
    assert_same_gradients(found, gradients_of(net))


def test_what_is_returned():
    net = ReversibleSequence(build([(Mlp, Linear)] * 3, 8))
    x = randn(2, 6, 8)
    y, hidden = net(x, taps=[2, -1, 0, 2])
    assert torch.equal(hidden[0], y)
    assert torch.equal(hidden[1], y)
    assert torch.equal(hidden[3], y)
    assert torch.equal(hidden[2], net[:1](x))
    y, hidden = net(x, taps=[])
    assert hidden == []
    with torch.no_grad():
        assert torch.equal(net(x, taps=[0])[1][0], net[:1](x))
    for tap in (3, -4):
        with pytest.raises(IndexError, match=f"taps: there is no block {tap} among 3"):
            net(x, taps=[tap])
    for taps in ([0.5], "a", 1, [None]):
        with pytest.raises(TypeError, match=r"taps=.*: expected the indices of some blocks"):
            net(x, taps=taps)


class WithAux(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x.sum()


@pytest.mark.parametrize("kind", [ReversibleSequence, SequentialSequence])
def test_extra_outputs_come_after_the_taps(kind: Any):
    net = kind([(WithAux(8, 8), nn.Linear(8, 8)) for _ in range(3)])
    _, hidden, aux = net(randn(2, 8).float(), taps=[0])
    assert len(hidden) == 1
    assert len(aux) == 3


def test_a_dropped_block_leaves_what_came_before_it():
    net = ReversibleSequence(build([(Mlp, Linear)] * 8, 8), layer_dropout=0.6)
    net._dropped = lambda: {0, 2, 3, 7}
    x = randn(2, 6, 8)
    y, hidden = net(x, taps=range(8))
    assert torch.equal(hidden[0], x)
    assert torch.equal(hidden[1], hidden[3])
    assert torch.equal(hidden[6], y)
    assert torch.equal(hidden[7], y)
    assert not torch.equal(hidden[3], hidden[4])


def test_a_hook_on_a_block_comes_before_the_tap():
    net = ReversibleSequence(build([(Mlp, Linear)] * 3, 8))
    net[1].register_forward_hook(lambda block, given, out: (out[0] * 2, out[1]))
    x = randn(2, 6, 8)
    _, hidden = net(x, taps=[0, 1])
    y1, y2 = net[:1].run(x, x)
    y1 = y1 + net[1].f(y2)
    y2 = y2 + net[1].g(y1)
    assert_near(hidden[1], (2 * y1 + y2) / 2)
    assert_near(hidden[0], net[:1](x))


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("streams", ["float", "fixed"])
@pytest.mark.parametrize("taps", [[3], [0, 2, 6]], ids=str)
def test_a_tap_takes_the_memory_of_its_stream(taps: list[int], streams: Any):
    net = ReversibleSequence(build([(Linear, Linear)] * 8, 8), streams=streams).float()
    x = torch.randn(2, 6, 8, requires_grad=True)
    net(x).sum().backward()

    def run(taps: list[int]) -> list[Tensor]:
        y, hidden = net(x, taps=taps)
        return [y, *hidden]

    without, found = measure_memory(run, []), measure_memory(run, taps)
    # What is returned is not counted as kept for backward, but in the peak.
    assert found.saved_bytes == without.saved_bytes
    assert found.peak_bytes == without.peak_bytes + len(taps) * x.nbytes


@pytest.mark.usefixtures("no_collector")
def test_a_tap_is_free_where_the_stream_is_kept():
    net = SequentialSequence(build([(Linear, Linear)] * 9, 8), execution="checkpoint")
    x = randn(2, 6, 8, requires_grad=True)
    net(x).sum().backward()
    without, found = measure_memory(net, x, taps=[]), measure_memory(net, x, taps=[3, 7])
    # The two that are returned.
    assert found.saved_bytes == without.saved_bytes - 2 * x.nbytes
    assert found.peak_bytes == without.peak_bytes


@IN_A_GRAPH
def test_taps_inside_a_graph():
    """A tap between two steps of one operation, and steps that are stored."""
    execution, streams = ["invert", "invert", "invert", "store"], "fixed"
    pairs = build([(Linear, Linear)] * 2, 8)
    net = ReversibleSequence(pairs, streams=streams, execution=execution).float()
    x = torch.randn(2, 6, 8)
    expected = trained(net, x, [0])
    found = trained(torch.compile(net, fullgraph=True, backend="aot_eager"), x, [0])
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_same_gradients(found, expected, tolerance=1e-5)


@IN_A_GRAPH
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_taps_where_the_graph_breaks():
    net = ReversibleSequence(build([(with_dropout(Mlp), Linear)] * 2, 8)).float()
    x = torch.randn(2, 6, 8)
    expected = trained(net, x, [0])
    found = trained(torch.compile(net, backend="eager"), x, [0])
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_same_gradients(found, expected, tolerance=1e-5)


def test_taps_under_a_transform():
    pairs = build([(Mlp, Gate)] * 3, 8)
    net = ReversibleSequence(pairs)
    x = randn(2, 6, 8)

    def loss(x: Tensor) -> Tensor:
        y, hidden = net(x, taps=[0, 1])
        return (y.square() + hidden[0].sin() * hidden[1]).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert_near(torch.func.grad(loss)(x), leaf.grad)
