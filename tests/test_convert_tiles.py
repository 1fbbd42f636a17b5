"""Parts of converted layers that run in tiles: `convert(model, tile=…)`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnet
from revnet import ReversibleError, measure_memory

WIDTH, TOKENS = 8, 11


class Layer(nn.Module):
    """A mix of all tokens and an MLP, with a residual around each."""

    def __init__(self, hidden: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).mean(-2, keepdim=True).tanh()
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(**options) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = net(x * 1.0)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("tile", [1, 4, 10, 11, 64])
@pytest.mark.parametrize("execution", ["invert", "store", "checkpoint"])
def test_tiles_compute_what_the_whole_computes(tile: int, execution: Any) -> None:
    found = []
    for options in ({}, {"tile": {"mlp": tile}}):
        net = Net().double()
        revnet.convert(net, execution=execution, streams="float", **options)
        found.append(gradients(net, torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)))
        torch.manual_seed(0)
    for whole, tiled in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inverted_equals_stored_in_every_bit(dtype: torch.dtype) -> None:
    net, x = Net(dropout=0.3).to(dtype), torch.randn(2, TOKENS, WIDTH, dtype=dtype)
    found = []
    for execution in ("store", "invert"):
        own = copy.deepcopy(net)
        revnet.convert(own, execution=execution, tile={"mlp": 4})
        found.append(gradients(own, x))
    for stored, inverted in zip(*found, strict=True):
        assert torch.equal(inverted, stored)


def test_activations_of_one_tile_at_a_time() -> None:
    peaks = []
    for tile in ({}, {"mlp": 32}):
        net = Net(hidden=64 * WIDTH)
        revnet.convert(net, tile=tile)
        peaks.append(measure_memory(net, torch.randn(1, 512, WIDTH)).peak_bytes)
    # What the MLP holds for 512 tokens: input and output of GELU, and gradients of them.
    hidden = 512 * 64 * WIDTH * 4
    assert peaks[0] > 2 * hidden
    assert peaks[1] < peaks[0] - 1.7 * hidden


@pytest.mark.parametrize("tiles", [16, 128])
def test_weight_gradients_in_low_precision_are_as_good_as_untiled_ones(tiles: int) -> None:
    tokens = 4 * tiles
    x = torch.randn(1, tokens, WIDTH)
    exact = gradients(Net().double(), x.double())
    errors = []
    for tile in ({}, {"mlp": 4}):
        net = Net().bfloat16()
        revnet.convert(net, bits=8, tile=tile)
        found = gradients(net, x.bfloat16())
        pairs = [
            (a.double(), b)
            for (name, _), a, b in zip(net.named_parameters(), found[2:], exact[2:], strict=True)
            if "mlp" in name
        ]
        errors.append(sum(((a - b).norm() / b.norm()).item() for a, b in pairs))
    assert errors[1] < 1.2 * errors[0]


def test_every_parameter_has_one_gradient() -> None:
    net = Net().bfloat16()
    revnet.convert(net, tile={"mlp": 2})
    counts: dict[str, int] = {}
    for name, parameter in net.named_parameters():

        def count(_: Tensor, name: str = name) -> None:
            counts[name] = counts.get(name, 0) + 1

        parameter.register_post_accumulate_grad_hook(count)
    net(torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16)).sum().backward()
    assert set(counts.values()) == {1}
    assert set(counts) == {name for name, _ in net.named_parameters()}


def test_copies_and_unconvert() -> None:
    net = Net()
    kind, keys = type(net.layers[0].mlp), list(net.state_dict())
    x = torch.randn(2, TOKENS, WIDTH)
    before = net(x)
    revnet.convert(net, tile={"mlp": 4})
    assert list(net.state_dict()) == keys
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))
        with torch.no_grad():
            other.layers[1].mlp[1].weight.add_(1)
        assert not torch.equal(other(x), net(x))
    revnet.unconvert(net)
    assert type(net.layers[0].mlp) is kind
    assert not any("tile" in name for module in net.modules() for name in vars(module))
    assert torch.equal(net(x), before)


def test_what_cannot_run_in_tiles() -> None:
    for tile, error, text in (
        ({"ffn": 4}, ReversibleError, "no layer has a part 'ffn'"),
        ({"mlp": 0}, ValueError, "expected a positive number of tokens"),
        ({"mlp": True}, ValueError, "expected a positive number of tokens"),
    ):
        net = Net()
        with pytest.raises(error, match=text):
            revnet.convert(net, tile=tile)
        assert type(net.layers[0]) is Layer

    class Pair(nn.Module):
        def forward(self, x: Tensor, *others: Tensor) -> Any:
            return x + others[0] if others else (x, x)

    class Part(nn.Module):
        def __init__(self, two: bool) -> None:
            super().__init__()
            self.two, self.mlp = two, Pair()

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.mlp(x, x) if self.two else self.mlp(x)[0])

    for two, text in ((True, "is given a second tensor"), (False, "returns tuple")):
        net = nn.ModuleList([Part(two), Part(two)])
        revnet.convert(net, "", tile={"mlp": 4})
        with pytest.raises(ReversibleError, match=text):
            net[0](torch.randn(2, TOKENS, WIDTH))


def test_a_part_that_layers_share_is_cut_once() -> None:
    net, x = Net(), torch.randn(2, TOKENS, WIDTH)
    for layer in net.layers:
        layer.mlp = net.layers[0].mlp
        layer.alias = layer.mlp
    expected = gradients(net, x)
    revnet.convert(net, tile={"alias": 4})
    torch.testing.assert_close(gradients(net, x)[0].shape, expected[0].shape)
    revnet.unconvert(net)
    assert type(net.layers[0].mlp) is nn.Sequential
    assert all(map(torch.equal, gradients(net, x), expected))
