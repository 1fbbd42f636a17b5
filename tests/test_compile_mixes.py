"""Executions per step inside one graph: stored runs of steps between rebuilt ones, their gradients
and their memory.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.compile_fx import compile_fx
from torch.func import functional_call, grad, vjp, vmap

import cases
import oracle
import revnet
from test_compile_traced import (
    TOLERANCE,
    WIDTH,
    assert_as_stored,
    compiled_peak,
    pairs_of,
    pytestmark,
    tokens,
)

__all__ = ["pytestmark"]

ADDMM = torch.ops.aten.addmm.default
EXECUTIONS = ["store", "select", "checkpoint", "offload", "invert"]
STREAMS = [pytest.param("float", id="float"), pytest.param(revnet.Fixed(37), id="fixed")]


def mixes(steps: int) -> st.SearchStrategy[list[str]]:
    """Half of the steps stored, on average: an even choice among five would seldom give a run of
    stored ones.
    """
    return st.lists(
        st.sampled_from(["store", "invert"]) | st.sampled_from(EXECUTIONS),
        min_size=steps,
        max_size=steps,
    )


def shared() -> tuple[list[tuple[nn.Module, nn.Module]], dict[str, Any]]:
    """Three blocks of two pairs of modules, so that every weight takes part in several steps, and
    routed keywords.
    """
    (f, g), (h, _) = pairs_of(cases.Modulated)
    route = {
        "scale": ((True, False), (True, True), (False, True)),
        "shift": ((False, True), (True, False), (True,) * 2),
    }
    return [(f, g), (h, f), (g, h)], route


def keywords() -> dict[str, Tensor]:
    return {
        "scale": torch.randn(WIDTH, dtype=torch.float64, requires_grad=True),
        "shift": torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True),
    }


@pytest.mark.parametrize("streams", STREAMS)
@given(data=st.data())
@settings(max_examples=3)
def test_any_mix_in_one_graph_gives_the_gradients_of_the_stored_loop(
    streams: Any, data: st.DataObject
) -> None:
    mix = data.draw(mixes(6))
    torch._dynamo.reset()
    pairs, route = shared()
    stored, net = (
        oracle.stored_copy(pairs, route),
        revnet.ReversibleSequence(pairs, route, streams=streams),
    )
    net.execution = mix
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_as_stored(run, net, stored, tokens(), TOLERANCE[streams], **keywords())
    if streams == "float":
        return
    # Rounded to the same numbers, fixed streams give the same gradients whatever is rebuilt.
    eager = revnet.ReversibleSequence(
        copy.deepcopy(pairs), route, streams=streams, execution="store"
    )
    assert_as_stored(run, net, eager, tokens(), **keywords())


@pytest.mark.parametrize("streams", STREAMS)
@given(data=st.data())
@settings(max_examples=8)
def test_any_mix_under_transforms_gives_the_gradients_of_the_stored_loop(
    streams: Any, data: st.DataObject
) -> None:
    mix = data.draw(mixes(6))
    pairs, route = shared()
    stored = oracle.stored_copy(pairs, route)
    if streams != "float":
        stored = revnet.ReversibleSequence(
            copy.deepcopy(pairs), route, streams=streams, execution="store"
        )
    net = revnet.ReversibleSequence(pairs, route, streams=streams, execution=mix)
    x, given, pull = tokens().detach(), keywords(), torch.randn(2, 6, WIDTH, dtype=torch.float64)
    found = []
    for of in (net, stored):
        parameters = {name: parameter.detach() for name, parameter in of.named_parameters()}

        def call(parameters: Any, x: Tensor, of: nn.Module = of, **given: Tensor) -> Tensor:
            return functional_call(of, parameters, (x,), given)

        def loss(parameters: Any, x: Tensor, given: Any) -> Tensor:
            return oracle.weighted(call(parameters, x, **given))

        found.append(
            [
                grad(loss, (0, 1, 2))(parameters, x, given),
                vjp(partial(call, **given), parameters, x)[1](pull),
                vmap(grad(loss, (0, 1)), (None, 0, None))(parameters, x, given),
            ]
        )
    for actual, wanted in zip(*map(torch.utils._pytree.tree_leaves, found), strict=True):
        oracle.assert_near(actual, wanted)


def test_steps_that_are_stored_need_not_be_fit_for_a_replay() -> None:
    blocks = [
        *pairs_of(cases.Mlp, 1),
        *pairs_of(cases.with_dropout(cases.Mlp), 1),
        *pairs_of(cases.Mlp, 1),
    ]
    net = revnet.ReversibleSequence(blocks, streams="float")
    x, found = tokens(), []
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.execution = ["invert", "invert", "store", "store", "invert", "invert"]
        torch.manual_seed(0)
        found.append(torch.autograd.grad(run(x).sum(), [x, *net.parameters()]))
    for actual, wanted in zip(*found, strict=True):
        oracle.assert_near(actual, wanted)


@pytest.mark.parametrize("streams", STREAMS)
def test_stored_steps_may_update_streams_by_any_rule(streams: Any) -> None:
    branches = [nn.Linear(WIDTH, WIDTH).double() for _ in range(6)]
    couplings = [revnet.Additive(), revnet.Momentum(0.9)] * 3
    steps = [
        revnet.Step(f, i % 2, (i + 1) % 2, c)
        for i, (f, c) in enumerate(zip(branches, couplings, strict=True))
    ]
    net = revnet.Reversible(steps, streams=streams, execution="store")
    x, found = tokens(), []
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        found.append(torch.autograd.grad(oracle.weighted(*run(x, x.sin())), [x, *net.parameters()]))
        net.execution = ["invert", "store"] * 3
    for actual, wanted in zip(*found, strict=True):
        oracle.assert_near(actual, wanted, tolerance=TOLERANCE[streams])


def test_trees_between_rebuilt_tensors_leave_the_graph() -> None:
    class Sums(nn.Linear):
        def forward(self, tree: dict[str, Tensor]) -> Tensor:
            return super().forward(tree["a"]).sin()

    net = revnet.Reversible([revnet.Step(Sums(WIDTH, WIDTH).double(), 0, 1) for _ in range(2)])
    x = tokens()

    def loss(run: Any, x: Tensor) -> Tensor:
        return oracle.weighted(run(x, {"a": 2 * x})[0])

    runs = net, torch.compile(net, backend="aot_eager")
    found = [torch.autograd.grad(loss(run, x), [x, *net.parameters()]) for run in runs]
    for actual, wanted in zip(*found, strict=True):
        oracle.assert_near(actual, wanted)
    oracle.assert_near(grad(lambda x: loss(net, x))(x.detach()), found[0][0])


class Large(nn.Module):
    """A branch that leaves the range of its stream."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * 2.0**40


@pytest.mark.parametrize("step", [0, 3, 4])
@pytest.mark.parametrize("how", ["compiled", "transformed"])
def test_the_step_that_leaves_the_range_is_named(step: int, how: str) -> None:
    branches = [nn.Tanh() for _ in range(6)]
    branches[step] = Large()
    net = revnet.ReversibleSequence(
        list(zip(branches[::2], branches[1::2], strict=True)), streams=revnet.Fixed(24)
    )
    net.execution = ["invert", "store", "store", "invert", "store", "invert"]
    x = torch.randn(3, WIDTH)
    if how == "compiled":
        torch.compile(net, fullgraph=True, backend="aot_eager")(x.requires_grad_())
    else:
        grad(lambda x: net(x).sum())(x)
    with pytest.raises(revnet.ReversibleError, match=f"block {step // 2}, branch {'fg'[step % 2]}"):
        net.check()


def test_layer_dropout_keeps_the_executions_of_the_steps_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from revnet._compiled import function as _traced

    rebuilt: list[str] = []
    evaluation = _traced._Evaluation
    monkeypatch.setattr(
        _traced,
        "_Evaluation",
        lambda part, *rest: (rebuilt.append(part.name), evaluation(part, *rest))[1],
    )
    net = revnet.ReversibleSequence(pairs_of(cases.Mlp, 8), layer_dropout=0.5)
    net.execution = ["store", "invert"] * 8
    grad(lambda x: net(x).sum())(tokens().detach())
    assert 0 < len(rebuilt) < 8
    assert all(name.endswith("branch g") for name in rebuilt)


MIXES: dict[str, Sequence[str]] = {
    "the last stored": ["invert"] * 4 + ["store"] * 2,
    "the first stored": ["store"] * 2 + ["invert"] * 4,
    "in turn": ["store", "invert"] * 3,
    "others": ["store", "select", "store", "checkpoint", "store", "offload"],
}


@pytest.mark.slow
def test_the_peak_falls_with_the_steps_that_are_rebuilt() -> None:
    mixes = [["invert"] * count + ["store"] * (6 - count) for count in range(0, 7, 2)]
    peaks = [compiled_peak(3, "aot_eager", cases.Mlp, execution=mix) for mix in mixes]
    # The last step is kept or rebuilt for the same peak.
    falls = [less - more for more, less in itertools.pairwise(peaks)]
    assert max(falls) <= 0.01 * peaks[0], peaks
    assert peaks[-1] < 0.5 * peaks[0]


def as_inductor_divides(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
    """In place of its code: what inductor would compile, run as it is."""
    return make_boxed_func(graph)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_rebuilt_sequence_keeps_its_streams_and_nothing_else(depth: int) -> None:
    """Not what its last step saves either: of many sequences in a row, each would keep that."""
    net = revnet.ReversibleSequence(
        [(cases.Mlp(WIDTH), cases.Mlp(WIDTH)) for _ in range(depth)], streams="float"
    )
    run = torch.compile(
        net, fullgraph=True, backend=partial(compile_fx, inner_compile=as_inductor_divides)
    )
    x = torch.randn(2, 64, WIDTH, requires_grad=True)
    run(x).sum().backward()
    net.zero_grad()
    assert revnet.measure_memory(run, x).saved_bytes == 2 * x.numel() * x.element_size()


def test_equal_parts_of_a_network_share_what_is_compiled() -> None:
    pairs = pairs_of(cases.Mlp, 6)
    whole = revnet.ReversibleSequence(pairs, streams="float", execution="store")
    parts = [
        revnet.ReversibleSequence(pairs[start : start + 2], streams="float") for start in (0, 2, 4)
    ]
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs)
    def run(part: revnet.ReversibleSequence, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1, y2 = part.run(x1, x2)
        return y1, y2

    def network(x: Tensor) -> Tensor:
        # Two tensors: one that is given twice makes a graph of its own.
        x1, x2 = x, x.clone()
        for part in parts:
            x1, x2 = run(part, x1, x2)
        return (x1 + x2) / 2

    x = tokens()
    expected = torch.autograd.grad(oracle.weighted(whole(x)), [x, *whole.parameters()])
    for execution, count in (("invert", 1), ("store", 2)):
        parts[-1].execution = execution
        found = torch.autograd.grad(oracle.weighted(network(x)), [x, *whole.parameters()])
        for actual, wanted in zip(found, expected, strict=True):
            oracle.assert_near(actual, wanted, tolerance=TOLERANCE["float"])
        assert graphs.frame_count == count


@cache
def products(streams: str, *execution: str) -> tuple[int, int]:
    """Matrix products in the two graphs of a network of three blocks."""
    found: list[int] = []

    def inner(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        found.append(
            sum(node.target in (torch.ops.aten.mm.default, ADDMM) for node in graph.graph.nodes)
        )
        return as_inductor_divides(graph, inputs)

    torch._dynamo.reset()
    net = revnet.ReversibleSequence(
        [(cases.Mlp(WIDTH), cases.Mlp(WIDTH)) for _ in range(3)], streams=streams
    )
    net.execution = execution
    run = torch.compile(net, fullgraph=True, backend=partial(compile_fx, inner_compile=inner))
    run(torch.randn(2, 6, WIDTH, requires_grad=True)).sum().backward()
    forward, backward = found
    return forward, backward


@pytest.mark.parametrize(("name", "streams"), list(zip(MIXES, ["float", "fixed"] * 2, strict=True)))
def test_every_step_that_is_rebuilt_is_evaluated_once_more(name: str, streams: str) -> None:
    """Also where inductor sees that a branch is given what it was given in forward, and would keep
    the result.
    """
    (forward, backward), (all_forward, stored) = (
        products(streams, *mix) for mix in (MIXES[name], ["store"] * 6)
    )
    # What would only undo the first step of a run is not evaluated.
    runs = [list(run) for kept, run in itertools.groupby(MIXES[name], "store".__eq__) if not kept]
    assert backward - stored == sum(2 * len(run) - 1 for run in runs)
    assert forward == all_forward == 12
