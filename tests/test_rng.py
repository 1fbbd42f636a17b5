"""Randomness: the replay draws what the forward drew, and the global generator never notices."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import Case, Linear, Mlp, build, named, randn, with_dropout
from oracle import (
    Results,
    assert_alike,
    assert_same_step,
    stored_copy,
    train_step,
    weighted,
)
from revnet import Deterministic, Momentum, ReversibleSequence

DRAWING = named("mlp-L8-dropout", "attention-L8-dropout", "shared-L4-dropout", "mixed-L6")


def _draw() -> None:
    torch.rand(7)


def _seed() -> None:
    torch.manual_seed(99)


@pytest.mark.parametrize("case", DRAWING, ids=str)
@pytest.mark.parametrize("between", [_draw, _seed, torch.seed], ids=["draw", "seed", "new-seed"])
def test_the_user_may_draw_or_seed_between_forward_and_backward(case: Case, between: object):
    pairs = case.pairs()
    net, oracle = (
        ReversibleSequence(pairs, case.route, **case.options),
        stored_copy(pairs, case.route, **case.options),
    )

    def run(module: nn.Module) -> Results:
        x = case.input()
        loss = weighted(module(x))
        between()
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        return {"x": x.grad}

    assert_alike(net, oracle, run)


class DrawsOtherwise(nn.Module):
    """Draws by functions other than dropout, an uneven number of values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rand(1, dtype=x.dtype)
        noise = torch.randn_like(x) * scale + torch.normal(0.0, 1.0, (x.shape[-1],), dtype=x.dtype)
        chosen = torch.randperm(x.shape[1])[:2]
        out = (self.linear(x) * noise).tanh()
        return out + out[:, chosen].mean(1, keepdim=True) * torch.bernoulli(
            torch.full_like(out, 0.5)
        )


class DrawsSometimes(nn.Module):
    """Whether it draws is itself drawn."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if torch.rand(()).item() < 0.5:
            return F.dropout(self.linear(x), 0.5)
        return self.linear(x).tanh()


@pytest.mark.parametrize("branch", [DrawsOtherwise, DrawsSometimes])
def test_branches_that_draw_in_other_ways(branch: type[nn.Module]):
    pairs = build([(branch, Linear), (branch, branch)] * 3, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    for seed in range(4):
        net.zero_grad()
        oracle.zero_grad()
        x = randn(2, 6, 8, requires_grad=True)
        assert_same_step(train_step(net, x, seed=seed), train_step(oracle, x, seed=seed))


class SeedsItself(Linear):
    """A branch that seeds the global generator for its own draw."""

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return super().forward(F.dropout(x, 0.3))


def test_a_branch_that_seeds_the_global_generator():
    pairs = build([(SeedsItself, with_dropout(Mlp))] * 3, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    x = randn(2, 6, 8, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(oracle, x))


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_hooks_of_blocks_may_draw(register: str):
    net = ReversibleSequence(build([(with_dropout(Mlp), with_dropout(Mlp))] * 3, 8))
    # On one block, so that those around it run nothing beside their steps.
    getattr(net.blocks[1], register)(lambda *_: _draw())
    x = randn(2, 6, 8, requires_grad=True)
    found = train_step(net, x)
    net.zero_grad()
    net.execution = "store"
    assert_same_step(found, train_step(net, x))


def test_without_preserve_rng_state_a_network_that_draws_nothing_is_right():
    case = named("mlp-L8")[0]
    pairs = case.pairs()
    net, oracle = ReversibleSequence(pairs, preserve_rng_state=False), stored_copy(pairs)
    assert_same_step(train_step(net, case.input()), train_step(oracle, case.input()))


def test_without_preserve_rng_state_a_replay_draws_from_the_global_generator():
    case = named("mlp-L8-dropout")[0]
    outcome = train_step(ReversibleSequence(case.pairs(), preserve_rng_state=False), case.input())
    assert not torch.equal(outcome.rng_after_forward, outcome.rng_after_backward)


@pytest.mark.parametrize("word", ["random", "NumPy", "Generator"])
def test_what_is_not_replayed_is_documented(word: str):
    assert word in ReversibleSequence.__doc__


def test_deterministic_repeats_the_recorded_randomness_and_leaves_the_generator_alone():
    net = Deterministic(nn.Dropout(0.5))
    x = torch.ones(64)
    torch.rand(3)
    first = net(x, record_rng=True)
    other = net(x)
    state = torch.get_rng_state()
    for _ in range(2):
        assert torch.equal(net(x, set_rng=True), first)
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(other, first)


def test_deterministic_passes_arguments_and_results_through():
    net = Deterministic(nn.Bilinear(2, 3, 4))
    a, b = torch.randn(5, 2), torch.randn(5, 3)
    assert torch.equal(net(a, input2=b), net.net(a, b))
    assert [name for name, _ in net.named_parameters()] == ["net.weight", "net.bias"]


def test_deterministic_without_a_record_raises():
    with pytest.raises(RuntimeError, match="record_rng"):
        Deterministic(nn.Dropout(0.5))(torch.ones(2), set_rng=True)


class DrawsOnCpu(Linear):
    """Runs on CUDA, but draws from the CPU generator."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(x.shape[-1], dtype=x.dtype).to(x.device)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [with_dropout(Mlp), DrawsOnCpu], ids=["cuda", "cpu-on-cuda"])
def test_both_generators_are_replayed_and_left_alone_on_cuda(branch: object):
    pairs = [(f.cuda(), g.cuda()) for f, g in build([(branch, with_dropout(Mlp))] * 4, 8)]
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)

    def run(module: nn.Module) -> Results:
        x = randn(2, 6, 8).cuda().requires_grad_()
        loss = weighted(module(x))
        after_forward = torch.get_rng_state(), torch.cuda.get_rng_state()
        torch.rand(5, device="cuda")
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        loss.backward()
        after = torch.get_rng_state(), torch.cuda.get_rng_state()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return {"x": x.grad, "cpu": after_forward[0], "cuda": after_forward[1]}

    assert_alike(net, oracle, run)


@pytest.mark.gpu
def test_deterministic_repeats_cuda_randomness():
    net = Deterministic(nn.Dropout(0.5))
    x = torch.ones(64, device="cuda")
    first = net(x, record_rng=True)
    net(x)
    state = torch.cuda.get_rng_state()
    assert torch.equal(net(x, set_rng=True), first)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_hooks_on_all_modules_may_draw() -> None:
    """Also where a step of the library's own adds one stream to another."""
    pairs = [(Linear(8).double(), Linear(8).double()) for _ in range(2)]
    net = ReversibleSequence(pairs, coupling=Momentum(0.5), streams="fixed")
    oracle = copy.deepcopy(net)
    oracle.execution = "store"

    def noise(module: nn.Module, args: object, out: object) -> Tensor | None:
        return out + torch.randn_like(out) if type(out) is Tensor else None

    def run(module: nn.Module) -> Results:
        x = randn(2, 8).requires_grad_()
        hook = torch.nn.modules.module.register_module_forward_hook(noise)
        try:
            weighted(module(x)).backward()
        finally:
            hook.remove()
        return {"x": x.grad}

    assert_alike(net, oracle, run)
