"""Checkpoints: our keys, those of the classes we replace, and what must not be taken for them."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from cases import Linear, Mlp, build, named, randn
from oracle import assert_near, stored_copy
from revnet import Deterministic, ReversibleBlock, ReversibleSequence, SequentialSequence

NORM_KEYS = ["norm.weight", "norm.bias", "enter.weight", "enter.bias", "leave.weight", "leave.bias"]


def test_keys_of_a_reversible_sequence():
    net = ReversibleSequence(build([(Mlp, Linear)] * 2, 8))
    assert list(net.state_dict()) == [
        key
        for i in range(2)
        for key in (
            *(f"blocks.{i}.f.{k}" for k in NORM_KEYS),
            f"blocks.{i}.g.weight",
            f"blocks.{i}.g.bias",
        )
    ]


def test_keys_of_a_sequential_sequence():
    net = SequentialSequence(build([(Linear, Linear)] * 2, 8))
    assert list(net.state_dict()) == [
        f"layers.{i}.{branch}.{name}"
        for i in range(2)
        for branch in (0, 1)
        for name in ("weight", "bias")
    ]


def test_the_two_executions_and_the_two_sequences_hold_the_same_parameters():
    pairs = build([(Mlp, Linear)] * 2, 8)
    invert, store, plain = (
        ReversibleSequence(pairs),
        ReversibleSequence(pairs, execution="store"),
        SequentialSequence(pairs),
    )
    assert list(invert.state_dict()) == list(store.state_dict())
    assert [p.data_ptr() for p in invert.parameters()] == [p.data_ptr() for p in plain.parameters()]


@pytest.mark.parametrize("case", named("mlp-L8", "convolution-L3-batchnorm", "shared-L4"), ids=str)
def test_round_trip(case: object):
    net = ReversibleSequence(case.pairs(), **case.options)
    other = ReversibleSequence(case.pairs(seed=3), **case.options)
    net(case.input())
    other.load_state_dict(net.state_dict(), strict=True)
    for (name, actual), expected in zip(
        other.state_dict().items(), net.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), name
    assert torch.equal(other.eval()(case.input()), net.eval()(case.input()))


class Wrapped(nn.Module):
    """The class layout that is replaced: each branch inside a `net`."""

    def __init__(self, pairs: list) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for f, g in pairs:
            block = nn.Module()
            block.f, block.g = Deterministic(f), Deterministic(g)
            self.blocks.append(block)


class HasNet(nn.Module):
    """A branch that has a `net` of its own, as most transformers' feed-forward layers do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class NetAndMore(HasNet):
    """A `net` and a norm beside it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


class NetOfNet(nn.Module):
    """A `net` whose own child is a `net`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = HasNet(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


BRANCHES = [Linear, Mlp, HasNet, NetAndMore, NetOfNet]


@pytest.mark.parametrize("prefix", ["", "transformer.layers."])
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_checkpoint_of_wrapped_branches_loads_strictly(branch: type[nn.Module], prefix: str):
    pairs = build([(branch, Linear), (branch, branch)], 8)
    old = {prefix + key: value for key, value in Wrapped(pairs).state_dict().items()}
    assert all(".f.net." in key or ".g.net." in key for key in old)
    before = list(old)
    net = ReversibleSequence(build([(branch, Linear), (branch, branch)], 8, seed=3))
    root: nn.Module = net
    if prefix:
        root = nn.ModuleDict({"transformer": nn.ModuleDict({"layers": net})})
    root.load_state_dict(old, strict=True)
    assert list(old) == before
    x = randn(2, 6, 8)
    assert_near(net(x), stored_copy(pairs)(x))
    assert not any(key.startswith(f"{prefix}blocks.0.g.net.") for key in root.state_dict())


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_checkpoint_of_our_own_is_never_unwrapped(branch: type[nn.Module]):
    net = ReversibleSequence(build([(branch, branch)] * 2, 8))
    other = ReversibleSequence(build([(branch, branch)] * 2, 8, seed=3))
    other.load_state_dict(net.state_dict(), strict=True)
    x = randn(2, 6, 8)
    assert torch.equal(net(x), other(x))


def test_a_checkpoint_of_the_sequential_classes_loads_strictly():
    pairs = build([(HasNet, Mlp)] * 2, 8)
    old = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleList(pair) for pair in pairs])}
    ).state_dict()
    net = SequentialSequence(build([(HasNet, Mlp)] * 2, 8, seed=3))
    net.load_state_dict(old, strict=True)
    assert all(torch.equal(value, old[key]) for key, value in net.state_dict().items())


def test_missing_and_unexpected_keys_are_still_reported():
    net = ReversibleSequence(build([(HasNet, Linear)] * 2, 8))
    state = net.state_dict()
    lost = OrderedDict(
        (key, value) for key, value in state.items() if key != "blocks.1.f.net.0.weight"
    )
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.f\.net\.0\.weight"):
        net.load_state_dict(lost)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.f\.other"):
        net.load_state_dict({**state, "blocks.0.f.other": torch.ones(1)})
    result = net.load_state_dict({**lost, "blocks.9.f.weight": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["blocks.1.f.net.0.weight"]
    assert result.unexpected_keys == ["blocks.9.f.weight"]


def test_loading_between_forward_and_backward_raises_as_any_write_in_place_does():
    net = ReversibleSequence(build([(Mlp, Mlp)] * 2, 8))
    loss = net(randn(2, 6, 8, requires_grad=True)).sum()
    net.load_state_dict(ReversibleSequence(build([(Mlp, Mlp)] * 2, 8, seed=3)).state_dict())
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_block_alone_has_the_keys_f_and_g():
    block = ReversibleBlock(*build([(Linear, HasNet)], 8)[0])
    assert {key.split(".")[0] for key in block.state_dict()} == {"f", "g"}
    other = ReversibleBlock(*build([(Linear, HasNet)], 8, seed=3)[0])
    other.load_state_dict(
        {key.replace("f.", "f.net.", 1): value for key, value in block.state_dict().items()}
    )
    assert torch.equal(other.f.weight, block.f.weight)
