"""Neighbours: modules that hand their streams on keep nothing between them.

In fixed streams a chain equals one program of all its steps, and stored execution, in every bit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnet
from revnet import Reversible, ReversibleBlock, ReversibleSequence, Step, measure_memory
from revnet._engine import chain

WIDTH = 8


class Branch(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Larger than one, where float32 has fewer digits than the streams.
        return self.dropout(self.leave(self.enter(x).tanh())) * 3


def pairs(depth: int, dropout: float = 0.0) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(0)
    return [(Branch(dropout), Branch(dropout)) for _ in range(depth)]


class Streams(nn.Sequential):
    """Hands two streams on unchanged."""

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        streams = (x1, x2)
        for module in self:
            streams = (module.run if isinstance(module, ReversibleSequence) else module)(*streams)
        return streams


def links(blocks: Iterable[Any], kind: str, **options: Any) -> nn.Module:
    """Return a chain of one module per block, which maps two streams to two."""
    blocks = list(blocks)
    if kind == "sequences":
        return Streams(*(ReversibleSequence([pair], **options) for pair in blocks))
    if kind == "programs":
        return Streams(*(Reversible([Step(f, 0, 1), Step(g, 1, 0)], **options) for f, g in blocks))
    modules = Streams(*(ReversibleBlock(f, g) for f, g in blocks))
    for block in modules:
        block.streams = options.get("streams", "auto")
        block.execution = options.get("execution", "invert")
    return modules


def gradients(
    run: Callable[[Tensor, Tensor], Any], parameters: Iterable[nn.Parameter], seed: int = 1
) -> list[Tensor]:
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None
    generator = torch.Generator().manual_seed(seed)
    x = [(4 * torch.randn(16, WIDTH, generator=generator)).requires_grad_() for _ in "12"]
    torch.manual_seed(5)
    outputs = run(*x)
    sum((i + 1) * y.sin().sum() for i, y in enumerate(outputs)).backward()
    found = [*outputs, *(part.grad for part in x), *(p.grad for p in parameters)]
    return [tensor.detach().clone() for tensor in found]


KINDS = ["sequences", "programs", "blocks"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_equals_one_sequence_in_every_bit(kind: str, dropout: float):
    blocks = pairs(5, dropout)
    one = ReversibleSequence(blocks, streams="fixed")
    expected = gradients(one.run, one.parameters())
    many = links(blocks, kind, streams="fixed")
    assert all(map(torch.equal, gradients(many, one.parameters()), expected))
    stored = links(blocks, kind, streams="fixed", execution="store")
    assert all(map(torch.equal, gradients(stored, one.parameters()), expected))
    x = 4 * torch.randn(2, 16, WIDTH)
    with torch.no_grad():
        one.eval(), many.eval()
        assert all(map(torch.equal, many(*x), one.run(*x)))


def concatenating(blocks: Iterable[Any], **options: Any) -> nn.Sequential:
    make = [ReversibleSequence([pair], split="chunk", merge="concat", **options) for pair in blocks]
    return nn.Sequential(*make)


def test_modules_that_split_and_concatenate_chain_inside_a_sequential():
    blocks = pairs(5)
    one = ReversibleSequence(blocks, split="chunk", merge="concat", streams="fixed")

    def whole(net: nn.Module) -> Callable[..., tuple[Tensor]]:
        return lambda x1, x2: (net(torch.cat((x1, x2), -1)),)

    expected = gradients(whole(one), one.parameters())
    many = concatenating(blocks, streams="fixed")
    assert all(map(torch.equal, gradients(whole(many), one.parameters()), expected))
    with torch.no_grad():
        x = 4 * torch.randn(16, 2 * WIDTH)
        assert torch.equal(many(x), one(x))


@pytest.mark.parametrize("streams", ["float", "fixed"])
@pytest.mark.parametrize("kind", [*KINDS, "concatenating"])
def test_the_peak_of_a_chain_is_that_of_one_program(kind: str, streams: str):
    depth = 8
    blocks = pairs(depth)
    if kind == "concatenating":
        one: Any = ReversibleSequence(blocks, split="chunk", merge="concat", streams=streams)
        many: Any = concatenating(blocks, streams=streams)
        given = (torch.randn(256, 2 * WIDTH, requires_grad=True),)
    else:
        steps = [Step(branch, i % 2, (i + 1) % 2) for i, branch in enumerate(sum(blocks, ()))]
        one = Reversible(steps, streams=streams)
        many = links(blocks, kind, streams=streams)
        given = tuple(torch.randn(256, WIDTH, requires_grad=True) for _ in "12")

    def measured(net: nn.Module) -> Any:
        def run() -> Tensor:
            y = net(*given)
            return sum(part.sum() for part in (y if isinstance(y, tuple) else (y,)))

        run().backward()
        return measure_memory(run)

    alone, chained = measured(one), measured(many)
    assert chained.saved_bytes <= 1.05 * alone.saved_bytes
    assert chained.peak_bytes <= 1.05 * alone.peak_bytes


def two(**options: Any) -> tuple[Any, Any, list[nn.Parameter]]:
    blocks = pairs(4)
    first = ReversibleSequence(blocks[:2], streams="fixed", **options)
    second = ReversibleSequence(blocks[2:], streams="fixed", **options)
    return first.run, second.run, [*first.parameters(), *second.parameters()]


def middle_in_the_loss(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    y = first(x1, x2)
    return *second(*y), y[0] * y[1]


def middle_with_hooks(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    y1, y2 = first(x1, x2)
    y1.register_hook(lambda grad: grad * 2)
    y2.retain_grad()
    return second(y1, y2)


def two_consumers(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    y = first(x1, x2)
    return *second(*y), *second(*y)


def a_loop(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    for _ in range(3):
        x1, x2 = second(*first(x1, x2))
    return x1, x2


def other_order(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    y1, y2 = first(x1, x2)
    return second(y2, y1)


def half_checkpointed(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    return second(*checkpoint(first, x1, x2, use_reentrant=False))


def all_checkpointed(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    return checkpoint(lambda a, b: second(*first(a, b)), x1, x2, use_reentrant=False)


def backward_first(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    y = first(x1, x2)
    y[0].sum().backward(retain_graph=True)
    return second(*y)


def inner_gradient(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    y = first(x1, x2)
    (grad,) = torch.autograd.grad(y[1].sum(), x2, retain_graph=True)
    return *second(*y), grad * x1


def without_the_second(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    y = first(x1, x2)
    second(*y)
    return y


def second_fails(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    y = first(x1, x2)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    branch = second.__self__.blocks[1].f
    handle = branch.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        second(*y)
    handle.remove()
    return second(*y)


def written_in_the_graph(first: Any, second: Any, x1: Tensor, x2: Tensor) -> Any:
    y1, y2 = first(x1, x2)
    y1 = y1.clone()
    y1.mul_(2)
    return second(y1, y2)


USES = [
    middle_in_the_loss,
    middle_with_hooks,
    two_consumers,
    a_loop,
    other_order,
    half_checkpointed,
    all_checkpointed,
    backward_first,
    inner_gradient,
    without_the_second,
    second_fails,
    written_in_the_graph,
]


@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_whatever_is_done_between_gradients_are_those_of_stored_execution(use: Callable[..., Any]):
    def found(execution: str) -> list[Tensor]:
        first, second, parameters = two(execution=execution)
        if use is without_the_second:
            parameters = parameters[: len(parameters) // 2]
        return gradients(lambda *x: use(first, second, *x), parameters)

    assert all(map(torch.equal, found("invert"), found("store")))


def test_two_backward_calls_and_parts_of_the_graph():
    def found(execution: str) -> list[Tensor]:
        first, second, parameters = two(execution=execution)
        x = [torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(3)) for _ in "12"]
        y = first(*x)
        z = second(*y)
        half = len(parameters) // 2
        results = [
            # The first half alone, then the second alone, then all again.
            *torch.autograd.grad(z[0].sum(), parameters[:half], retain_graph=True),
            *torch.autograd.grad(z[1].sin().sum(), parameters[half:], retain_graph=True),
            *torch.autograd.grad(y[0].cos().sum(), parameters[:half], retain_graph=True,
                                 allow_unused=True),
            *torch.autograd.grad(z[0].cos().sum() + z[1].sum(), parameters),
        ]  # fmt: skip
        return [result for result in results if result is not None]

    assert all(map(torch.equal, found("invert"), found("store")))


def test_what_is_still_held_serves_when_the_second_module_has_changed():
    """As a discriminator that takes a step of its own before the generator does."""

    def found(execution: str) -> list[Tensor]:
        first, second, parameters = two(execution=execution)
        half = len(parameters) // 2
        x = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(3))
        y = first(*x)
        z = second(*y)
        loss = z[0].sum() + z[1].cos().sum()
        grads = torch.autograd.grad(loss, parameters[half:], retain_graph=True)
        with torch.no_grad():
            for parameter, grad in zip(parameters[half:], grads, strict=True):
                parameter.sub_(grad)
        return list(torch.autograd.grad(y[0].sin().sum() + y[1].sum(), parameters[:half]))

    assert all(map(torch.equal, found("invert"), found("store")))


def test_no_step_of_an_unused_module_is_evaluated_again():
    first, second, parameters = two()
    evaluated = []
    for branch in second.__self__.blocks.modules():
        if isinstance(branch, Branch):
            branch.register_forward_hook(lambda *_: evaluated.append(revnet.replaying()))
    y = first(*torch.randn(2, 16, WIDTH))
    z = second(*y)
    sum(part.sin().sum() for part in y).backward()
    assert evaluated == [False] * 4
    assert parameters[0].grad is not None
    del z


def test_double_backward_through_a_chain():
    def found(execution: str) -> list[Tensor]:
        first, second, parameters = two(execution=execution)
        x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(3), requires_grad=True)
        z = second(*first(x, x.sin()))
        (grad,) = torch.autograd.grad(z[0].sin().sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), parameters[:4]))

    assert all(map(torch.equal, found("invert"), found("store")))


def test_a_stream_that_was_written_to_between_is_an_error():
    first, second, _ = two()
    y1, y2 = first(*torch.randn(2, 16, WIDTH))
    with torch.no_grad():
        y1.mul_(2)
    z = second(y1, y2)
    with pytest.raises(revnet.ReversibleError, match="changed in place"):
        sum(part.sum() for part in z).backward()


def test_a_stream_that_was_given_other_data_begins_a_call_of_its_own():
    def exchanged(x1: Tensor, x2: Tensor) -> Any:
        first, second, _ = two()
        y1, y2 = first(x1, x2)
        # Nobody counts this as a write. The gradient goes on to y1 as if it were the same.
        y1.data = y1.data * 2
        return second(y1, y2)

    def added(x1: Tensor, x2: Tensor) -> Any:
        first, second, _ = two(execution="store")
        y1, y2 = first(x1, x2)
        return second(y1 + y1.detach(), y2)

    assert all(map(torch.equal, gradients(exchanged, []), gradients(added, [])))


def test_a_chain_does_not_outlive_its_tensors():
    first, second, _ = two()
    gc.collect()
    before = len(chain._LEFT)
    y = first(*torch.randn(2, 16, WIDTH))
    z = second(*y)
    assert len(chain._LEFT) == before + 2
    del y
    sum(part.sum() for part in z).backward()
    del z
    gc.collect()
    assert len(chain._LEFT) == before


def test_other_settings_begin_a_call_of_their_own():
    blocks = pairs(4)

    def run(x1: Tensor, x2: Tensor) -> Any:
        y = ReversibleSequence(blocks[:1], streams="fixed").run(x1, x2)
        y = ReversibleSequence(blocks[1:2], streams=revnet.Fixed(20)).run(*y)
        y = ReversibleSequence(blocks[2:3], streams=revnet.Fixed(20), execution="store").run(*y)
        return ReversibleSequence(
            blocks[3:], streams=revnet.Fixed(20), determinism_check="exact"
        ).run(*y)

    def stored(x1: Tensor, x2: Tensor) -> Any:
        y = ReversibleSequence(blocks[:1], streams="fixed", execution="store").run(x1, x2)
        return ReversibleSequence(blocks[1:], streams=revnet.Fixed(20), execution="store").run(*y)

    parameters = [p for pair in blocks for branch in pair for p in branch.parameters()]
    assert all(map(torch.equal, gradients(run, parameters), gradients(stored, parameters)))


def test_buffers_of_rules_that_scale_travel_as_well():
    blocks = pairs(4)

    def program(branches: list[nn.Module]) -> Reversible:
        rule = revnet.Momentum(0.9)
        steps = [s for f in branches for s in (Step(f, 0, 1, rule), Step(None, 1, 0))]
        return Reversible(steps, streams="fixed")

    branches = [branch for pair in blocks for branch in pair]
    one = program(branches)
    expected = gradients(one, one.parameters())
    many = Streams(*(program(branches[i : i + 2]) for i in range(0, 8, 2)))
    assert all(map(torch.equal, gradients(many, one.parameters()), expected))


def test_the_inverse_of_what_a_sequence_returned_comes_back_in_every_bit():
    net = ReversibleSequence(pairs(4), streams="fixed")
    # Multiples of 2^-24 that float32 holds.
    x = [(torch.randn(16, WIDTH) * 2**10).round() / 2**10 for _ in "12"]
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            assert all(map(torch.equal, net.inverse(*net.run(*x)), x))
