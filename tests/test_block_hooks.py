"""Hooks that put other streams in between blocks: every execution sees what stored execution
saw.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Mlp
from oracle import assert_same_gradients, gradients_of, weighted
from revnet import Fixed, ReversibleError, ReversibleSequence
from revnet._execution import EXECUTIONS


def before(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x1, x2, *rest = args
    return (x1 * 1.5, x2.sin(), *rest)


def after(block: Any, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    y1, y2 = out
    return y1.tanh(), y2


def step(
    execution: Any, streams: Any, places: tuple[int, ...], kind: str
) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    net = ReversibleSequence(
        [(Mlp(8, 0.2).double(), Mlp(8, 0.2).double()) for _ in range(4)],
        streams=streams,
        execution=execution,
    )
    for place in places:
        block = net.blocks[place]
        block.register_forward_pre_hook(
            before
        ) if kind == "before" else block.register_forward_hook(after)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weighted(net(x)).backward()
    return {"x": x.grad, **gradients_of(net)}


@pytest.mark.parametrize("kind", ["before", "after"])
@pytest.mark.parametrize("places", [(0,), (2,), (1, 2), (3,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("streams", ["float", Fixed(fraction_bits=37)], ids=["float", "fixed"])
def test_streams_put_in_by_a_hook(kind: str, places: tuple[int, ...], streams: Any) -> None:
    expected = step("store", streams, places, kind)
    mixed = [EXECUTIONS[i % len(EXECUTIONS)] for i in range(8)]
    for execution in (*EXECUTIONS, mixed, mixed[::-1]):
        assert_same_gradients(step(execution, streams, places, kind), expected, 1e-11)


class AnyPrecision(nn.Linear):
    """Computes in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).tanh()


def lower(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.bfloat16() if isinstance(x, Tensor) else x for x in args)


@pytest.mark.parametrize("kind", ["before", "after"])
def test_a_hook_that_casts_the_streams_is_named_once(kind: str) -> None:
    net = ReversibleSequence([(AnyPrecision(8, 8), AnyPrecision(8, 8)) for _ in range(4)])
    for block in (net.blocks[1], net.blocks[2]):
        if kind == "before":
            block.register_forward_pre_hook(lower)
        else:
            block.register_forward_hook(lambda block, args, out: lower(block, out))
    x = torch.randn(2, 8)
    with torch.no_grad():
        net(x)
    named = "block 1" if kind == "before" else "block 2"
    with pytest.warns(UserWarning, match=f"{named}: a hook cast the streams to bfloat16") as found:
        net(x).sum().backward()
    assert len(found) == 1
    assert found[0].filename == __file__
    net(x).sum().backward()
    for options in ({"streams": "fixed"}, {"streams": "float"}, {"execution": "store"}):
        other = ReversibleSequence(net.blocks, **options)
        other(x).sum().backward()


def as_loop(blocks: Any, x: Tensor) -> Tensor:
    x1 = x2 = x
    for block in blocks:
        x1, x2 = block(x1, x2)
    return (x1 + x2) / 2


@pytest.mark.parametrize("places", [(0,), (1, 2), (3,)], ids=str)
def test_hooks_of_blocks_run_as_in_a_loop_over_the_blocks(places: tuple[int, ...]) -> None:
    net = ReversibleSequence([(Mlp(8).double(), Mlp(8).double()) for _ in range(4)])
    seen: list[Any] = []
    for place in places:
        block = net.blocks[place]
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
        block.register_full_backward_pre_hook(
            lambda _, grads, place=place: seen.append((place, *grads))
        )
        block.register_full_backward_hook(lambda _, grads, __: (grads[0] * 1.5, *grads[1:]))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    found = []
    for run in (net, lambda x: as_loop(net.blocks, x)):
        net.zero_grad()
        seen.clear()
        leaf = x.clone().requires_grad_()
        weighted(run(leaf)).backward()
        found.append(
            (
                {"x": leaf.grad, **gradients_of(net)},
                [place for place, *_ in seen],
                [g for _, *g in seen],
            )
        )
    (actual, order, given), (expected, wanted, taken) = found
    assert order == wanted == sorted(places, reverse=True)
    assert_same_gradients(actual, expected, 1e-11)
    torch.testing.assert_close(given, taken)


def halve_before(block: Any, args: tuple[Any, ...]) -> None:
    args[1].mul_(0.5)


def halve_after(block: Any, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> None:
    out[1].mul_(0.5)


@pytest.mark.parametrize(("kind", "place"), [("before", 2), ("after", 1), ("after", 3)])
@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_a_stream_that_a_hook_writes_to(kind: str, place: int, streams: Any) -> None:
    """Autograd allows it for the second stream, which nothing has read; what was there cannot be
    found again.
    """
    net = ReversibleSequence(
        [(Mlp(8).double(), Mlp(8).double()) for _ in range(4)], streams=streams
    )
    block = net.blocks[place]
    block.register_forward_pre_hook(
        halve_before
    ) if kind == "before" else block.register_forward_hook(halve_after)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with pytest.raises(
        ReversibleError, match=re.escape(f"block {place - (kind == 'before')}, branch g: a hook")
    ):
        net(x)
    with torch.no_grad():
        evaluated = net(x)
    net.execution = ["store"] * 8
    stored = net(x)
    stored.sum().backward()
    assert torch.equal(stored, evaluated)


def viewed(block: Any, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> Any:
    return tuple(y.view_as(y) for y in out)


def written_and_viewed(block: Any, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> Any:
    return tuple(y.mul_(1.5).view_as(y) for y in out)


@pytest.mark.parametrize("hook", [viewed, written_and_viewed])
@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_views_of_the_streams_in_inference_mode(streams: Any, hook: Any) -> None:
    net = ReversibleSequence([(Mlp(8), Mlp(8)) for _ in range(3)], streams=streams)
    for block in net.blocks:
        block.register_forward_hook(hook)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = net(x.clone())
    with torch.inference_mode():
        torch.testing.assert_close(net(x.clone()).clone(), expected)
