"""Converted networks: `"invert"` equals `"store"` in every bit, however layers are called."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import revnet
from revnet import ReversibleError
from revnet._conversion import layer as conversion_layer
from revnet._streams import cpu
from revnet.testing import check_conversion

WIDTH, DEPTH = 8, 5


class Block(nn.Module):
    """A residual layer with a norm, dropout and what a model may hand to it."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Linear(2 * width, width)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, *, shift: Tensor | None = None
    ) -> Tensor:
        hidden = self.enter(self.norm(x))
        hidden = hidden if scale is None else hidden * scale
        hidden = hidden if shift is None else hidden + shift
        return x + self.leave(self.dropout(F.gelu(hidden)))


class Net(nn.Module):
    """A loop over layers, which a test may replace."""

    def __init__(self, depth: int = DEPTH, layer: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([layer() for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


Loss = Callable[[Any, Tensor], Tensor]
Results = list[Tensor | None]


def weighted(y: Tensor) -> Tensor:
    return (torch.linspace(0.5, 2.0, y.numel()).view_as(y) * y.float()).square().sum()


def whole(net: nn.Module, x: Tensor) -> Tensor:
    return weighted(net(x))


def without(*places: int) -> Loss:
    def loss(net: Any, x: Tensor) -> Tensor:
        x = net.embed(x)
        for i, layer in enumerate(net.layers):
            x = x if i in places else layer(x)
        return weighted(net.norm(x))

    return loss


def exit_after(depth: int) -> Loss:
    def loss(net: Any, x: Tensor) -> Tensor:
        x = net.embed(x)
        for layer in net.layers[:depth]:
            x = layer(x)
        return weighted(net.norm(x))

    return loss


def hidden_alone(place: int) -> Loss:
    def loss(net: Any, x: Tensor) -> Tensor:
        x, states = net.embed(x), []
        for layer in net.layers:
            x = layer(x)
            states.append(x)
        return weighted(states[place])

    return loss


def all_hidden(net: Any, x: Tensor) -> Tensor:
    x, total = net.embed(x), torch.zeros(())
    for layer in net.layers:
        x = layer(x)
        total = total + weighted(x)
    return total + weighted(net.norm(x))


def one_alone(net: Any, x: Tensor) -> Tensor:
    return weighted(net.layers[2](net.embed(x)))


def one_alone_between(net: Any, x: Tensor) -> Tensor:
    y = net(x)
    other = net.layers[2](x.sin())
    return weighted(y) + weighted(other)


def interleaved(net: Any, x: Tensor) -> Tensor:
    a, b = net.embed(x), net.embed(x.cos())
    for layer in net.layers:
        a, b = layer(a), layer(b)
    return weighted(a) + weighted(b)


def looped(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    for layer in [*net.layers, *net.layers]:
        x = layer(x)
    return weighted(net.norm(x))


def branching(net: Any, x: Tensor) -> Tensor:
    """Two layers are given the output of one; the first of them goes on with its call."""
    x = net.layers[0](net.embed(x))
    y, z = net.layers[1](x), net.layers[2](x)
    return weighted(net.layers[3](y)) + weighted(net.layers[4](z))


def changed_between(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    for i, layer in enumerate(net.layers):
        x = layer(x)
        if i == 1:
            x = x.tanh()
        if i == 3:
            x.mul_(0.5)
    return weighted(x)


def cut_between(net: Any, x: Tensor) -> Tensor:
    x = net.layers[1](net.layers[0](net.embed(x)))
    return weighted(net.layers[3](net.layers[2](x.detach()))) + weighted(x)


def checkpointed(net: Any, x: Tensor) -> Tensor:
    return weighted(checkpoint(net, x, use_reentrant=False))


def checkpointed_reentrant(net: Any, x: Tensor) -> Tensor:
    return weighted(checkpoint(net, x.requires_grad_(), use_reentrant=True))


def checkpointed_layers(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    for layer in net.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    return weighted(x)


def checkpointed_layers_reentrant(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    for layer in net.layers:
        x = checkpoint(layer, x, use_reentrant=True)
    return weighted(x)


def autocast_in_part(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    for i, layer in enumerate(net.layers):
        with torch.autocast("cpu", torch.bfloat16, enabled=i in (1, 2)):
            x = layer(x)
    return weighted(x)


def with_keywords(net: Any, x: Tensor) -> Tensor:
    scale = net.embed.weight.sum() * torch.ones(2 * WIDTH)
    x = net.embed(x)
    for i, layer in enumerate(net.layers):
        x = layer(x, scale) if i % 2 else layer(x=x, scale=scale * i, shift=scale.cos())
    return weighted(x)


def two_backwards(net: Any, x: Tensor) -> Tensor:
    """A loss inside, whose backward runs before the rest of the forward pass."""
    x = net.layers[1](net.layers[0](net.embed(x)))
    weighted(x).backward(retain_graph=True)
    return weighted(net.layers[3](net.layers[2](x)))


def freed_and_continued(net: Any, x: Tensor) -> Tensor:
    """The graph of the first layers is freed before the next layers go on."""
    x = net.layers[1](net.layers[0](net.embed(x)))
    weighted(x).backward()
    y = net.layers[3](net.layers[2](x))
    torch.autograd.grad(weighted(y), list(net.layers[3].parameters()))
    return weighted(net.layers[4](net.embed(x.detach())))


def reduced_by_hand(net: Any, x: Tensor) -> Tensor:
    y = net(x)
    grads = torch.autograd.grad(weighted(y), list(net.layers[1].parameters()), create_graph=True)
    return weighted(y) + sum(weighted(g) for g in grads)


LOSSES: dict[str, Loss] = {
    "whole": whole,
    "first dropped": without(0),
    "middle dropped": without(2),
    "last dropped": without(DEPTH - 1),
    "several dropped": without(0, 2, 4),
    "exit after 1": exit_after(1),
    "exit after 3": exit_after(3),
    "hidden state 0 alone": hidden_alone(0),
    "hidden state 2 alone": hidden_alone(2),
    "all hidden states": all_hidden,
    "one alone": one_alone,
    "one alone, between": one_alone_between,
    "interleaved": interleaved,
    "looped": looped,
    "branching": branching,
    "changed between": changed_between,
    "cut between": cut_between,
    "checkpoint": checkpointed,
    "checkpoint, reentrant": checkpointed_reentrant,
    "checkpoint of layers": checkpointed_layers,
    "checkpoint of layers, reentrant": checkpointed_layers_reentrant,
    "autocast in part": autocast_in_part,
    "keywords": with_keywords,
    "two backwards": two_backwards,
    "freed and continued": freed_and_continued,
    "second derivative": reduced_by_hand,
}


def results(net: nn.Module, loss: Loss, x: Tensor) -> Results:
    """The loss, and the gradients of input and parameters."""
    torch.manual_seed(1)
    net.zero_grad()
    x = x.clone().requires_grad_()
    value = loss(net, x * 1.0)
    value.backward()
    return [value.detach(), x.grad, *(p.grad for p in net.parameters())]


def assert_same(actual: Results, expected: Results) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and not a.isnan().any())


def executed(net: nn.Module, execution: Any, loss: Loss, x: Tensor, **options: Any) -> Results:
    own = copy.deepcopy(net)
    revnet.convert(own, execution=execution, **options)
    return results(own, loss, x)


MIXED = ["invert", "store", "checkpoint", "invert", "select"]


@pytest.mark.parametrize("rule", ["momentum", "two-stream"])
@pytest.mark.parametrize("name", LOSSES)
def test_invert_equals_store(name: str, rule: str) -> None:
    net, x, loss = Net(), torch.randn(2, 3, WIDTH), LOSSES[name]
    alone = name.startswith("checkpoint of layers")
    with pytest.warns(UserWarning, match="no memory is saved") if alone else nullcontext():
        expected = executed(net, "store", loss, x, rule=rule)
        assert_same(executed(net, "invert", loss, x, rule=rule), expected)
        assert_same(executed(net, MIXED, loss, x, rule=rule), expected)
        assert_same(executed(net, MIXED[::-1], loss, x, rule=rule), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["whole", "all hidden states", "middle dropped"])
def test_invert_equals_store_in_other_types(name: str, dtype: torch.dtype) -> None:
    net, x = Net().to(dtype), torch.randn(2, 3, WIDTH, dtype=dtype)
    expected = executed(net, "store", LOSSES[name], x)
    assert_same(executed(net, "invert", LOSSES[name], x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invert_equals_store_under_autocast(dtype: torch.dtype) -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return weighted(net(x))

    net, x = Net().to(dtype), torch.randn(2, 3, WIDTH, dtype=dtype)
    assert_same(executed(net, "invert", loss, x), executed(net, "store", loss, x))


def recurrence(net: Any, x: Tensor, bits: list[int]) -> list[Tensor]:
    """What the layers return, as the paper's recurrence gives it in float64."""
    v, x, states = torch.zeros_like(x), net.embed(x), []
    before = bits[0]
    for layer, b in zip(net.layers, bits, strict=True):
        mu, last = 2.0**-b, 2.0**-before
        keep = last * (1 - mu) / (1 - last)
        v = keep * v + (1 - mu) * (layer(x) - x)
        x = x + v
        states.append(x + mu / (1 - mu) * v)
        x = states[-1] - mu / (1 - mu) * v
        before = b
    return states


def every_state(states: list[Tensor]) -> Tensor:
    return sum(map(weighted, states), torch.zeros(()))


def last_state(states: list[Tensor]) -> Tensor:
    return weighted(states[-1])


def scaled_on_the_way(states: list[Tensor]) -> Tensor:
    for state in states[1:-1]:
        state.register_hook(lambda grad: 1.5 * grad)
    return weighted(states[-1])


def blocked_on_the_way(states: list[Tensor]) -> Tensor:
    states[2].register_hook(lambda grad: 0 * grad)
    return weighted(states[-1]) + weighted(states[1])


@pytest.mark.parametrize("bits", [1, 3, 8, [3, 1, 2, 2, 5]], ids=str)
@pytest.mark.parametrize("loss", [every_state, last_state, scaled_on_the_way, blocked_on_the_way])
def test_every_layer_returns_the_readout_of_the_recurrence(
    bits: int | list[int], loss: Callable[[list[Tensor]], Tensor]
) -> None:
    net, x = Net(layer=lambda: Block(dropout=0.0)).double(), torch.randn(2, 3, WIDTH).double()
    per_layer = [bits] * DEPTH if isinstance(bits, int) else bits
    expected = recurrence(net, x, per_layer)
    grads = torch.autograd.grad(loss(expected), list(net.layers.parameters()))
    revnet.convert(net, bits=bits, streams=revnet.Fixed(37))
    own, states = net.embed(x), []
    for layer in net.layers:
        own = layer(own)
        states.append(own)
    for a, b in zip(states, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    found = torch.autograd.grad(loss(states), list(net.layers.parameters()))
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-7)


def test_the_readout_is_the_residual_stream_where_layers_do_not_read_it() -> None:
    """Updates that do not depend on the stream add up, whatever the bits of each layer."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.update = nn.Linear(1, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.update.bias

    net, x = Net(layer=Constant).double(), torch.randn(2, 3, WIDTH).double()
    expected = net(x)
    revnet.convert(net, "layers", bits=[1, 4, 2, 8, 3], streams=revnet.Fixed(37))
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-9)


def test_one_layer_alone_is_the_ordinary_layer() -> None:
    net, x = Net().eval(), torch.randn(2, 3, WIDTH)
    expected = net.layers[1](x)
    revnet.convert(net)
    torch.testing.assert_close(net.layers[1](x), expected, rtol=0, atol=1e-6)


def test_evaluation_gives_the_values_of_training() -> None:
    net, x = Net(layer=lambda: Block(dropout=0.0)), torch.randn(2, 3, WIDTH)
    revnet.convert(net)
    trained = net(x)
    with torch.no_grad():
        assert torch.equal(net(x), trained)
    with torch.inference_mode():
        assert torch.equal(net(x), trained)


def test_names_states_and_hooks_stay() -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    keys, shown, seen = list(net.state_dict()), repr(net), []
    names = [name for name, _ in net.named_modules()]
    handles = [
        layer.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0], out)))
        for layer in net.layers
    ]
    revnet.convert(net)
    assert list(net.state_dict()) == keys
    assert repr(net) == shown
    assert [name for name, _ in net.named_modules()] == names
    assert all(isinstance(layer, Block) for layer in net.layers)
    net(x).sum().backward()
    assert [layer for layer, _, _ in seen] == list(net.layers)
    assert all(a[2] is b[1] for a, b in pairwise(seen))
    for handle in handles:
        handle.remove()


def test_a_hook_that_puts_another_tensor_in() -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    for module in (net.layers[1], net.layers[2]):
        module.register_forward_hook(lambda layer, args, out: out * 0.5)
        module.register_forward_pre_hook(lambda layer, args: (args[0].tanh(), *args[1:]))
    assert_same(executed(net, "invert", whole, x), executed(net, "store", whole, x))


def test_backward_hooks_of_layers_sit_on_the_path_of_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    for layer in net.layers:
        layer.register_full_backward_hook(lambda layer, grads, given: (grads[0] * 0.5,))
    assert_same(executed(net, "invert", whole, x), executed(net, "store", whole, x))
    seen: list[int] = []
    own = copy.deepcopy(net)
    revnet.convert(own, calibrate=x)
    calls = opened(monkeypatch)
    for i, layer in enumerate(own.layers):
        layer.register_full_backward_pre_hook(lambda layer, grads, i=i: seen.append(i))
    whole(own, x).backward()
    assert seen == list(range(DEPTH))[::-1]
    # The hooks hand on other tensor objects, but all layers share one call.
    assert len(calls) == 1


@pytest.mark.parametrize(("rule", "per_element"), [("momentum", 20), ("two-stream", 12)])
def test_memory_does_not_grow_with_activations(rule: str, per_element: int) -> None:
    """What stays: two streams of float32 and int16, and a buffer of 63 bits."""
    x = torch.randn(512, 4, WIDTH)
    for depth in (8, 16):
        net = Net(depth, lambda: Block(dropout=0.0))
        conversion = revnet.convert(net, rule=rule, calibrate=x)
        around = revnet.measure_memory(lambda x, net=net: net.norm(net.embed(x)), x).saved_bytes
        kept = revnet.measure_memory(net, x).saved_bytes - around
        assert 11 * x.numel() < kept <= 1.05 * per_element * x.numel()
        conversion.execution = "store"
        assert revnet.measure_memory(net, x).saved_bytes > 24 * depth * x.numel()


def test_a_walk_frees_the_streams_that_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the peak a layer has been undone: v twice, x once, as the drift is behind it."""
    monkeypatch.setattr(cpu, "_PIECE", 4096)
    x = torch.randn(64, 256, 32, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Sequential(*(Sine(32) for _ in range(6)))).bfloat16()
    revnet.convert(model, "0", calibrate=x)
    model(x).sum().backward()
    report = revnet.measure_memory(lambda: model(x).sum().backward())
    # Of an element: three streams of six bytes; bits of five layers before and after; what the
    # layer read, made and gives, with its update; and gradients of both streams.
    expected = 3 * 6 + 2 * 2 + 4 * 2 + 2 * 2
    assert report.peak_bytes <= 1.02 * expected * x.numel()


class Sine(nn.Module):
    """A layer that keeps nothing but what it reads."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.enter(x))


def kept_per_element(depth: int, execution: Any, dtype: torch.dtype) -> float:
    """Bytes that a stack alone keeps for backward, for each element of its stream."""
    x = torch.randn(64, 4, WIDTH, dtype=dtype)
    stack = nn.Sequential(*(Sine() for _ in range(depth))).to(dtype)
    model = nn.Sequential(stack)
    revnet.convert(model, "0", execution=execution, calibrate=x)
    return revnet.measure_memory(model, x).saved_bytes / x.numel()


def bits_bytes(*places: int) -> int:
    """Bytes of the 3 bits of each layer that is left behind, at places that share full buffers.

    An int16 holds those of five layers, an int8 of two.
    """
    full = {5 * i for place in places for i in range(1, place // 5 + 1)}
    return 2 * len(full) + sum((0, 1, 1, 2, 2)[place % 5] for place in places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [10, 30])
def test_checkpointed_layers_keep_what_they_read(depth: int, dtype: torch.dtype) -> None:
    """And nothing else: the streams after the last layer are for a layer that may follow."""
    kept = kept_per_element(depth, "checkpoint", dtype)
    assert kept == depth * dtype.itemsize + 12 + bits_bytes(depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpointed_layer_between_inverted_ones_keeps_one_stream(dtype: torch.dtype) -> None:
    """The stream that its layer changes, with its bits; the other is found by a difference."""
    kept = kept_per_element(13, ["invert", "checkpoint"] * 6 + ["invert"], dtype)
    assert kept == 6 * 6 + 12 + bits_bytes(*range(1, 14, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_layers_above_inverted_ones_keep_one_state(dtype: torch.dtype) -> None:
    kept = kept_per_element(12, ["invert"] * 5 + ["checkpoint"] * 7, dtype)
    # What the first of them reads is one part of the state below it.
    assert kept == 12 + 6 * dtype.itemsize + 12 + bits_bytes(5, 12)


@pytest.mark.parametrize("loss", ["whole", "all hidden states", "looped", "two backwards"])
def test_checkpointed_layers_read_alone(loss: str) -> None:
    """Runs of them at either end, in the middle, and alone: the gradients of stored execution."""
    net, x = Net(8), torch.randn(2, 3, WIDTH)
    expected = executed(net, "store", LOSSES[loss], x)
    for pattern in ("cccccccc", "iiccciii", "cciiiccc", "icicciic", "csccicsi"):
        names = [{"c": "checkpoint", "i": "invert", "s": "store"}[letter] for letter in pattern]
        assert_same(executed(net, names, LOSSES[loss], x), expected)


def test_checkpointed_layers_are_evaluated_once_more_each() -> None:
    """No walk leads over a run of them, whichever layer backward asks for."""
    net, x = Net(layer=lambda: Block(dropout=0.0)), torch.randn(2, 3, WIDTH)
    revnet.convert(net, execution="checkpoint", calibrate=x)
    calls: list[int] = []
    for i, layer in enumerate(net.layers):
        layer.enter.register_forward_hook(lambda *_, i=i: calls.append(i))
    y = net(x)
    calls.clear()
    torch.autograd.grad(weighted(y), list(net.layers[DEPTH - 1].parameters()), retain_graph=True)
    assert calls == [DEPTH - 1]
    calls.clear()
    weighted(y).backward()
    assert calls == list(range(DEPTH))[::-1]


def test_a_checkpointed_layer_that_differs_is_noticed() -> None:
    numbers = itertools.count()

    class Counting(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + next(numbers)

    net, x = Net(layer=Counting), torch.randn(2, 3, WIDTH)
    revnet.convert(net, execution="checkpoint", calibrate=x, determinism_check="exact")
    loss = whole(net, x)
    with pytest.raises(ReversibleError, match=r"layers\.4"):
        loss.backward()


def test_weights_of_a_checkpointed_layer_that_change_are_noticed() -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    revnet.convert(net, execution="checkpoint")
    loss = whole(net, x)
    with torch.no_grad():
        net.layers[1].enter.weight.mul_(2)
    with pytest.raises(ReversibleError, match=r"layers\.1.*changed in place"):
        loss.backward()


def test_deepcopy_pickle_and_replicas_are_models_of_their_own() -> None:
    import io

    net, x = Net().eval(), torch.randn(2, 3, WIDTH)
    revnet.convert(net)
    first = net(x)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), first)
        assert_same(results(other, whole, x), results(net, whole, x))
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        changed = other(x)
        assert torch.equal(net(x), first)
        assert not torch.equal(changed, first)
        revnet.Conversion(other).bits = 1
        assert revnet.Conversion(net).bits == 3
        revnet.unconvert(other)
        ordinary = Net().eval()
        ordinary.load_state_dict(other.state_dict())
        assert torch.equal(other(x), ordinary(x))


def test_replicas_compute_with_their_own_parameters() -> None:
    """As nn.DataParallel makes them: parameters are plain attributes, with a graph."""
    net, x = Net().eval(), torch.randn(2, 3, WIDTH)
    revnet.convert(net, calibrate=x)
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(1.5)
    modules = list(net.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    leaves = []
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, p in module._parameters.items():
            leaves.append(p)
            object.__setattr__(replica, name, p * 1.5)
            replica.__dict__[name] = p * 1.5
    y = replicas[net](x)
    assert torch.equal(y, scaled(x))
    grads = torch.autograd.grad(weighted(y), leaves)
    expected = torch.autograd.grad(weighted(scaled(x)), list(scaled.parameters()))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, 1.5 * b)


def test_unconvert_gives_the_first_outputs() -> None:
    net, x = Net().eval(), torch.randn(2, 3, WIDTH)
    first = results(net, whole, x)
    revnet.convert(net)
    converted = results(net, whole, x)
    assert revnet.unconvert(net) is net
    assert_same(results(net, whole, x), first)
    assert not torch.equal(converted[0], first[0])
    assert all(type(layer) is Block for layer in net.layers)
    assert not any("revnet" in key for layer in net.layers for key in vars(layer))


def test_unconvert_between_forward_and_backward() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        found = whole(net, x)
        revnet.unconvert(net)
        return found

    net, x = Net(), torch.randn(2, 3, WIDTH)
    assert_same(executed(net, "invert", loss, x), executed(net, "store", loss, x))


def test_two_threads() -> None:
    net, inputs = Net(layer=lambda: Block(dropout=0.0)), torch.randn(2, 4, 3, WIDTH)
    revnet.convert(net, calibrate=inputs[0])
    expected = [torch.autograd.grad(weighted(net(x)), list(net.parameters())) for x in inputs]
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = torch.autograd.grad(weighted(net(inputs[i])), list(net.parameters()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert_same(list(a), list(b))


def opened(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Weak references to the calls that are opened from now on."""
    calls: list[weakref.ref[Any]] = []
    new = conversion_layer._new_call

    def noted(*args: Any) -> Any:
        call = new(*args)
        calls.append(weakref.ref(call))
        return call

    monkeypatch.setattr(conversion_layer, "_new_call", noted)
    return calls


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("execution", ["invert", "store"])
def test_a_call_dies_with_its_last_output(execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    revnet.convert(net, execution=execution)
    calls = opened(monkeypatch)
    y = net.layers[1](net.layers[0](x))
    assert len(calls) == 1
    assert calls[0]() is not None
    del y
    assert calls[0]() is None
    whole(net, x).backward()
    with torch.no_grad():
        net(x)
    assert len(calls) == 3
    assert not any(call() for call in calls)
    assert not conversion_layer._OPEN


class Wild(nn.Module):
    """A residual layer whose updates differ in size from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * 1e5 ** torch.rand(())


def test_a_replay_chooses_no_range() -> None:
    net, x = Net(2, Wild), torch.randn(2, 3, WIDTH)
    conversion = revnet.convert(net, "layers", preserve_rng_state=False)
    torch.manual_seed(47)  # Draws 0.05 twice.
    loss = whole(net, x)
    before = conversion.state_dict()
    torch.manual_seed(155)  # Draws 0.99 and 0.95.
    loss.backward()
    assert conversion.state_dict() == before


@pytest.mark.usefixtures("no_collector")
def test_parameters_die_with_their_model() -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    revnet.convert(net)
    whole(net, x).backward()
    parameters = [weakref.ref(parameter) for parameter in net.parameters()]
    del net
    assert not any(parameter() is not None for parameter in parameters)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_call_dies_after_an_exception(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    revnet.convert(net, calibrate=x)

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("out of memory, say")

    calls = opened(monkeypatch)
    handle = net.layers[place].leave.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        net(x)
    assert len(calls) == 1
    assert calls[0]() is None
    handle.remove()
    assert_same(results(net, whole, x), results(copy.deepcopy(net), whole, x))


def test_a_layer_that_failed_can_be_called_again() -> None:
    def loss(net: Any, x: Tensor) -> Tensor:
        x = net.layers[1](net.layers[0](net.embed(x)))
        handle = net.layers[2].leave.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net.layers[2](x)
        handle.remove()
        return weighted(net.layers[2](x)) + weighted(x)

    net, x = Net(), torch.randn(2, 3, WIDTH)
    assert_same(executed(net, "invert", loss, x), executed(net, "store", loss, x))


def test_frozen_layers_cost_no_gradient() -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    for module in (net.embed, net.layers[0], net.layers[1]):
        module.requires_grad_(False)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return weighted(net(x.detach()))

    assert_same(executed(net, "invert", loss, x), executed(net, "store", loss, x))


def test_layers_that_return_tuples() -> None:
    class Tuple(Block):
        def forward(self, x: Tensor, bias: Tensor | None = None) -> Any:
            scores = self.enter(x).softmax(-1)
            scale = scores if bias is None else scores + bias
            return super().forward(x, scale), None, scores

    def loss(net: Any, x: Tensor) -> Tensor:
        x, bias, total = net.embed(x), None, torch.zeros(())
        for layer in net.layers:
            x, nothing, scores = layer(x, bias=bias)
            assert nothing is None
            bias = scores if bias is None else bias
            total = total + weighted(scores)
        return total + weighted(x)

    net, x = Net(layer=Tuple), torch.randn(2, 3, WIDTH)
    expected = executed(net, "store", loss, x)
    assert_same(executed(net, "invert", loss, x), expected)
    assert_same(executed(net, MIXED, loss, x), expected)


def test_bits_are_set_anew() -> None:
    net, x = Net().eval(), torch.randn(2, 3, WIDTH)
    ordinary = net(x)
    conversion = revnet.convert(net)
    outputs = []
    for bits in (1, 3, 8):
        conversion.bits = bits
        outputs.append((net(x) - ordinary).abs().max().item())
    assert outputs[0] > outputs[1] > outputs[2]
    conversion.anneal(0.5)
    assert conversion.bits in (5, 6)
    conversion.anneal(2.0)
    assert conversion.bits == 8
    conversion.bits = [1, 2, 3, 4, 5]
    assert conversion.bits == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="4 entries for 5"):
        conversion.bits = [1, 2, 3, 4]
    with pytest.raises(ValueError, match="from 1 to 8"):
        conversion.bits = 9


def test_a_conversion_is_resumed_from_numbers_and_names() -> None:
    import json

    net, x = Net().eval(), torch.randn(2, 3, WIDTH) * 1e4
    conversion = revnet.convert(net, bits=[1, 2, 3, 4, 5], execution=MIXED)
    y = net(x)
    state = json.loads(json.dumps(conversion.state_dict()))
    other = Net().eval()
    other.load_state_dict(net.state_dict())
    resumed = revnet.convert(other)
    resumed.load_state_dict(state)
    assert torch.equal(other(x), y)
    assert resumed.bits == [1, 2, 3, 4, 5]
    assert resumed.execution == MIXED
    assert repr(resumed) == repr(conversion)
    with pytest.raises(ReversibleError, match=r"stacks \{'layers': 5\}.*but the model has"):
        revnet.convert(Net(3)).load_state_dict(state)


@pytest.mark.parametrize("calibrated", [False, True])
def test_large_activations_find_their_range(calibrated: bool) -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    for place in (1, 3):
        with torch.no_grad():
            net.layers[place].leave.weight.mul_(1e5)
    batch = x if calibrated else None
    expected = executed(net, "store", whole, x, calibrate=batch)
    assert_same(executed(net, "invert", whole, x, calibrate=batch), expected)
    conversion = revnet.convert(net, calibrate=batch)
    results(net, whole, x)
    (stack,) = conversion.stacks
    assert stack.streams.limit > 16 * stack.largest > 1e5
    assert f"fraction_bits={stack.streams.fraction_bits}" in repr(conversion)
    # From the second batch on, one call goes through all layers.
    first, second = results(net, whole, x), results(net, whole, x)
    assert_same(first, second)


def test_small_updates_find_a_finer_format() -> None:
    """As with LayerScale at its initialisation."""
    net, x = Net().eval(), torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        for layer in net.layers[2:]:
            layer.leave.weight.mul_(1e-6)
            layer.leave.bias.mul_(1e-6)
    conversion = revnet.convert(net)
    assert_same(
        executed(revnet.unconvert(copy.deepcopy(net)), "invert", whole, x),
        executed(revnet.unconvert(copy.deepcopy(net)), "store", whole, x),
    )
    results(net, whole, x)
    assert conversion.stacks[0].streams == revnet.Fixed(37)


def test_leaving_the_range_names_layer_magnitude_and_remedy() -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    revnet.convert(net, calibrate=x)
    with torch.no_grad():
        net.layers[2].leave.weight.mul_(1e6)
    net(x)
    with pytest.raises(ReversibleError, match=r"layers\.2: a stream left.*fraction_bits=\d+"):
        net(x)
    net(x)
    with pytest.raises(ReversibleError, match=r"layers\.2: a stream left"):
        revnet.Conversion(net).check()


def test_layers_that_all_begin_anew_are_warned_of_once() -> None:
    """The second call saves nothing either; as warnings are errors here, it says nothing."""

    class Apart(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x) * 1.0
            return x

    net, x = Apart(), torch.randn(2, 3, WIDTH)
    conversion = revnet.convert(net, calibrate=x)
    with torch.no_grad():
        net(x)
    with pytest.warns(UserWarning, match="layers: no layer was given the very tensor"):
        net(x)
    net(x)
    # One layer alone, and one of which the output is changed, are no such stack.
    conversion.stacks[0].warned.clear()
    for _ in range(DEPTH):
        one_alone(net, x)
        changed_between(net, x)


class Keyed(Net):
    """A dict of layers, called by position."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Block() for i in range(DEPTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x, None)
        return self.norm(x)


def test_a_dict_of_layers() -> None:
    net, x = Keyed(), torch.randn(2, 3, WIDTH)
    assert_same(executed(net, "invert", whole, x), executed(net, "store", whole, x))
    assert "layers: 5 × Block" in repr(revnet.convert(net))


def test_the_policy_for_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class in docs/ecosystem.md, on a base class with torchtitan's protocol.

    A policy is made of its `Config`, with fields by keyword, and of a folder; `apply` changes the
    model in place. A model calls the blocks of the `nn.ModuleDict` `layers`, by position.
    """

    class Policy:
        @dataclass(kw_only=True, slots=True)
        class Config:
            preserve_rng_state: bool = True
            determinism_check: str = "default"
            debug: bool = False

        def __init__(self, config: Any, dump_folder: str = "") -> None:
            self.config = config

    for name in ("torchtitan", "torchtitan.distributed"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("torchtitan.distributed.activation_checkpoint")
    module.ActivationCheckpointing = Policy
    monkeypatch.setitem(sys.modules, module.__name__, module)
    page = Path(__file__).parent.parent / "docs" / "ecosystem.md"
    names: dict[str, Any] = {"__name__": __name__}
    exec(page.read_text().partition("```py\n")[2].partition("```")[0], names)
    kind = names["Reversible"]
    net, x = Keyed(), torch.randn(2, 3, WIDTH)
    expected = executed(net, "store", whole, x, bits=2)
    kind(kind.Config(bits=2), dump_folder="outputs").apply(net)
    assert revnet.Conversion(net).execution == "invert"
    assert_same(results(net, whole, x), expected)


@pytest.mark.parametrize("kind", ["sequential", "named"])
def test_containers(kind: str) -> None:
    net = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Sequential(*(Block() for _ in range(4))), nn.LayerNorm(WIDTH)
    )
    x = torch.randn(2, 3, WIDTH)
    options = {"layers": "1"} if kind == "named" else {}
    expected = executed(net, "store", whole, x, **options)
    assert_same(executed(net, "invert", whole, x, **options), expected)
    conversion = revnet.convert(net, **options)
    assert "1: 4 × Block" in repr(conversion)


def test_a_found_layer_that_changes_shape_stays_outside() -> None:
    class Wider(Block):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return torch.cat((super().forward(x), x), 1)

    net, x = Net(), torch.randn(2, 3, WIDTH)
    net.layers[0], net.layers[1] = Wider(), Wider()
    assert_same(executed(net, "invert", whole, x), executed(net, "store", whole, x))
    conversion = revnet.convert(net)
    net(x)
    assert "left out: layers.1 (it changes the shape, (2, 6, 8) to (2, 12, 8))" in repr(conversion)
    revnet.unconvert(net)
    revnet.convert(net, "layers")
    with pytest.raises(ReversibleError, match=r"layers\.0 .*changes the shape.*leave it out"):
        net(x)


def test_errors() -> None:
    with pytest.raises(ReversibleError, match=r"no stack.*Name it.*'0' \(2 × Linear\)"):
        revnet.convert(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    with pytest.raises(ReversibleError, match="'blocks', which is not there in Net"):
        revnet.convert(Net(), "blocks")
    with pytest.raises(ReversibleError, match="'embed', which is a Linear in Net"):
        revnet.convert(Net(), ["layers", "embed"])
    with pytest.raises(ValueError, match="rule 'leapfrog' is not one of"):
        revnet.convert(Net(), rule="leapfrog")
    with pytest.raises(ValueError, match="bits 0: expected an integer from 1 to 8"):
        revnet.convert(Net(), bits=0)
    for bits in (3.0, None, [3.0] * DEPTH):
        with pytest.raises(ValueError, match="expected an integer from 1 to 8"):
            revnet.convert(Net(), bits=bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="execution 'keep' is not one of"):
        revnet.convert(Net(), execution="keep")
    net = Net()
    with pytest.raises(ValueError, match="2 entries for 5 converted layers"):
        revnet.convert(net, bits=[3, 3])
    with pytest.raises(ReversibleError, match="Net is not converted"):
        revnet.unconvert(net)
    revnet.convert(net)
    with pytest.raises(ReversibleError, match="Net is converted already"):
        revnet.convert(net)
    net = Net()
    net.layers[1].forward = net.layers[1].forward
    with pytest.raises(ReversibleError, match=r"layers\.1 has a forward of its own"):
        revnet.convert(net)


def test_a_layer_that_writes_to_its_input_raises() -> None:
    class Writes(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    net = Net(layer=Writes)
    revnet.convert(net)
    with pytest.raises(ReversibleError, match=r"layers\.0 changed its input in place"):
        net(torch.randn(2, 3, WIDTH))


def test_weights_that_change_before_backward_raise() -> None:
    net = Net()
    revnet.convert(net)
    loss = whole(net, torch.randn(2, 3, WIDTH))
    with torch.no_grad():
        net.layers[1].enter.weight.mul_(2)
    with pytest.raises(ReversibleError, match="changed in place"):
        loss.backward()


# Dynamo looks at the gradient of every input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("when", "fullgraph"),
    [
        ("before", False),
        ("before", True),
        ("after", False),
        ("after", True),
        ("wrapped", True),
        ("whole", False),
    ],
)
def test_compiled_layers_compile_their_own_computation(when: str, fullgraph: bool) -> None:
    """One graph for all layers, which are equal, and none of a function of the engine."""
    from torch._dynamo.testing import CompileCounterWithBackend

    net, x = Net(layer=lambda: Block(dropout=0.0)), torch.randn(2, 3, WIDTH)
    found = []
    for execution in ("store", "invert"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        own = copy.deepcopy(net)
        if when == "before":
            for layer in own.layers:
                layer.compile(backend=counter, fullgraph=fullgraph)
        conversion = revnet.convert(own, execution=execution)
        if when == "after":
            for layer in own.layers:
                layer.compile(backend=counter, fullgraph=fullgraph)
        if when == "wrapped":
            for i, layer in enumerate(own.layers):
                own.layers[i] = torch.compile(layer, backend=counter, fullgraph=fullgraph)
        conversion.stacks[0].unseen.clear()
        compiled = torch.compile(own, backend=counter) if when == "whole" else own
        results(compiled, whole, x)
        found.append(results(compiled, whole, x))
        assert counter.frame_count == 1
        # The layer's norm, its two products and GELU, and the two additions around.
        assert counter.op_count == len(list(Block().children())) + 2
    assert_same(*found)
    plain = copy.deepcopy(net)
    revnet.convert(plain)
    for a, b in zip(results(plain, whole, x), found[0], strict=True):
        torch.testing.assert_close(a, b)


def test_check_conversion_reports_shift_and_bytes() -> None:
    net, x = Net(depth=10), torch.randn(64, 3, WIDTH)
    with pytest.raises(ReversibleError, match="not converted"):
        check_conversion(net, x)
    ordinary = copy.deepcopy(net)
    revnet.convert(net)
    generator = torch.get_rng_state()
    report = check_conversion(net, x, weighted)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in net.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert report.ordinary_loss == weighted(ordinary(x)).item()
    assert 0 < abs(report.shift) < 0.1 * report.ordinary_loss
    assert report.saved_bytes < 0.3 * report.stored_bytes
    assert check_conversion(net, (x,)).loss == check_conversion(net, {"x": x}).loss


def test_check_conversion_finds_randomness_of_its_own() -> None:
    class Own(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, torch.rand(1, generator=generator))

    generator = torch.Generator().manual_seed(0)
    net = Net(layer=Own)
    revnet.convert(net)
    with pytest.raises(ReversibleError, match="two stored runs with the same seed differ"):
        check_conversion(net, torch.randn(2, 3, WIDTH))


def test_transforms_of_torch_func_and_swapped_parameters() -> None:
    net, x = Net(layer=lambda: Block(dropout=0.0)), torch.randn(2, 3, WIDTH)
    revnet.convert(net, calibrate=x)
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return weighted(torch.func.functional_call(net, parameters, (x,)))

    found = torch.func.grad(loss)(parameters)
    swapped = {name: (1.5 * p).detach().requires_grad_() for name, p in parameters.items()}
    other = torch.autograd.grad(loss(swapped), list(swapped.values()))
    for model, grads in ((net, list(found.values())), (copy.deepcopy(net), list(other))):
        if model is not net:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)
        for a, b in zip(grads, results(model, whole, x)[2:], strict=True):
            torch.testing.assert_close(a, b)


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    net = Net()
    conversion = revnet.convert(net)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = net(mode.from_tensor(torch.randn(2, 3, WIDTH)))
        y.sum().backward()
    assert y.shape == (2, 3, WIDTH)
    assert len(conversion.stacks[0].unseen) == DEPTH


def doubled_between(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    for layer in net.layers:
        x = layer(x).mul_(2.0)
    return net.norm(x)


@pytest.mark.filterwarnings("ignore:.*no layer was given the very tensor")
@pytest.mark.parametrize("mode", ["inference", "vmap", "grad", "vmap of grad"])
def test_writes_between_layers_are_noticed_where_torch_counts_none(mode: str) -> None:
    net, x = Net(layer=lambda: Block(dropout=0.0)), torch.randn(2, 3, WIDTH)
    revnet.convert(net, calibrate=x)
    x = x.requires_grad_()
    y = doubled_between(net, x)
    expected, (gradient,) = y.detach(), torch.autograd.grad(y.sin().sum(), x)

    def loss(x: Tensor) -> Tensor:
        return doubled_between(net, x).sin().sum()

    if mode == "inference":
        with torch.inference_mode():
            torch.testing.assert_close(doubled_between(net, x.detach()).clone(), expected)
    elif mode == "vmap":
        found = torch.func.vmap(lambda x: doubled_between(net, x))(x.detach())
        torch.testing.assert_close(found, expected)
    else:
        grad = torch.func.grad(loss)
        grad = torch.func.vmap(grad) if mode == "vmap of grad" else grad
        torch.testing.assert_close(grad(x.detach()), gradient)


_JVP = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@_JVP
def test_forward_mode() -> None:
    from torch.autograd import forward_ad

    net = Net(layer=lambda: Block(dropout=0.0)).double()
    revnet.convert(net, streams="float")
    x, t = torch.randn(2, 2, 3, WIDTH, dtype=torch.float64)
    _, expected = torch.autograd.functional.jvp(net, x, t)
    torch.testing.assert_close(torch.func.jvp(net, (x,), (t,))[1], expected)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, t)))
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(y, net(x))


@_JVP
def test_second_derivatives_by_forward_over_reverse() -> None:
    net = Net(3, layer=lambda: Block(dropout=0.0)).double()
    revnet.convert(net, streams="float")
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    expected = torch.autograd.functional.hessian(lambda x: net(x).sin().sum(), x)
    torch.testing.assert_close(torch.func.hessian(lambda x: net(x).sin().sum())(x), expected)


class Named(NamedTuple):
    hidden: Tensor
    weight: Tensor


class ReturnsNamed(Block):
    def forward(self, x: Tensor) -> Named:  # type: ignore[override]
        y = super().forward(x)
        return Named(y, y.mean())


def test_named_tuples_stay_named() -> None:
    def loss(net: Any, x: Tensor) -> Tensor:
        x, total = net.embed(x), torch.zeros(())
        for layer in net.layers:
            found = layer(x)
            x, total = found.hidden, total + found.weight
        return weighted(x) + total

    net, x = Net(layer=ReturnsNamed), torch.randn(2, 3, WIDTH)
    options = {"layers": "layers"}
    assert_same(
        executed(net, "invert", loss, x, **options), executed(net, "store", loss, x, **options)
    )


class Around(nn.Module):
    """Layers under two names, some of them in two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net(3)
        self.layers = self.inner.layers
        self.more = nn.ModuleList([self.layers[2], Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.more):
            x = layer(x)
        return x


@pytest.mark.parametrize("layers", [None, ["layers", "inner.layers", "more", "layers"]])
def test_layers_under_several_names_are_converted_once(layers: Any) -> None:
    net, x = Around(), torch.randn(2, 3, WIDTH)
    expected = results(net, whole, x)
    assert_same(
        executed(net, "invert", whole, x, layers=layers),
        executed(net, "store", whole, x, layers=layers),
    )
    conversion = revnet.convert(net, layers)
    assert [len(stack.layers) for stack in conversion.stacks] == [3, 2]
    assert "more.0 (the same as" in str(conversion)
    revnet.unconvert(net)
    assert all(type(layer) is Block for layer in (*net.layers, *net.more))
    assert_same(results(net, whole, x), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_sequences_are_evaluated_by_the_converted_layers() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 4), torch.randn(2, 5, WIDTH)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    ordinary = copy.deepcopy(net).eval()
    revnet.convert(net, bits=1, calibrate=x)
    expected = net(x, src_key_padding_mask=padding)
    for model in (net.eval(), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            found = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding])
    revnet.unconvert(net)
    with torch.no_grad():
        found = net(x, src_key_padding_mask=padding)
        assert torch.equal(found, ordinary(x, src_key_padding_mask=padding))


class CountingBlock(nn.Module):
    """A block with running statistics and other state; it may widen its input."""

    def __init__(self, size: float = 1.0, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.leave = nn.Linear(WIDTH, width)
        self.dropout = nn.Dropout(0.5)
        self.size, self.calls, self.last = size, 0, None
        self.noted: list[float] = []

    def forward(self, x: Tensor, log: list[int]) -> Tensor:
        self.calls += 1
        self.last = x.detach()
        self.noted.append(1.0)
        log.append(1)
        y = self.size * self.leave(self.dropout(self.norm(x)))
        return x + y if x.shape == y.shape else y


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", ["large", "small", "another shape", "another shape, float"])
def test_a_first_evaluation_that_is_given_up_leaves_no_trace(case: str, grad: bool) -> None:
    size = {"large": 1e6, "small": 1e-8}.get(case, 1.0)
    torch.manual_seed(0)
    layers = [CountingBlock(size), CountingBlock(size), CountingBlock(size)]
    if "shape" in case:
        layers[2] = CountingBlock(width=2 * WIDTH)
    net = nn.Module()
    net.blocks = nn.ModuleList(layers)
    x, log = torch.randn(6, WIDTH), []
    ordinary = copy.deepcopy(net)
    revnet.convert(net, streams="float" if "float" in case else "fixed")

    def run(net: Any, log: list[int]) -> Tensor:
        torch.manual_seed(1)
        y = x
        for layer in net.blocks:
            y = layer(y, log)
        return y

    with torch.set_grad_enabled(grad):
        y = run(net, log)
        state = torch.get_rng_state()
        if grad:
            y.sum().backward()
        run(ordinary, [])
    assert torch.equal(torch.get_rng_state(), state)
    assert log == [1, 1, 1]
    first, same = net.blocks[0].norm, ordinary.blocks[0].norm
    torch.testing.assert_close(first.running_mean, same.running_mean)
    for layer in net.blocks:
        assert layer.calls == layer.norm.num_batches_tracked == 1
        assert layer.noted == [1.0]


class Adjacency(nn.Module):
    """Reads a sparse matrix, as layers of graph networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(6).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.matrix, x)


class MixingBlock(nn.Module):
    """A residual layer with a part of another kind; it may widen its input."""

    def __init__(self, part: nn.Module, size: float, width: int = WIDTH) -> None:
        super().__init__()
        self.part, self.leave, self.size = part, nn.Linear(WIDTH, width), size

    def forward(self, x: Tensor) -> Tensor:
        y = self.size * self.leave(self.part(x))
        return x + y if x.shape == y.shape else y


def scripted_norm() -> Any:
    return torch.jit.script(nn.BatchNorm1d(WIDTH))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", ["as it is", "large", "another shape"])
@pytest.mark.parametrize(
    "part",
    [
        scripted_norm,
        Adjacency,
        nn.LazyBatchNorm1d,
    ],
    ids=["scripted", "sparse", "lazy"],
)
def test_first_evaluations_of_layers_with_unusual_parts(part: Any, case: str, grad: bool) -> None:
    size = 1e3 if case == "large" else 1.0
    layers = [MixingBlock(part(), size), MixingBlock(part(), size)]
    if case == "another shape":
        layers.append(MixingBlock(part(), 1.0, 2 * WIDTH))
    net, x = nn.Sequential(*layers), torch.randn(6, WIDTH)
    conversion = revnet.convert(net)
    with torch.set_grad_enabled(grad):
        y = net(x)
        if grad:
            y.sum().backward()
    assert bool(conversion.stacks[0].outside) == (case == "another shape")
    for layer in layers:
        assert part is not scripted_norm or layer.part.num_batches_tracked == 1
        # Which a lazy module learns in its first call, in whatever else that call is given up.
        assert getattr(layer.part, "num_features", WIDTH) == WIDTH
    revnet.unconvert(net)
    assert y.isfinite().all()
    assert torch.equal(net.eval()(x), net(x))


class Clones(TorchDispatchMode):
    """Notes how many elements are copied."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_a_first_evaluation_copies_no_table_that_it_only_reads(grad: bool) -> None:
    net, x = Net(2), torch.randn(2, 3, WIDTH)
    for layer in net.layers:
        layer.register_buffer("table", torch.zeros(2**16))
    revnet.convert(net)
    with torch.set_grad_enabled(grad), Clones() as clones:
        net(x)
    assert clones.most < 2**16


def test_the_first_batch_may_be_larger_than_the_first_range() -> None:
    net, x = Net(), 1e6 * torch.randn(2, 3, WIDTH)
    net.embed = nn.Identity()
    conversion = revnet.convert(net)
    assert net(x).isfinite().all()
    conversion.check()
    assert conversion.stacks[0].largest >= x.abs().max()
    revnet.unconvert(net)
    assert_same(executed(net, "invert", whole, x), executed(net, "store", whole, x))


def test_a_first_call_that_fails_decides_nothing() -> None:
    net, x = Net(), torch.randn(2, 3, WIDTH)
    conversion = revnet.convert(net)
    with pytest.raises(RuntimeError):
        net.layers[0](torch.randn(2, 3, WIDTH + 1))
    assert len(conversion.stacks[0].unseen) == DEPTH
    net(1e3 * x)
    assert not conversion.stacks[0].unseen


def test_a_model_that_is_exported_first_runs_afterwards() -> None:
    net, x = Net().eval(), torch.randn(2, 3, WIDTH)
    conversion = revnet.convert(net)
    exported = torch.export.export(net, (x,)).module()
    y = net(x)
    conversion.check()
    assert torch.equal(exported(x), y)


class GrowingBlock(Block):
    """A layer that adds many times its input, and notes what it adds."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.update = 30 * x.abs().amax() * (super().forward(x) - x).tanh()
        return x + self.update


@pytest.mark.parametrize("grad", [True, False])
def test_the_readout_grows_by_updates_while_the_range_is_chosen(grad: bool) -> None:
    net, x = Net(8, lambda: GrowingBlock(dropout=0.0)), 10 * torch.randn(2, 3, WIDTH)
    conversion, formats = revnet.convert(net, bits=1), set()
    with torch.set_grad_enabled(grad):
        x = net.embed(x)
        for layer in net.layers:
            y = layer(x)
            torch.testing.assert_close(y, x + layer.update, rtol=1e-3, atol=1e-3)
            x = y
            formats.add(conversion.stacks[0].streams)
    assert len(formats) > 2


class CachingBlock(Block):
    """A layer that reads a cache, and adds to it."""

    def forward(self, x: Tensor, past_key_values: list[Tensor]) -> Tensor:  # type: ignore[override]
        before = sum(past_key_values, torch.zeros(()))
        past_key_values.append(x.mean())
        return super().forward(x + before)


@pytest.mark.filterwarnings("ignore:.*a key-value cache that holds something")
@pytest.mark.parametrize("rule", ["momentum", "two-stream"])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_layers_with_a_filled_cache_are_those_of_evaluation(size: float, rule: Any) -> None:
    net, x = Net(layer=lambda: CachingBlock(dropout=0.0)), size * torch.randn(2, 3, WIDTH)

    def loss(net: Any, x: Tensor) -> Tensor:
        x, cache = net.embed(x), [torch.ones(())]
        for i, layer in enumerate(net.layers):
            x = layer(x, past_key_values=cache if i % 2 else [])
        assert len(cache) == 1 + DEPTH // 2
        return weighted(net.norm(x))

    expected = executed(net, "store", loss, x, rule=rule)
    assert_same(executed(net, "invert", loss, x, rule=rule), expected)
    revnet.convert(net, rule=rule)
    loss(net, x)
    with torch.no_grad():
        assert torch.equal(loss(net, x), loss(net.eval(), x))
    value = loss(net, x).detach()
    with torch.no_grad():
        assert torch.equal(loss(net, x), value)


@_JVP
def test_derivatives_of_every_kind_agree_with_differences() -> None:
    net = Net(3, layer=lambda: Block(dropout=0.0)).double()
    revnet.convert(net, streams="float")
    x = torch.randn(1, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        net, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(net, x, check_fwd_over_rev=True)
