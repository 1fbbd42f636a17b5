"""Stochastic depth: blocks are really skipped, and backward skips the same ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import Linear, Mlp, build, randn, with_dropout
from distributed import run_ranks
from oracle import (
    Evaluations,
    StoredSequence,
    assert_near,
    assert_same_gradients,
    gradients_of,
    stored_copy,
    weighted,
)
from revnet import ReversibleSequence, SequentialSequence, measure_memory


def kept(evaluated: list[str]) -> list[int]:
    """Returns the blocks that ran, after a check that each ran whole: f, then g."""
    assert evaluated[1::2] == [name.replace("f", "g") for name in evaluated[::2]]
    return [int(name.split(".")[0]) for name in evaluated[::2]]


@pytest.mark.parametrize("execution", ["invert", "store"])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_the_backward_sees_the_blocks_that_the_forward_kept(rate: float, execution: str):
    pairs = build([(Mlp, Mlp)] * 8, 8)
    net, oracle = (
        ReversibleSequence(pairs, layer_dropout=rate, execution=execution),
        stored_copy(pairs),
    )
    counted = Evaluations(net)
    chosen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        net.zero_grad()
        oracle.zero_grad()
        x, expected = (randn(2, 6, 8, requires_grad=True) for _ in range(2))
        out = net(x)
        blocks = kept(counted.take())
        chosen.add(tuple(blocks))
        if not out.grad_fn or not blocks:
            continue
        wanted = oracle(expected, kept=blocks)
        assert_near(out, wanted)
        weighted(out).backward()
        weighted(wanted).backward()
        assert set(counted.take()) <= {f"{block}.{branch}" for block in blocks for branch in "fg"}
        assert_near(x.grad, expected.grad)
        assert_same_gradients(gradients_of(net), gradients_of(oracle))
    assert len(chosen) > 3


def test_two_forwards_with_different_choices_before_one_backward():
    pairs = build([(Mlp, Mlp)] * 6, 8)
    net, oracle = ReversibleSequence(pairs, layer_dropout=0.5), stored_copy(pairs)
    counted = Evaluations(net)
    x, expected = randn(2, 6, 8, requires_grad=True), randn(2, 6, 8, requires_grad=True)
    losses, wanted = [], []
    choices = []
    for _ in range(3):
        losses.append(weighted(net(x)))
        choices.append(kept(counted.take()))
        wanted.append(weighted(oracle(expected, kept=choices[-1])))
    sum(losses).backward()
    sum(wanted).backward()
    assert len({tuple(choice) for choice in choices}) > 1
    assert_near(x.grad, expected.grad)
    assert_same_gradients(gradients_of(net), gradients_of(oracle))


def test_with_dropout_inside_the_branches():
    """The masks are drawn while the choice of blocks is under way; both must come back in
    backward.
    """

    class Masked(Linear):
        """Dropout by a mask that it also leaves behind for the oracle."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mask = given.pop(0) if given else torch.bernoulli(torch.full_like(x, 0.5))
            masks.append(self.mask)
            return super().forward(x).tanh() * self.mask

    given: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    pairs = build([(Masked, Masked)] * 6, 8)
    net, oracle = ReversibleSequence(pairs, layer_dropout=0.4), stored_copy(pairs)
    counted = Evaluations(net)
    x, expected = randn(2, 6, 8, requires_grad=True), randn(2, 6, 8, requires_grad=True)
    loss = weighted(net(x))
    blocks = kept(counted.take())
    given = [mask.clone() for mask in masks]
    wanted = weighted(oracle(expected, kept=blocks))
    assert given == []
    assert 0 < len(blocks) < 6
    loss.backward()
    wanted.backward()
    assert_near(x.grad, expected.grad)
    assert_same_gradients(gradients_of(net), gradients_of(oracle))


def test_skipped_blocks_get_no_gradient():
    net = ReversibleSequence(build([(Linear, Linear)] * 12, 8), layer_dropout=0.5)
    counted = Evaluations(net)
    loss = weighted(net(randn(2, 8, requires_grad=True)))
    blocks = set(kept(counted.take()))
    loss.backward()
    assert {i for i, block in enumerate(net.blocks) if block.f.weight.grad is not None} == blocks
    assert 0 < len(blocks) < 12


def _layers_run(net: nn.Module) -> list[int]:
    ran: list[int] = []
    for i, (f, g) in enumerate(
        net.layers if hasattr(net, "layers") else ((b.f, b.g) for b in net.blocks)
    ):
        f.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        g.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    return ran


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_each_block_is_skipped_with_the_given_probability(sequence: type, rate: float):
    depth, calls = 20, 100
    net = sequence(build([(Linear, Linear)] * depth, 2), layer_dropout=rate)
    ran = _layers_run(net)
    with torch.no_grad():
        for _ in range(calls):
            net(randn(1, 2))
    total = depth * calls
    deviation = (total * rate * (1 - rate)) ** 0.5
    assert abs(total - len(ran) / 2 - total * rate) < 4 * deviation
    per_block = [calls - ran.count(i) / 2 for i in range(depth)]
    assert all(
        abs(skipped - calls * rate) < 5 * (calls * rate * (1 - rate)) ** 0.5
        for skipped in per_block
    )


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
def test_in_eval_mode_and_without_a_rate_nothing_is_skipped(sequence: type):
    pairs = build([(Linear, Linear)] * 6, 8)
    x = randn(2, 8)
    plain = sequence(pairs)
    dropping = sequence(pairs, layer_dropout=0.9)
    ran = _layers_run(plain)
    assert torch.equal(dropping.eval()(x), plain(x))
    assert sorted(ran) == sorted(list(range(6)) * 4)


def test_the_sequential_twin_skips_whole_layers_and_gets_the_gradient_of_the_rest():
    pairs = build([(Mlp, Mlp)] * 6, 8)
    net = SequentialSequence(pairs, layer_dropout=0.5)
    ran = _layers_run(net)
    x, expected = randn(2, 6, 8, requires_grad=True), randn(2, 6, 8, requires_grad=True)
    loss = weighted(net(x))
    blocks = sorted(set(ran))
    assert 0 < len(blocks) < 6
    assert ran == [i for i in blocks for _ in range(2)]
    out = expected
    for i in blocks:
        out = out + pairs[i][0](out)
        out = out + pairs[i][1](out)
    assert_near(torch.autograd.grad(loss, x)[0], torch.autograd.grad(weighted(out), expected)[0])


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
def test_the_choice_follows_the_global_seed(sequence: type):
    net = sequence(build([(Linear, Linear)] * 20, 2), layer_dropout=0.5)
    ran = _layers_run(net)
    choices = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            net(randn(1, 2))
        choices.append(tuple(ran))
        ran.clear()
    assert choices[0] == choices[1] != choices[2]


def test_backward_leaves_the_generator_alone():
    net = ReversibleSequence(build([(with_dropout(Mlp), Mlp)] * 6, 8), layer_dropout=0.5)
    for _ in range(4):
        loss = weighted(net(randn(2, 6, 8, requires_grad=True)))
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)


def test_skipped_blocks_keep_nothing():
    x = randn(2, 6, 8, requires_grad=True)
    net = ReversibleSequence(build([(Mlp, Mlp)] * 16, 8), layer_dropout=0.5, merge="sum")
    for _ in range(4):
        assert measure_memory(lambda: net(x)).saved_bytes == 2 * x.nbytes


def _ranks_draw_alike(rank: int, world_size: int) -> None:
    from torch.distributed import all_gather_object, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    for wrap in ("ddp", "fsdp2"):
        pairs = build([(Linear, Linear)] * 8, 8)
        net = ReversibleSequence(pairs, layer_dropout=0.5)
        oracle: StoredSequence = stored_copy(pairs)
        counted = Evaluations(net)
        if wrap == "ddp":
            model: nn.Module = DistributedDataParallel(net, find_unused_parameters=True)
        else:
            mesh = init_device_mesh("cpu", (world_size,))
            for block in net.blocks:
                fully_shard(block, mesh=mesh)
            model = fully_shard(net, mesh=mesh)
        chosen = set()
        for step in range(4):
            net.zero_grad()
            oracle.zero_grad()
            # Data loading and augmentation draw differently on each rank, and more and more so.
            torch.manual_seed(1000 * rank + step)
            torch.rand(rank)
            xs = [randn(2, 8, seed=10 * step + r) for r in range(world_size)]
            out = model(xs[rank])
            blocks = kept(counted.take())
            everyone: list = [None] * world_size
            all_gather_object(everyone, blocks)
            assert everyone == [blocks] * world_size, everyone
            chosen.add(tuple(blocks))
            if blocks:
                weighted(out).backward()
                counted.take()
                (sum(weighted(oracle(x, kept=blocks)) for x in xs) / world_size).backward()
                for (name, p), q in zip(net.named_parameters(), oracle.parameters(), strict=True):
                    grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                    if int(name.split(".")[1]) in blocks:
                        assert_near(grad, q.grad, f"{wrap} {name}")
                    else:
                        assert grad is None or not grad.any(), f"{wrap} {name}"
        assert len(chosen) > 1


def test_all_ranks_draw_alike():
    run_ranks(_ranks_draw_alike, 2)
