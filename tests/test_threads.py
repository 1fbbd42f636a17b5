"""Backward passes that run at the same time, in threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch

from cases import Case, Mlp, build, named, randn, with_dropout
from oracle import assert_same_gradients, stored_copy, weighted
from revnet import ReversibleSequence

THREADED = named(
    "mlp-L8",
    "mlp-L8-dropout",
    "attention-L8-dropout",
    "shared-L4-dropout",
    "convolution-L3-batchnorm",
)


def in_threads(jobs: list[Callable[[], None]]) -> None:
    """Runs the jobs at once, and raises the first error of any."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        barrier.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a backward pass waits for ever"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_backwards_of_different_calls(case: Case):
    pairs = case.pairs()
    net, oracle = (
        ReversibleSequence(pairs, case.route, **case.options),
        stored_copy(pairs, case.route, **case.options),
    )
    losses, leaves, wanted = [], [], []
    for module in (oracle, net):
        torch.manual_seed(0)
        for seed in range(4):
            x = case.input(seed=seed)
            loss = weighted(module(x))
            if module is oracle:
                wanted.append(torch.autograd.grad(loss, [x, *oracle.parameters()]))
            else:
                losses.append(loss)
                leaves.append([x, *net.parameters()])
    for _ in range(3):
        found: list = [None] * len(losses)

        def job(i: int, found: list = found) -> None:
            found[i] = torch.autograd.grad(losses[i], leaves[i], retain_graph=True)

        in_threads([lambda i=i, job=job: job(i) for i in range(len(losses))])
        for actual, expected in zip(found, wanted, strict=True):
            assert_same_gradients(dict(enumerate(actual)), dict(enumerate(expected)))


@pytest.mark.parametrize(
    "case", named("mlp-L8", "mlp-L8-dropout", "convolution-L3-batchnorm"), ids=str
)
def test_backwards_of_one_call(case: Case):
    pairs = case.pairs()
    net, oracle = (
        ReversibleSequence(pairs, case.route, **case.options),
        stored_copy(pairs, case.route, **case.options),
    )
    x, expected = case.input(), case.input()
    torch.manual_seed(0)
    wanted = torch.autograd.grad(weighted(oracle(expected)), [expected, *oracle.parameters()])
    torch.manual_seed(0)
    loss = weighted(net(x))
    for _ in range(3):
        found: list = [None] * 4

        def job(i: int, found: list = found) -> None:
            found[i] = torch.autograd.grad(loss, [x, *net.parameters()], retain_graph=True)

        in_threads([lambda i=i, job=job: job(i) for i in range(4)])
        for actual in found:
            assert_same_gradients(dict(enumerate(actual)), dict(enumerate(wanted)))


@pytest.mark.parametrize("case", named("mlp-L8-dropout", "convolution-L3-batchnorm"), ids=str)
def test_concurrent_backwards_leave_the_modules_alone(case: Case):
    """Replays set training flags and buffers back for a moment; together they must not leave them
    so.
    """
    net = ReversibleSequence(case.pairs(), case.route, **case.options)
    losses = [weighted(net(case.input(seed=seed))) for seed in range(4)]
    net.eval()
    before = {name: (buffer, buffer.clone()) for name, buffer in net.named_buffers()}
    for _ in range(5):
        in_threads([lambda loss=loss: loss.backward(retain_graph=True) for loss in losses])
        assert not any(module.training for module in net.modules())
        for name, buffer in net.named_buffers():
            assert buffer is before[name][0], name
            assert torch.equal(buffer, before[name][1]), name


def test_whole_steps_of_different_networks():
    networks = [build([(Mlp, Mlp)] * 4, 8, seed=seed) for seed in range(4)]
    oracles = [stored_copy(pairs) for pairs in networks]
    nets = [ReversibleSequence(pairs) for pairs in networks]
    wanted = []
    for oracle in oracles:
        weighted(oracle(randn(2, 6, 8))).backward()
        wanted.append([p.grad for p in oracle.parameters()])

    def job(i: int) -> None:
        for _ in range(5):
            nets[i].zero_grad()
            weighted(nets[i](randn(2, 6, 8))).backward()

    in_threads([lambda i=i: job(i) for i in range(4)])
    for net, expected in zip(nets, wanted, strict=True):
        assert_same_gradients(
            dict(enumerate(p.grad for p in net.parameters())), dict(enumerate(expected))
        )


def test_forward_in_one_thread_and_backward_in_another():
    pairs = build([(with_dropout(Mlp), Mlp)] * 4, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    torch.manual_seed(0)
    weighted(oracle(randn(2, 6, 8))).backward()
    torch.manual_seed(0)
    losses: list[torch.Tensor] = []
    in_threads([lambda: losses.append(weighted(net(randn(2, 6, 8))))])
    in_threads([lambda: losses[0].backward()])
    assert_same_gradients(
        dict(enumerate(p.grad for p in net.parameters())),
        dict(enumerate(p.grad for p in oracle.parameters())),
    )


def test_tiles_in_several_threads_leave_the_parameters():
    """Each thread's gradients are right, to the rounding of a sum in bfloat16."""
    torch.manual_seed(0)
    pairs = [(torch.nn.Linear(8, 8), Mlp(8)) for _ in range(2)]
    net = ReversibleSequence(pairs, tile={"g": 4}, streams="fixed").bfloat16()
    parameters = list(net.parameters())
    xs = [randn(1, 18, 8, seed=seed).bfloat16() for seed in range(3)]

    def gradients(x: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(net(x).float().square().sum(), parameters))

    expected = [gradients(x) for x in xs]

    def job(x: torch.Tensor, wanted: list[torch.Tensor]) -> None:
        for _ in range(5):
            for found, gradient in zip(gradients(x), wanted, strict=True):
                assert (found - gradient).norm() <= 0.02 * gradient.norm()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        in_threads([partial(job, *each) for each in zip(xs, expected, strict=True)])
    finally:
        sys.setswitchinterval(before)
    held = [parameter for module in net.modules() for parameter in module._parameters.values()]
    assert {type(parameter) for parameter in held} == {torch.nn.Parameter}
