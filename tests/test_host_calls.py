"""How many Python calls of the library a step costs the host, where kernels are small."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnet
from revnet._couplings import ADDITIVE
from revnet._state.branch import attributes_of
from revnet._state.structure import Memory
from revnet._step import BoundStep

WIDTH = 8
ROOT = os.path.dirname(revnet.__file__)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def calls_of_a_pass(blocks: int, streams: Any, execution: Any = "invert") -> int:
    """Return how many functions of the library one forward pass calls, once it has settled."""
    pairs = [(linear(), linear()) for _ in range(blocks)]
    net = revnet.ReversibleSequence(pairs, streams=streams, execution=execution)
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    # The range monitor samples the first, second and fourth call.
    for _ in range(4):
        net(x)
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        # Comprehensions are functions until Python 3.11.
        inlined = frame.f_code.co_name in ("<listcomp>", "<dictcomp>", "<setcomp>")
        count += event == "call" and not inlined and frame.f_code.co_filename.startswith(ROOT)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        net(x)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    ("streams", "execution", "most"),
    [("float", "invert", 23), ("fixed", "invert", 31), ("float", "store", 4)],
)
def test_calls_of_a_forward_step(streams: str, execution: Any, most: int) -> None:
    steps = 2 * (6 - 2)
    more = calls_of_a_pass(6, streams, execution) - calls_of_a_pass(2, streams, execution)
    assert more / steps <= most


# The steps of a call are those of the call before while nothing has changed that decides them


def test_a_branch_that_was_replaced_is_called() -> None:
    net = revnet.ReversibleSequence([(linear(), linear()) for _ in range(3)])
    x = torch.randn(2, WIDTH)
    net(x)
    net.blocks[1].g = other = linear()
    twin = revnet.ReversibleSequence([(block.f, block.g) for block in net.blocks])
    assert twin.blocks[1].g is other
    assert torch.equal(net(x), twin(x))
    net.blocks[0], net.blocks[2] = net.blocks[2], net.blocks[0]
    twin = revnet.ReversibleSequence([(block.f, block.g) for block in net.blocks])
    assert torch.equal(net(x), twin(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return self.linear(x) * by


def test_what_is_put_where_nothing_was_is_seen_by_replays() -> None:
    net = revnet.ReversibleSequence([(linear(), linear()) for _ in range(2)], streams="fixed")
    x = torch.randn(2, WIDTH, requires_grad=True)
    net(x)
    branch: Any = net.blocks[0].f

    def gradient(take_away: bool) -> Tensor:
        handle = branch.register_forward_hook(lambda module, args, out: 3 * out)
        branch.register_buffer("extra", torch.ones(1))
        loss = net(x).square().sum()
        if take_away:
            handle.remove()
            del branch.extra
        return torch.autograd.grad(loss, x)[0]

    changed = gradient(take_away=True)
    assert torch.equal(changed, gradient(take_away=False))


class Scales(nn.Module):
    """Scales by an attribute where it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()
        self.scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        scale = getattr(self, "scale", 2.0)
        return self.linear(x) if scale is None else self.linear(x * scale)


def test_an_attribute_that_was_nothing_is_missed_by_replays() -> None:
    pairs = [(Scales(), linear()) for _ in range(2)]
    x = torch.randn(2, WIDTH, requires_grad=True)
    found = []
    for execution in ("store", "invert"):
        net = revnet.ReversibleSequence(copy.deepcopy(pairs), execution=execution)
        loss = net(x).square().sum()
        for block in net.blocks:
            # Another attribute in its place: the module has as many as before.
            del block.f.scale
            block.f.other = 1
        found.append(torch.autograd.grad(loss, [x, *net.parameters()]))
        assert not hasattr(net.blocks[0].f, "scale")
        assert net.blocks[0].f.other == 1
    torch.testing.assert_close(*found)


class Holder(nn.Module):
    """Has a layer, or none, under a name that may change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()
        self.layer: nn.Module | None = None
        self.register_parameter("weight", None)


@pytest.mark.parametrize("name", ["layer", "weight"])
def test_layers_are_found_in_the_place_of_nothing(name: str) -> None:
    net = revnet.ReversibleSequence([(Holder(), linear())])
    memory = Memory()
    assert memory.layers(net).kinds == ()
    delattr(net.blocks[0].f, name)
    # Each table is as long as it was.
    if name == "layer":
        net.blocks[0].f.other = nn.Conv1d(WIDTH, WIDTH, 1)
    else:
        net.blocks[0].f.other = nn.Parameter(torch.randn(WIDTH, WIDTH, 1))
    assert memory.layers(net).kinds == ("conv",)


def test_an_attribute_in_the_place_of_nothing_is_found() -> None:
    scales = Scales()
    assert attributes_of(scales)[0]["scale"] is None
    del scales.scale
    scales.other = 1
    assert attributes_of(scales)[0] == {"training": True, "other": 1}


def test_keywords_of_one_call_are_not_those_of_the_next() -> None:
    net = revnet.ReversibleSequence([(Scaled(), Scaled()) for _ in range(2)])
    x = torch.randn(2, WIDTH)
    plain = net(x)
    net.args_route["by"] = (True, False)
    assert not torch.equal(net(x, by=3.0), plain)
    del net.args_route["by"]
    assert torch.equal(net(x), plain)

    def put_in(block: nn.Module, args: tuple[Any, ...]) -> None:
        args[2]["by"] = 3.0

    handle = net.blocks[0].register_forward_pre_hook(put_in)
    hooked = net(x)
    assert not torch.equal(hooked, plain)
    handle.remove()
    assert torch.equal(net(x), plain)


def test_keywords_that_a_hook_puts_in_are_those_of_one_call() -> None:
    # While a hook of a call runs another call may, as in a second thread.
    net = revnet.ReversibleSequence([(Scaled(), Scaled()) for _ in range(2)])
    x = torch.randn(2, WIDTH)
    inner: list[Tensor] = []
    depth = 0

    def call_again(block: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            inner.append(net(x))
        else:
            args[2]["by"] = 3.0

    plain = net(x)
    net.blocks[0].register_forward_pre_hook(call_again)
    assert torch.equal(net(x), plain)
    assert not torch.equal(inner[0], plain)


def test_a_thread_finds_steps_and_their_branches_together() -> None:
    branches = [linear(), linear()]
    steps = [[(0, BoundStep("", branch, ADDITIVE, 0, (1,), {}))] for branch in branches]
    found: list[Any] = []

    class Watched(Memory):
        """Look up steps after each assignment, as another thread may."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if found:
                found.append(self.steps(branches[1:]))

    memory = Watched()
    memory.keep_steps(branches[:1], steps[0])
    found.append(None)
    memory.keep_steps(branches[1:], steps[1])
    assert found[-1] == steps[1]
    assert all(each is None or each == steps[1] for each in found)


def test_a_copy_calls_its_own_branches() -> None:
    net = revnet.ReversibleSequence([(linear(), linear()) for _ in range(2)])
    x = torch.randn(2, WIDTH)
    before = net(x)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), before)
    assert torch.equal(net(x), x)


def test_what_is_set_between_calls_takes_effect() -> None:
    net = revnet.ReversibleSequence([(linear(), linear()) for _ in range(2)])
    x = torch.randn(4, WIDTH)
    net(x)
    seen: list[int] = []
    net.blocks[0].g.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    net.tile = {"g": revnet.Tile(2, dim=0)}
    net(x)
    assert seen == [2, 2]
    net.tile = {}
    net(x)
    assert seen == [2, 2, 4]
