"""A sequence is a sequence: length, iteration, indices and slices that share blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import Gate, Linear, Mlp, build, randn
from oracle import assert_near, assert_same_step, stored_copy, train_step, weighted
from revnet import (
    Fixed,
    Reversible,
    ReversibleBlock,
    ReversibleSequence,
    SequentialSequence,
    Step,
    plan,
)

DEPTH = 5
SLICES = [slice(None), slice(1, 3), slice(-2, None), slice(None, None, 2), slice(None, None, -1)]


def pairs(depth: int = DEPTH) -> list[Any]:
    return build([(Mlp, Gate)] * depth, 8)


def program(depth: int = DEPTH, **options: Any) -> Reversible:
    fns = [f for pair in pairs() for f in pair][:depth]
    shared = Step(fns[0])
    steps = [shared, *(Step(f, i % 2, (i + 1) % 2) for i, f in enumerate(fns[1:], 1)), shared]
    return Reversible(steps, **options)


@pytest.mark.parametrize("kind", [ReversibleSequence, SequentialSequence])
def test_blocks_are_counted_indexed_and_iterated(kind: Any):
    net = kind(pairs())
    held = net.blocks if kind is ReversibleSequence else net.layers
    assert len(net) == DEPTH
    assert list(net) == list(held)
    assert [net[i] for i in range(-DEPTH, DEPTH)] == [*held, *held]
    f, g = (net[1].f, net[1].g) if kind is ReversibleSequence else net[1]
    assert [(f, g)] == [tuple(branches) for branches in kind(net)[1:2]._branches]
    for index in (DEPTH, -DEPTH - 1):
        with pytest.raises(IndexError):
            net[index]
    with pytest.raises(ValueError, match="this slice of 5 is empty"):
        net[3:3]


def test_steps_are_counted_indexed_and_iterated():
    net = program()
    assert len(net) == DEPTH + 1
    assert net[0] is net[-1]
    assert list(net) == [net[i] for i in range(DEPTH + 1)]
    assert [step.fn for step in net[1:]] == [step.fn for step in list(net)[1:]]


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "store"])
@pytest.mark.parametrize("chosen", SLICES, ids=str)
def test_a_slice_of_a_reversible_sequence_trains(chosen: slice, execution: str):
    options = {"split": "chunk", "merge": "concat"}
    made = build([(Mlp, Linear)] * DEPTH, 4)
    part = ReversibleSequence(made, execution=execution, **options)[chosen]
    assert type(part) is ReversibleSequence
    x = randn(2, 6, 8, requires_grad=True)
    assert_same_step(train_step(part, x), train_step(stored_copy(made[chosen], **options), x))


@pytest.mark.parametrize("chosen", SLICES, ids=str)
def test_a_slice_of_a_sequential_sequence_trains(chosen: slice):
    made = pairs()
    x = randn(2, 6, 8, requires_grad=True)
    found = train_step(SequentialSequence(made, execution="checkpoint")[chosen], x)
    y = x.detach().requires_grad_()
    expected = y
    for f, g in made[chosen]:
        expected = expected + f(expected)
        expected = expected + g(expected)
    assert_near(found.output, expected)
    weighted(expected).backward()
    assert_near(found.gradients["x"], y.grad)


@pytest.mark.parametrize("chosen", SLICES, ids=str)
def test_a_slice_of_a_program_runs_and_shares_weights(chosen: slice):
    net = program()
    part = net[chosen]
    x = list(randn(2, 3, 8))
    expected = list(x)
    for step in list(net)[chosen]:
        expected[step.target] = expected[step.target] + step.fn(expected[step.source[0]])
    for found, right in zip(part(*x), expected, strict=True):
        assert_near(found, right)
    assert {*map(id, part.parameters())} <= {*map(id, net.parameters())}
    if chosen == slice(None):
        assert list(part.state_dict()) == list(net.state_dict())


def test_a_cut_sequence_computes_and_remembers_what_the_whole_does():
    net = ReversibleSequence(pairs(), streams="fixed")
    x = torch.randn(2, 6, 8, dtype=torch.float32)
    net.float()
    first, second = net[:2], net[2:]
    assert torch.equal(second.run(*first.run(x, x))[0], second.run(*net[:2].run(x, x))[0])
    y1, y2 = second.run(*first.run(x, x))
    x1, x2 = first.inverse(*second.inverse(y1, y2))
    assert_near(x1, x, tolerance=1e-5)
    assert_near(x2, x, tolerance=1e-5)


def test_routes_and_executions_are_sliced():
    executions = ["store", "invert"] * 2 + ["checkpoint"] * (2 * DEPTH - 4)
    route = {"scale": tuple((i == 1, False) for i in range(DEPTH)), "all": (True, True)}
    net = ReversibleSequence(pairs(), route, execution=executions, determinism_check="none")
    part = net[1:4]
    assert part.execution == [*executions[2:8]]
    assert part.args_route == {"scale": route["scale"][1:4], "all": (True, True)}
    assert part._settings.options is net._settings.options
    assert net[::2].args_route["scale"] == ((False, False),) * 3
    steps = program(args_route={"c": [i % 2 for i in range(DEPTH + 1)], "d": True})
    assert steps[1:3].args_route == {"c": (1, 0), "d": True}
    two = Reversible(list(steps)[:2], args_route={"c": (True, False)})
    assert two[1:].args_route == {"c": (False,)}
    assert ReversibleSequence(pairs(), "signature")[:2].args_route == "signature"


def test_a_plan_becomes_a_list_of_executions():
    net = ReversibleSequence(pairs()).float()
    net.execution = plan(net, torch.randn(2, 6, 8), "50%")
    names = [execution.name for execution in net._executions]
    assert net[1:3].execution == names[2:6]


def test_settings_of_slice_and_whole_are_apart():
    net = ReversibleSequence(pairs())
    part = net[1:3]
    part.execution, part.streams = "store", Fixed(20)
    part.args_route["mask"] = (True, False)
    part.eval()
    assert (net.execution, net.streams, net.args_route) == ("invert", "auto", {})
    net.execution, net.streams = "checkpoint", "float"
    assert (part.execution, part.streams) == ("store", Fixed(20))
    # A block that is called alone does what the whole sequence would have it do.
    assert [execution.name for execution in part[0]._executions] == ["checkpoint"] * 2
    assert part[0] is net[1]


def test_hooks_of_the_whole_stay_there_and_those_of_blocks_run():
    net, seen = ReversibleSequence(pairs()), []
    net.register_forward_hook(lambda *_: seen.append("whole"))
    net[1].register_forward_hook(lambda *_: seen.append("block"))
    x = randn(2, 6, 8, requires_grad=True)
    net[:2](x).sum().backward()
    assert seen == ["block"]


class Checkpointed(ReversibleBlock):
    """As torch's wrappers do: runs the block again in backward."""

    def forward(self, *args: Any) -> Any:
        return checkpoint(super().forward, *args, use_reentrant=False)


def test_a_wrapped_block_of_a_slice_is_run_again_as_the_slice_holds_its_streams():
    net = ReversibleSequence(pairs(3)).float()
    for block in net:
        block.__class__ = Checkpointed
    part = net[1:]
    part.streams = Fixed(6)  # Coarse enough to be told from floats.
    x = torch.randn(2, 6, 8, requires_grad=True)
    part(x).square().sum().backward()
    found, x.grad = x.grad, None
    for block in net:
        block.__class__ = ReversibleBlock
    part.execution = "store"
    part(x).square().sum().backward()
    assert torch.equal(found, x.grad)


def test_slices_of_a_subclass_need_not_know_its_constructor():
    class Net(ReversibleSequence):
        def __init__(self) -> None:
            super().__init__(pairs(), layer_dropout=0.5, merge="sum")
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(super().forward(x))

    part = Net().eval()[1:]
    assert (part.layer_dropout, part.merge, part.training) == (0.5, "sum", False)
    assert not hasattr(part, "head")


# --- state dicts of the two kinds of sequences


@pytest.mark.parametrize("prefix", ["", "body."])
@pytest.mark.parametrize(
    "kinds", [(ReversibleSequence, SequentialSequence), (SequentialSequence, ReversibleSequence)]
)
def test_sequences_of_both_kinds_load_one_another(kinds: Any, prefix: str):
    given, taken = kinds
    one, other = given(pairs()), taken(build([(Mlp, Gate)] * DEPTH, 8, seed=3))
    state = one.state_dict(prefix=prefix)
    before = list(state)
    root: Any = nn.ModuleDict({"body": other}) if prefix else other
    root.load_state_dict(state, strict=True)
    assert list(state) == before
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert next(iter(other[1:].state_dict())).endswith("norm.weight")
    other[1:].load_state_dict(one[1:].state_dict(), strict=True)


def test_a_sequential_sequence_takes_wrapped_branches_of_a_reversible_one():
    one = ReversibleSequence(pairs())
    wrapped = {
        key.replace(".f.", ".f.net.").replace(".g.", ".g.net."): value
        for key, value in one.state_dict().items()
    }
    other = SequentialSequence(build([(Mlp, Gate)] * DEPTH, 8, seed=3))
    other.load_state_dict(wrapped, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_is_wrong_in_a_state_dict_of_the_other_kind_is_still_reported():
    state = SequentialSequence(pairs()).state_dict()
    del state["layers.1.0.norm.weight"]
    net = ReversibleSequence(pairs())
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.f\.norm\.weight"):
        net.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.2\.weight"):
        net.load_state_dict({**net.state_dict(), "layers.0.2.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.0\.weight"):
        net.load_state_dict({**net.state_dict(), "layers.0.0.weight": torch.ones(1)})
