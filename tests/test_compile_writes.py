"""A compiled sequence refuses its backward after an in-place write to what its replays read."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnet
from cases import COMPILER_WARNINGS

pytestmark = COMPILER_WARNINGS

WIDTH = 8
_global = torch.ones(WIDTH)


class Branch(nn.Module):
    """Multiplies by a tensor of one kind; holds those of all kinds."""

    def __init__(self, factor: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(WIDTH))
        self.scale = torch.ones(WIDTH)
        self.scales = [torch.ones(WIDTH)]
        self.table = {"scale": (torch.ones(WIDTH),)}

    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        factor = self.factor(self) if by is None else by
        return self.linear(x).tanh() * factor


def _closure() -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    inner = torch.ones(WIDTH)
    return lambda branch: inner, lambda branch: inner


# What a branch reads, what is written to, and what the error calls it.
KINDS: dict[str, tuple[Callable[[Any], Tensor], Callable[[Any], Tensor], str]] = {
    "parameter": (lambda b: b.mask, lambda b: b.linear.weight, "branch g: parameter 'weight'"),
    "buffer": (lambda b: b.mask, lambda b: b.mask, "branch g: buffer 'mask'"),
    "attribute": (lambda b: b.scale, lambda b: b.scale, "branch g: attribute 'scale'"),
    "list": (lambda b: b.scales[0], lambda b: b.scales[0], "branch g: attribute 'scales'"),
    "dict": (
        lambda b: b.table["scale"][0],
        lambda b: b.table["scale"][0],
        "branch g: attribute 'table'",
    ),
    "closure": (*_closure(), "attribute 'factor'"),
    "global": (lambda b: _global, lambda b: _global, "tensor of a closure or global"),
}


def network(factor: Callable[[Any], Tensor]) -> revnet.ReversibleSequence:
    torch.manual_seed(0)
    return revnet.ReversibleSequence([(Branch(factor), Branch(factor))])


def assert_refused(loss: Tensor, x: Tensor, said: str) -> None:
    with pytest.raises(revnet.ReversibleError) as raised:
        loss.backward()
    message = str(raised.value)
    assert said in message
    # What happened, why it matters, and what to do.
    assert "was changed in place between forward and backward" in message
    assert "cannot be replayed. Call backward before" in message
    assert x.grad is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_before_backward_raises(kind: str, backend: str) -> None:
    read, written, said = KINDS[kind]
    net = network(read)
    x = torch.randn(3, WIDTH, requires_grad=True)
    run = torch.compile(net, backend=backend, fullgraph=True)
    expected = torch.autograd.grad(net(x).sin().sum(), x)[0]
    found = torch.autograd.grad(run(x).sin().sum(), x)[0]
    torch.testing.assert_close(found, expected)
    loss = run(x).sin().sum()
    tensor = written(net.blocks[0].g)
    with torch.no_grad():
        tensor.mul_(2)
    assert_refused(loss, x, said)
    # A new forward reads what is there now.
    found = torch.autograd.grad(run(x).sin().sum(), x)[0]
    net.execution = "store"
    expected = torch.autograd.grad(net(x).sin().sum(), x)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("held", [False, True], ids=["tensor", "dict"])
def test_a_write_to_a_keyword_tensor_raises(backend: str, held: bool) -> None:
    class Reads(Branch):
        def forward(self, x: Tensor, by: Any = None) -> Tensor:
            return super().forward(x, by["by"] if held else by)

    net = revnet.ReversibleSequence([(Reads(len), Reads(len))], args_route={"by": [(True, True)]})
    x, by = torch.randn(3, WIDTH, requires_grad=True), torch.ones(WIDTH)
    run = torch.compile(net, backend=backend, fullgraph=True)
    loss = run(x, by={"by": by} if held else by).sin().sum()
    by.mul_(2)
    assert_refused(loss, x, "keyword tensor 'by'")


def test_a_write_inside_the_graph_raises() -> None:
    net = network(lambda branch: branch.scale)
    x = torch.randn(3, WIDTH, requires_grad=True)

    @torch.compile(backend="eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        y = net(x)
        net.blocks[0].g.scale.mul_(2)
        return y

    assert_refused(run(x).sum(), x, "branch g: attribute 'scale'")


def test_two_sequences_in_one_graph_name_their_own_tensors() -> None:
    nets = [network(lambda branch: branch.scales[0]), network(lambda branch: branch.mask)]
    x = torch.randn(3, WIDTH, requires_grad=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return nets[1](nets[0](x).relu())

    for net, written, said in zip(
        nets, ("scales", "mask"), ("attribute 'scales'", "buffer 'mask'"), strict=True
    ):
        loss = run(x).sum()
        tensor = getattr(net.blocks[0].f, written)
        (tensor[0] if written == "scales" else tensor).mul_(2)
        assert_refused(loss, x, f"branch f: {said}")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_writes_that_no_replay_reads_are_right(backend: str) -> None:
    """The input, which backward rebuilds; an assignment."""
    net = network(lambda branch: branch.scale)
    x = torch.randn(3, WIDTH)
    run = torch.compile(net, backend=backend, fullgraph=True)
    weight = net.blocks[0].f.linear.weight
    expected = torch.autograd.grad(net(x).sin().sum(), weight)[0]
    loss = run(x).sin().sum()
    x.zero_()
    net.blocks[0].g.scale = torch.zeros(WIDTH)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected)


def test_a_function_of_the_caller_may_write_to_what_its_backward_does_not_need() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, noise: Tensor) -> Tensor:
            return 2 * x + noise

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return 2 * grad, None

    net = network(lambda branch: branch.scale)
    x, noise = torch.randn(3, WIDTH, requires_grad=True), torch.ones(WIDTH)

    def plain(x: Tensor, noise: Tensor) -> Tensor:
        return Doubled.apply(net(x), noise)

    expected = torch.autograd.grad(plain(x, noise).sin().sum(), x)[0]
    loss = torch.compile(plain, backend="aot_eager", fullgraph=True)(x, noise).sin().sum()
    noise.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("written", [False, True])
def test_under_compiled_autograd(written: bool) -> None:
    net = network(lambda branch: branch.scale)
    x = torch.randn(3, WIDTH, requires_grad=True)
    expected = torch.autograd.grad(net(x).sin().sum(), x)[0]
    loss = torch.compile(net, backend="aot_eager", fullgraph=True)(x).sin().sum()
    if written:
        net.blocks[0].g.scale.mul_(2)
    compiler = lambda graph: torch.compile(graph, backend="eager")  # noqa: E731
    # Compiled autograd compares versions itself, before it calls any hook.
    refusal = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with (
        refusal if written else contextlib.nullcontext(),
        torch._dynamo.compiled_autograd._enable(compiler),
    ):
        loss.backward()
    if not written:
        torch.testing.assert_close(x.grad, expected)


def test_masks_of_inference_mode_have_no_version() -> None:
    with torch.inference_mode():
        mask = torch.ones(WIDTH)
    net = network(lambda branch: branch.scale)
    net.args_route = {"by": [(True, True)]}
    x = torch.randn(3, WIDTH, requires_grad=True)
    loss = torch.compile(net, backend="eager", fullgraph=True)(x, by=mask).sum()
    loss.backward()
    assert x.grad is not None


def test_a_walk_holds_no_tensor_after_its_graph() -> None:
    net = network(lambda branch: branch.scale)
    net.args_route = {"by": [(True, True)]}
    x, by = torch.randn(3, WIDTH, requires_grad=True), torch.ones(WIDTH)
    run = torch.compile(net, backend="aot_eager", fullgraph=True)
    run(x, by=by).sum().backward()
    gone = weakref.ref(by)
    loss = run(x, by=by).sum()
    del by
    loss.backward()
    del loss
    assert gone() is None
