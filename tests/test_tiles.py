"""Steps in tiles: equal to the step over all tokens, in one tile's memory, with no work added."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import revnet
from cases import Attention, Mlp, noted, randn
from oracle import StoredSequence, stored_copy, weighted
from revnet import Reversible, ReversibleError, ReversibleSequence, SequentialSequence, Step, Tile
from revnet._execution import EXECUTIONS
from revnet.testing import check_tiles

WIDTH, TOKENS = 8, 10
SIZES = (1, 3, 5, 10, 64)


def pairs(depth: int = 3, dropout: float = 0.0) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(7)
    return [(Attention(WIDTH), Mlp(WIDTH, dropout)) for _ in range(depth)]


def results(net: nn.Module, x: Tensor, **given: Any) -> list[Tensor]:
    """Return the output and all gradients of one training step."""
    net.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    y = net(leaf, **given)
    weighted(y).backward()
    return [y.detach(), leaf.grad, *(p.grad for p in net.parameters())]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("execution", ["invert", "store", "checkpoint", "select"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_tiled_step_equals_the_step_over_all_tokens(batch: int, size: int, execution: str):
    blocks = pairs()
    x = randn(batch, TOKENS, WIDTH)
    net = ReversibleSequence(blocks, tile={"g": size}, execution=execution).double()
    assert_close(results(net, x), results(stored_copy(blocks), x))


@pytest.mark.parametrize("dim", [0, 1, 2, -2, -3])
def test_tokens_may_lie_in_any_dimension(dim: int):
    torch.manual_seed(0)
    blocks = [(Mlp(WIDTH), Mlp(WIDTH)) for _ in range(2)]
    x = randn(4, 5, 6, WIDTH)
    tile = {"f": Tile(2, dim=dim), "g": Tile(3, dim=dim)}
    net = ReversibleSequence(blocks, tile=tile).double()
    assert_close(results(net, x), results(stored_copy(blocks), x))


class Channels(nn.Module):
    """A linear map of the first dimension behind the batch, the tokens come last."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x).tanh()


def test_tokens_may_come_last():
    blocks = [(Channels(), Channels()) for _ in range(2)]
    x = randn(2, WIDTH, TOKENS)
    net = ReversibleSequence(blocks, tile={"f": Tile(4, dim=-1)}).double()
    assert_close(results(net, x), results(stored_copy(blocks), x))


@pytest.mark.parametrize("streams", ["fixed", revnet.Fixed(fraction_bits=37)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 2])
def test_fixed_streams_have_the_bits_of_stored_tiles(batch: int, dtype: torch.dtype, streams: Any):
    blocks = pairs(dropout=0.3)
    x = randn(batch, TOKENS, WIDTH).to(dtype)
    net = ReversibleSequence(blocks, tile={"g": 3}, streams=streams, execution="store").to(dtype)
    expected = results(net, x)
    for execution in EXECUTIONS[1:]:
        net.execution = execution
        assert_equal(results(net, x), expected)
    net.execution = [EXECUTIONS[i % len(EXECUTIONS)] for i in range(6)]
    assert_equal(results(net, x), expected)


def test_dropout_is_the_same_in_the_replay():
    net = ReversibleSequence(pairs(dropout=0.5), tile={"g": 4}).double()
    x = randn(2, TOKENS, WIDTH)
    found = results(net, x)
    state = torch.get_rng_state()
    net.execution = "store"
    assert_close(found, results(net, x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("execution", ["invert", "checkpoint"])
def test_each_tile_is_evaluated_twice_in_all(execution: str):
    def flops(**options: Any) -> tuple[int, int]:
        net = ReversibleSequence(pairs(), **options).double()
        with FlopCounterMode(display=False) as forward:
            loss = weighted(net(randn(2, TOKENS, WIDTH)))
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        return forward.get_total_flops(), backward.get_total_flops()

    forward, stored = flops(execution="store")
    assert flops(execution="store", tile={"g": 3}) == (forward, stored)
    tiled, rebuilt = flops(execution=execution, tile={"g": 3})
    whole, expected = flops(execution=execution)
    assert (tiled, rebuilt) == (whole, expected)
    assert tiled == forward > 0
    if execution == "invert":
        assert rebuilt - stored == forward


class Widening(nn.Module):
    """An MLP whose hidden activations are 16 times its input."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 16 * WIDTH), nn.Linear(16 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.gelu(self.enter(x)))


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("reads", ["tiles", "all"])
@pytest.mark.parametrize(
    ("dtype", "streams", "most"), [(torch.float32, "float", 4), (torch.bfloat16, "fixed", 8)]
)
def test_memory_grows_with_the_streams_alone(
    dtype: torch.dtype, streams: str, most: int, reads: str
):
    """In units of the input: two streams and two gradients, 4 in float32 and 8 in bfloat16.

    Where the last streams become the output there are 2 more. A branch that reads all tokens has 3:
    what it reads, what it adds, and the gradient of that.
    """
    size, counts = 2048, (4096, 16384, 65536)
    above = []
    for tokens in counts:
        tile = {"g": size} if reads == "all" else {"f": size, "g": size}
        first = (lambda: nn.Linear(WIDTH, WIDTH)) if reads == "all" else Widening
        blocks = [(first(), Widening()) for _ in range(2)]
        net = ReversibleSequence(blocks, tile=tile, streams=streams).to(dtype)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x = torch.randn(1, tokens, WIDTH).to(dtype)

        def step(net: nn.Module = net, x: Tensor = x) -> None:
            net(x).sum().backward()

        step()
        # On the CPU a fixed stream is encoded in pieces of 2^18 numbers, each twice in float64.
        scratch = 16 * min(x.numel(), 2**18) if streams == "fixed" else 0
        units = most + (3 if reads == "all" else 2)
        above.append(revnet.measure_memory(step).peak_bytes - units * x.nbytes - scratch)
    assert above[2] <= above[1] <= above[0] <= 5 * size * 16 * WIDTH * dtype.itemsize


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(("streams", "units"), [("float", 14), ("fixed", 20)])
def test_tiles_of_a_stream_have_memory_of_their_own(streams: str, units: int):
    """A view would keep the whole stream, until backward has replaced the last tile of it.

    In one block no step replaces the tiles of the first stream in forward. In bytes an element.
    """
    peaks = []
    for tokens in (4096, 8192):
        f = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        net = ReversibleSequence([(f, nn.Linear(64, 64))], tile={"g": 512}, streams=streams)
        net, x = net.bfloat16(), torch.randn(1, tokens, 64).bfloat16()

        def step(net: nn.Module = net, x: Tensor = x) -> None:
            net(x).sum().backward()

        step()
        peaks.append(revnet.measure_memory(step).peak_bytes)
    assert (peaks[1] - peaks[0]) / (4096 * 64) <= units + 0.01


@pytest.mark.usefixtures("no_collector")
def test_without_tiles_memory_grows_with_the_hidden_activations():
    """The meter of the test above sees them."""
    net = ReversibleSequence([(Widening(), Widening())])
    x = torch.randn(1, 4096, WIDTH)
    assert revnet.measure_memory(lambda: net(x).sum()).peak_bytes > 32 * x.nbytes


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: Any = None, shift: Any = None) -> Tensor:
        if isinstance(scale, dict):
            scale = scale["by"]
        out = self.linear(x).tanh()
        out = out if scale is None else out * scale
        return out if shift is None else out + shift


ROUTE = {"scale": (False, True), "shift": (False, True)}


def modulated() -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(1)
    return [(Attention(WIDTH), Modulated()) for _ in range(2)]


KEYWORDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "per-token": ({"scale": randn(2, TOKENS, 1, seed=5)}, {}),
    "per-token-gradient": ({"scale": randn(TOKENS, 1, seed=5, requires_grad=True)}, {}),
    "per-feature": ({"shift": randn(WIDTH, seed=6)}, {}),
    "both": ({"scale": randn(2, TOKENS, 1, seed=5), "shift": randn(2, 1, WIDTH, seed=6)}, {}),
    "number": ({"scale": 0.5}, {}),
    "tree": ({"scale": {"by": randn(2, TOKENS, 1, seed=5)}}, {}),
    "said": ({"scale": randn(2, TOKENS, 1, seed=5)}, {"scale": 1}),
    "said-from-the-end": ({"scale": randn(2, TOKENS, WIDTH, seed=5)}, {"scale": -2}),
}


@pytest.mark.parametrize(("given", "said"), KEYWORDS.values(), ids=KEYWORDS)
@pytest.mark.parametrize("execution", ["invert", "store"])
def test_keywords_are_cut_where_they_have_tokens(execution: str, given: Any, said: Any):
    blocks = modulated()
    tile = {"g": Tile(3, keywords=said)}
    net = ReversibleSequence(blocks, ROUTE, tile=tile, execution=execution).double()
    oracle = StoredSequence(copy.deepcopy(blocks), dict.fromkeys(ROUTE, ((False, True),) * 2))
    x = randn(2, TOKENS, WIDTH)
    leaves = [leaf for leaf in given.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    found = results(net, x, **given)
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    assert_close(found, results(oracle, x, **given))
    assert_close(gradients, [leaf.grad for leaf in leaves])
    for leaf in leaves:
        leaf.grad = None


def test_a_keyword_may_be_said_to_go_to_every_tile():
    blocks, x = modulated(), randn(2, TOKENS, TOKENS)
    for _, branch in blocks:
        branch.linear = nn.Linear(TOKENS, TOKENS).double()
    blocks = [(nn.Linear(TOKENS, TOKENS), g) for _, g in blocks]
    shift = randn(TOKENS, seed=2)
    oracle = StoredSequence(copy.deepcopy(blocks), {"shift": ((False, True),) * 2}).double()
    net = ReversibleSequence(blocks, ROUTE, tile={"g": Tile(4, keywords={"shift": None})}).double()
    assert_close(results(net, x, shift=shift), results(oracle, x, shift=shift))


@dataclasses.dataclass
class Box:
    by: Tensor


UNCLEAR = {
    "batch-is-tokens": (torch.ones(TOKENS, TOKENS, WIDTH), torch.ones(TOKENS), {}),
    "square": (torch.ones(2, TOKENS, WIDTH), torch.ones(TOKENS, TOKENS), {}),
    "box": (torch.ones(2, TOKENS, WIDTH), Box(torch.ones(TOKENS, 1)), {}),
}


@pytest.mark.parametrize(("x", "scale", "said"), UNCLEAR.values(), ids=UNCLEAR)
def test_an_unclear_keyword_is_refused(x: Tensor, scale: Any, said: Any):
    net = ReversibleSequence(modulated(), ROUTE, tile={"g": Tile(3, keywords=said)})
    with pytest.raises(ReversibleError, match=r"branch g: keyword 'scale', .*may or may not have"):
        net(x, scale=scale)


def test_a_keyword_said_to_have_tokens_must_have_them():
    net = ReversibleSequence(modulated(), ROUTE, tile={"g": Tile(3, keywords={"scale": 0})})
    with pytest.raises(ReversibleError, match=r"has not 10 tokens in dimension 0"):
        net(torch.ones(2, TOKENS, WIDTH), scale=torch.ones(2, TOKENS, 1))


class WithLoss(nn.Module):
    """An update, and a loss that is a sum over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        out = self.linear(x).tanh()
        return out, {"loss": out.square().sum(), "tokens": x.shape[-2], "none": None}


@pytest.mark.parametrize("execution", ["invert", "store"])
def test_extra_outputs_are_added_up(execution: str):
    torch.manual_seed(0)
    blocks = [(Attention(WIDTH), WithLoss()) for _ in range(2)]
    nets = [
        ReversibleSequence(copy.deepcopy(blocks), tile=tile).double() for tile in ({"g": 3}, {})
    ]
    nets[0].execution = execution
    x, found = randn(2, TOKENS, WIDTH), []
    for net in nets:
        y, aux = net(x)
        assert list(aux) == ["block 0, branch g", "block 1, branch g"]
        assert aux["block 1, branch g"]["tokens"] == TOKENS
        loss = sum(extra["loss"] for extra in aux.values())
        (weighted(y) + loss).backward()
        found.append([y, loss, *(p.grad for p in net.parameters())])
    assert_close(*found)


def test_extra_outputs_that_cannot_be_added_are_refused():
    class Listing(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x[..., 0]

    net = ReversibleSequence([(nn.Linear(8, 8), Listing(8, 8))], tile={"g": 4})
    with pytest.raises(ReversibleError, match=r"tile 2 of 3 returned an extra output that cannot"):
        net(torch.ones(1, TOKENS, WIDTH))


def test_a_few_gradients_and_a_second_backward():
    net = ReversibleSequence(pairs(), tile={"g": 3}).double()
    x = randn(2, TOKENS, WIDTH, requires_grad=True)
    expected = results(net, x)[1:]
    loss = weighted(net(x))
    wanted = [net.blocks[1].g.enter.weight, net.blocks[0].f.qkv.bias]
    names = dict(net.named_parameters())
    places = [next(i for i, p in enumerate(names.values()) if p is w) + 1 for w in wanted]
    for _ in range(2):
        found = torch.autograd.grad(loss, wanted, retain_graph=True)
        assert_close(list(found), [expected[i] for i in places])
    net.zero_grad()
    loss.backward()
    assert_close([x.grad, *(p.grad for p in net.parameters())], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_double_backward(dtype: torch.dtype):
    blocks = [(Attention(WIDTH), Mlp(WIDTH)) for _ in range(2)]
    x = randn(1, TOKENS, WIDTH).to(dtype)
    found = []
    for net in (
        ReversibleSequence(copy.deepcopy(blocks), tile={"g": 4}).to(dtype),
        stored_copy(blocks).double(),
    ):
        leaf = x.detach().clone().to(next(net.parameters()).dtype).requires_grad_()
        gradients = torch.autograd.grad(
            weighted(net(leaf)), [leaf, *net.parameters()], create_graph=True
        )
        sum(g.double().square().sum() for g in gradients).backward()
        found.append([leaf.grad.double(), *(p.grad.double() for p in net.parameters())])
    assert_close(*found, 1e-10 if dtype is torch.float64 else 0.2)


def test_gradcheck():
    blocks = [(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh())) for _ in range(2)]
    net = ReversibleSequence(blocks, tile={"g": 2}).double()
    x = randn(1, 5, 3, requires_grad=True)
    assert torch.autograd.gradcheck(net, x)
    assert torch.autograd.gradgradcheck(net, x)


class Chooses(nn.Module):
    """Chooses by a coin that torch's generators do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flipped = revnet.remember(torch.tensor(next(COINS)))
        noted(self).append(bool(flipped))
        return self.linear(x).sin() if flipped else self.linear(x).cos()


COINS = itertools.cycle([True, False, False])


def test_decisions_are_remembered_tile_by_tile():
    torch.manual_seed(0)
    branch = Chooses()
    net = ReversibleSequence([(nn.Linear(WIDTH, WIDTH), branch)], tile={"g": 3}).double()
    weighted(net(randn(1, TOKENS, WIDTH))).backward()
    seen = noted(branch)
    assert seen[:4] == seen[4:][::-1]
    assert True in seen
    assert False in seen


def test_hooks_of_the_branch_see_each_tile_and_those_of_parameters_one_gradient():
    net = ReversibleSequence(pairs(1), tile={"g": 3}).bfloat16()
    branch, calls = net.blocks[0].g, []
    branch.register_forward_hook(lambda *_: calls.append(revnet.replaying()))
    back, whole, accumulated = [], [], []
    branch.register_full_backward_hook(lambda *_: back.append(1))
    weight = branch.enter.weight
    weight.register_hook(lambda grad: whole.append(grad.dtype))
    weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.dtype))
    x = randn(1, TOKENS, WIDTH).bfloat16()
    net(x).sum().backward()
    assert calls == [False] * 4 + [True] * 4
    assert len(back) == 4
    assert whole == accumulated == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tied_parameters(dtype: torch.dtype):
    torch.manual_seed(0)
    shared = Mlp(WIDTH)
    shared.leave.weight = nn.Parameter(shared.enter.weight.detach().t().clone())
    again = Mlp(WIDTH)
    again.enter = shared.enter
    blocks = [(Attention(WIDTH), shared), (shared, again)]
    net = ReversibleSequence(blocks, tile={"f": 100, "g": 3}).to(dtype)
    oracle = stored_copy(blocks).double()
    x = randn(1, TOKENS, WIDTH).to(dtype)
    found, expected = results(net, x), results(oracle, x.double())
    assert_close([t.double() for t in found], expected, 1e-12 if dtype is torch.float64 else 0.1)


@pytest.mark.parametrize("count", [1, 16, 128])
def test_weight_gradients_in_bfloat16_are_as_near_as_those_of_one_call(count: int):
    torch.manual_seed(0)
    blocks = [(nn.Linear(32, 32), Mlp(32)) for _ in range(2)]
    tokens = 4096
    x, weight = torch.randn(2, 1, tokens, 32).bfloat16()

    def gradients(dtype: torch.dtype, tile: dict[str, int]) -> dict[str, Tensor]:
        net = ReversibleSequence(copy.deepcopy(blocks), tile=tile).bfloat16().to(dtype)
        (net(x.to(dtype)) * weight.to(dtype)).sum().backward()
        return {n: p.grad.double() for n, p in net.named_parameters()}

    true = gradients(torch.float64, {})
    once = gradients(torch.bfloat16, {})
    tiled = gradients(torch.bfloat16, {"g": tokens // count})
    for name, gradient in true.items():
        error = [(each[name] - gradient).norm() for each in (tiled, once)]
        # One call rounds the gradient of a linear bias once, torch that of each tile as well: two
        # roundings are √2 times as far off.
        twice = name.endswith(("enter.bias", "leave.bias"))
        assert error[0] <= (2.0 if twice else 1.2) * error[1], name


def test_a_bias_gradient_is_rounded_once_by_each_tile_and_once_in_all():
    """Nothing is lost but what torch rounds within a tile."""
    torch.manual_seed(0)
    branch = nn.Linear(32, 32)
    net = ReversibleSequence([(nn.Linear(32, 32), branch)], tile={"g": 32}).bfloat16()
    sums = []

    def note(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        sums.append(grad_output[0].double().sum((0, 1)).bfloat16().double())

    branch.register_full_backward_hook(note)
    x, weight = torch.randn(2, 1, 4096, 32).bfloat16()
    (net(x) * weight).sum().backward()
    assert len(sums) == 128
    expected = torch.stack(sums).sum(0)
    # A tie that float32 rounds the other way is one unit of one of the tiles.
    off = (branch.bias.grad.double() - expected).abs() / expected.abs()
    assert off.max() <= 2**-8
    assert (branch.bias.grad == expected.bfloat16()).double().mean() >= 0.9


def test_weight_gradients_under_autocast_are_added_up_in_float32():
    torch.manual_seed(0)
    blocks = [(nn.Linear(32, 32), Mlp(32))]
    x, weight = torch.randn(2, 1, 4096, 32)

    def gradients(autocast: bool, tile: dict[str, int]) -> dict[str, Tensor]:
        net = ReversibleSequence(copy.deepcopy(blocks), tile=tile, streams="fixed")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
        (y * weight).sum().backward()
        return {n: p.grad for n, p in net.named_parameters() if p.dim() == 2}

    true, once, tiled = gradients(False, {}), gradients(True, {}), gradients(True, {"g": 32})
    for name, gradient in true.items():
        error = [(each[name] - gradient).norm() for each in (tiled, once)]
        assert error[0] <= 1.2 * error[1], name


@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_inverse(streams: str):
    dtype = torch.float64 if streams == "float" else torch.bfloat16
    net = ReversibleSequence(pairs(), tile={"g": 3}, streams=streams).to(dtype)
    x1, x2 = randn(2, 1, TOKENS, WIDTH).to(dtype)
    y1, y2 = net.run(x1, x2)
    found = net.inverse(y1, y2)
    assert_close(list(found), [x1, x2], 1e-12 if streams == "float" else 0.05)
    executions = {}
    for execution in ("invert", "store"):
        net.execution = execution
        leaf = y1.detach().clone().requires_grad_()
        weighted(*net.inverse(leaf, y2.detach())).backward()
        executions[execution] = leaf.grad
    assert_close([executions["invert"]], [executions["store"]], 1e-12 if streams == "float" else 0)


def test_the_sequential_twin():
    blocks = pairs()
    x = randn(2, TOKENS, WIDTH)
    expected = results(SequentialSequence(blocks).double(), x)
    for execution in ("store", "checkpoint", "select"):
        net = SequentialSequence(blocks, tile={"g": 4}, execution=execution).double()
        assert_close(results(net, x), expected)


class Total(nn.Module):
    """Reads two streams, the second of which has other features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return (self.a(x) + self.b(z)).tanh()


def program(tile: Callable[[int], Any], **options: Any) -> Reversible:
    torch.manual_seed(0)
    mix = Attention(WIDTH)
    steps = [
        Step(Total(), 0, (1, 2), tile=tile(3)),
        Step(mix, 1, 0),
        Step(nn.Linear(WIDTH, 2 * WIDTH), 2, 1, tile=tile(4)),
        Step(Total(), 1, (0, 2), revnet.Leapfrog(0.5), tile=tile(3)),
        Step(mix, 0, 1),
        Step(Mlp(WIDTH), 0, 0, tile=tile(3)),
        Step(None, 1, 0),
        Step(nn.Linear(WIDTH, WIDTH), 1, 1),
    ]
    return Reversible(steps, **options)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("taps", [None, [1, 3, 6]])
def test_programs_mix_tiles_of_several_sizes(taps: Any, execution: str):
    xs = [randn(2, TOKENS, WIDTH), randn(2, TOKENS, WIDTH), randn(2, TOKENS, 2 * WIDTH)]
    found = []
    for net in (program(lambda size: size, execution=execution), program(lambda _: None)):
        net.double()
        leaves = [x.clone().requires_grad_() for x in xs]
        *ys, tapped = net(*leaves, taps=taps) if taps else (*net(*leaves), [])
        read = [leaf for streams in tapped for leaf in streams]
        weighted(*ys, *read).backward()
        found.append([*ys, *read, *(x.grad for x in leaves), *(p.grad for p in net.parameters())])
    assert_close(*found)


def test_programs_in_fixed_streams_have_the_bits_of_stored_tiles():
    xs = [randn(2, TOKENS, WIDTH), randn(2, TOKENS, WIDTH), randn(2, TOKENS, 2 * WIDTH)]
    found = []
    for execution in EXECUTIONS:
        net = program(lambda size: size, execution=execution).bfloat16()
        ys = net(*(x.bfloat16() for x in xs))
        weighted(*ys).backward()
        found.append([*ys, *(p.grad for p in net.parameters())])
    for other in found[1:]:
        assert_equal(other, found[0])


class Drifting(revnet.Coupling):
    """A rule that saves a tensor."""

    def increment(self, out: Any) -> Any:
        return out.tanh()


@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_rules_that_save_a_tensor(streams: str):
    torch.manual_seed(0)
    found = []
    for tile, execution in ((3, "invert"), (3, "store"), (None, "invert")):
        torch.manual_seed(0)
        steps = [
            Step(
                nn.Linear(WIDTH, WIDTH), i % 2, 1 - i % 2, Drifting(), tile=tile if i % 3 else None
            )
            for i in range(6)
        ]
        net = Reversible(steps, streams=streams, execution=execution).float()
        ys = net(*randn(2, 2, TOKENS, WIDTH).float())
        weighted(*ys).backward()
        found.append([*ys, *(p.grad for p in net.parameters())])
    if streams == "fixed":
        assert_equal(found[0], found[1])
    assert_close(found[0], found[1], 1e-5)
    assert_close(found[0], found[2], 1e-5)


@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_slices_in_turn_equal_the_whole(streams: str):
    dtype = torch.float64 if streams == "float" else torch.bfloat16
    net = ReversibleSequence(pairs(4), tile={"g": 3}, streams=streams).to(dtype)
    halves = [net[:1], net[1:3], net[3:]]
    assert halves[1].tile == net.tile
    halves[1].tile = {"g": 4}
    x = randn(2, TOKENS, WIDTH).to(dtype)

    def chained(x: Tensor) -> tuple[Tensor, Tensor]:
        streams = x, x
        for half in halves:
            streams = half.run(*streams)
        return streams

    found = []
    for run in (chained, lambda x: net.run(x, x)):
        net.zero_grad()
        ys = run(x)
        weighted(*ys).backward()
        found.append([*ys, *(p.grad for p in net.parameters())])
    assert_close(*found, 1e-12 if streams == "float" else 0.05)
    halves[1].tile = net.tile
    net.zero_grad()
    ys = chained(x)
    weighted(*ys).backward()
    if streams == "fixed":
        assert_equal([*ys, *(p.grad for p in net.parameters())], found[1])


@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_blocks_with_hooks_and_under_a_checkpoint(streams: str):
    dtype = torch.float64 if streams == "float" else torch.bfloat16
    net = ReversibleSequence(pairs(dropout=0.2), tile={"g": 3}, streams=streams).to(dtype)
    x = randn(2, TOKENS, WIDTH).to(dtype)
    expected = results(net, x)
    calls: list[int] = []
    handles = [b.register_forward_hook(lambda *_: calls.append(1)) for b in net.blocks]
    assert_close(results(net, x), expected, 1e-12 if streams == "float" else 0)
    assert len(calls) == 3
    for handle in handles:
        handle.remove()
    block = net.blocks[1]
    inner = block.forward
    block.forward = lambda *args: checkpoint(inner, *args, use_reentrant=False)
    assert_close(results(net, x), expected, 1e-12 if streams == "float" else 0)


def test_a_block_called_by_itself_runs_in_tiles():
    net = ReversibleSequence(pairs(1), tile={"g": 3}).double()
    seen = []
    net.blocks[0].g.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[1]))
    x1, x2 = randn(2, 1, TOKENS, WIDTH)
    assert_close(list(net.blocks[0](x1, x2)), list(net.run(x1, x2)))
    assert seen == [3, 3, 3, 1] * 2


def test_without_gradients_and_under_other_options():
    net = ReversibleSequence(pairs(dropout=0.1), tile={"g": 3}, determinism_check="exact").double()
    x = randn(1, TOKENS, WIDTH)
    found = results(net, x)
    plain = ReversibleSequence(net, tile={"g": 3}, preserve_rng_state=True, execution="store")
    assert_close(found, results(plain, x))
    with torch.no_grad():
        torch.manual_seed(3)
        assert_close([net(x)], found[:1])


def test_a_branch_that_is_not_deterministic_is_found_by_tile():
    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(COUNT)

    COUNT = iter(range(1, 100))
    net = Reversible(
        [Step(Counts(WIDTH, WIDTH), 0, 1, tile=4), Step(nn.Linear(WIDTH, WIDTH), 1, 0)],
        streams="fixed",
        determinism_check="exact",
    ).bfloat16()
    ys = net(*randn(2, 1, TOKENS, WIDTH).bfloat16())
    with pytest.raises(ReversibleError, match=r"step 0, tile 2 of 3 is not deterministic"):
        ys[0].sum().backward()


def test_an_ordinary_function_may_be_a_branch():
    weight = randn(WIDTH, WIDTH, requires_grad=True)
    found = []
    for tile in (3, None):
        weight.grad = None
        net = Reversible([Step(lambda x: (x @ weight).sin(), i, 1 - i, tile=tile) for i in (0, 1)])
        ys = net(*randn(2, 2, TOKENS, WIDTH))
        weighted(*ys).backward()
        found.append([*ys, weight.grad])
    assert_close(*found)


class Nested(nn.Module):
    """A small reversible network as a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ReversibleSequence([(Mlp(WIDTH, 0.3), Mlp(WIDTH)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp(WIDTH, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [Nested, Checkpointed])
def test_branches_that_recompute_by_themselves(kind: type[nn.Module]):
    torch.manual_seed(0)
    net = ReversibleSequence([(Attention(WIDTH), kind()) for _ in range(2)], tile={"g": 4})
    net.bfloat16()
    x = randn(1, TOKENS, WIDTH).bfloat16()
    found = results(net, x)
    net.execution = "store"
    assert_equal(found, results(net, x))
    assert all(
        type(p) is nn.Parameter
        for m in net.modules()
        for p in m._parameters.values()
        if p is not None
    )


def test_an_exception_in_a_tile_leaves_the_parameters():
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] < 4:
                raise OSError("a tile")
            return super().forward(x)

    net = ReversibleSequence([(nn.Linear(8, 8), Fails(8, 8))], tile={"g": 4}).bfloat16()
    with pytest.raises(OSError, match="a tile") as caught:
        net(torch.ones(1, TOKENS, WIDTH).bfloat16())
    assert "In block 0, branch g, tile 2 of 3, Fails" in str(caught.value.__notes__)
    assert type(net.blocks[0].g.weight) is nn.Parameter
    net.tile = {}
    net(torch.ones(1, TOKENS, WIDTH).bfloat16()).sum().backward()


def test_frozen_parameters_and_inputs_without_gradient():
    blocks = pairs()
    for parameter in blocks[1][1].parameters():
        parameter.requires_grad_(False)
    net = ReversibleSequence(blocks, tile={"g": 3}).bfloat16()
    net(randn(1, TOKENS, WIDTH).bfloat16()).sum().backward()
    frozen = [p for p in net.parameters() if not p.requires_grad]
    assert len(frozen) == 6
    assert all((p.grad is None) is not p.requires_grad for p in net.parameters())


def test_state_and_copies_know_nothing_of_tiles():
    net = ReversibleSequence(pairs(1), tile={"g": 3})
    assert "tile={'g': Tile(size=3" in repr(net)
    assert list(net.state_dict()) == list(ReversibleSequence(pairs(1)).state_dict())
    other = copy.deepcopy(net)
    other.tile = {}
    assert net.tile == {"g": Tile(3)}
    assert other.tile == {}
    x = randn(1, TOKENS, WIDTH).float()
    torch.testing.assert_close(other(x), net(x))


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "zero": (lambda: Tile(0), ValueError, "at least one token"),
    "float": (lambda: Tile(4.0), TypeError, "a number of tokens"),
    "letter": (
        lambda: ReversibleSequence(pairs(1), tile={"h": 4}),
        ValueError,
        "names 'h', but the branches of a block are f and g",
    ),
    "rule": (
        lambda: ReversibleSequence(pairs(1), tile={"g": 4}, coupling=revnet.Momentum(0.9)),
        ValueError,
        "tile works with rules that add to the target",
    ),
    "step-rule": (
        lambda: Step(nn.Linear(8, 16), 0, 1, revnet.Affine(), tile=4),
        ValueError,
        "tile works with rules that add to the target",
    ),
    "no-branch": (lambda: Step(None, 1, 0, tile=4), ValueError, "needs a branch"),
    "tree": (
        lambda: Reversible([Step(lambda x: x, 0, 1, tile=1)])(
            [torch.ones(2, 2)], [torch.ones(2, 2)]
        ),
        ReversibleError,
        "stream 0 is a tree of tensors",
    ),
    "dimension": (
        lambda: ReversibleSequence(pairs(1), tile={"g": Tile(2, dim=3)})(torch.ones(1, 4, 8)),
        ReversibleError,
        "has no dimension 3",
    ),
    "tokens": (
        lambda: Reversible([Step(nn.Linear(8, 8), 0, 1, tile=2)])(
            torch.ones(1, 4, 8), torch.ones(1, 5, 8)
        ),
        ReversibleError,
        "differ in dimension -2",
    ),
    "scaled": (
        lambda: Reversible(
            [Step(nn.Linear(8, 8), 0, 1, revnet.Momentum(0.5)), Step(nn.Linear(8, 8), 0, 1, tile=2)]
        ).bfloat16()(*torch.ones(2, 1, 4, 8).bfloat16()),
        ReversibleError,
        "a stream that another step multiplies",
    ),
    "shape": (
        lambda: Reversible([Step(nn.Linear(8, 4), 0, 1, tile=2)])(*torch.ones(2, 1, 4, 8)),
        ReversibleError,
        "step 0, tile 0 of 2 returned",
    ),
    "whole-shape": (
        lambda: Reversible([Step(nn.Linear(8, 8), 0, 1, tile=2), Step(nn.Linear(8, 4), 0, 1)])(
            *torch.ones(2, 1, 4, 8)
        ),
        ReversibleError,
        r"step 1 returned a tensor \(1, 4, 4\).*\(1, 4, 8\)",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], Any], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        call()


class Positions(nn.Linear):
    """Adds what it counts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.arange(x.shape[1], dtype=x.dtype)[:, None]


class Normed(nn.Module):
    """Batch norm over batch and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


class TopTokens(nn.Module):
    """Expert choice: the largest tokens alone are changed, chosen without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x.detach().norm(dim=-1)
        return x.sin() * (scores >= scores.topk(3, -1).values[:, -1:])[..., None]


MIXING = {
    "attention": (Attention(WIDTH), "Attention mixes tokens: the output of tile 1 of 3 depends on"),
    "batch-norm": (Normed(), "Normed mixes tokens: the output of tile 0 of 3 depends on"),
    "positions": (Positions(WIDTH, WIDTH), "Positions gives another output for tile 1 of 3"),
    "expert-choice": (TopTokens(), "TopTokens gives another output for tile"),
}


@pytest.mark.parametrize(("branch", "message"), MIXING.values(), ids=MIXING)
def test_check_tiles_finds_branches_that_mix_tokens(branch: nn.Module, message: str):
    with pytest.raises(ReversibleError, match=message):
        check_tiles(branch, torch.randn(2, TOKENS, WIDTH), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_tiles_passes_branches_of_single_tokens(dtype: torch.dtype):
    x = torch.randn(2, TOKENS, WIDTH).to(dtype)
    for branch in (Mlp(WIDTH), Mlp(WIDTH, dropout=0.5), Normed().eval(), Modulated()):
        branch.to(dtype)
        state = torch.get_rng_state()
        check_tiles(branch, x, 4)
        assert torch.equal(torch.get_rng_state(), state)
    check_tiles(Modulated().to(dtype), x, Tile(4), scale=x[..., :1])
    with pytest.raises(ValueError, match="one tile of 10"):
        check_tiles(Mlp(WIDTH).to(dtype), x, 10)


def compiled_results(net: ReversibleSequence, call: Callable[..., Any]) -> list[Tensor]:
    net.zero_grad()
    y = call(randn(1, TOKENS, WIDTH).bfloat16())
    weighted(y).backward()
    return [y.detach(), *(p.grad for p in net.parameters())]


def linear_pairs() -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(0)
    return [(nn.Linear(WIDTH, WIDTH), Widening())]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_branches_and_a_compiled_sequence_give_the_same_bits():
    net = ReversibleSequence(linear_pairs(), tile={"g": 5}).bfloat16()
    expected = compiled_results(net, net)
    torch._dynamo.reset()
    assert_equal(compiled_results(net, torch.compile(net, backend="eager")), expected)
    for block in net.blocks:
        block.g.compile(backend="eager")
    assert_equal(compiled_results(net, net), expected)
    torch._dynamo.reset()


def test_one_graph_of_the_whole_refuses_tiles_and_says_what_to_do():
    torch._dynamo.reset()
    net = ReversibleSequence(linear_pairs(), tile={"g": 4})
    whole = torch.compile(net, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a step runs in tiles"):
        whole(torch.ones(1, TOKENS, WIDTH))
    # What is not evaluated again is one graph, of all tokens at once.
    x = torch.randn(1, TOKENS, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), net(x))
    torch._dynamo.reset()


def test_transforms_see_all_tokens_at_once():
    net = ReversibleSequence(pairs(2), tile={"g": 4}).double()
    x = randn(1, TOKENS, WIDTH)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    net(x).square().sum().backward()
    assert_close(
        [gradients[n] for n, _ in net.named_parameters()], [p.grad for p in net.parameters()]
    )


# torch itself scripts a decomposition for forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_other_ways_to_differentiate(streams: str):
    net = ReversibleSequence(pairs(2), tile={"g": 4}, streams=streams).float()
    plain = ReversibleSequence(net, streams=streams)
    x, v = torch.randn(2, 1, TOKENS, WIDTH)
    tangents = []
    for each in (net, plain):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(each(forward_ad.make_dual(x, v))).tangent)
    torch.testing.assert_close(*tangents)
    torch.testing.assert_close(make_fx(net)(x)(x), net(x))
    leaf = x.clone().requires_grad_()
    wanted = [leaf, net.blocks[0].g.enter.weight]
    y = net(leaf)
    grads = torch.randn(3, *y.shape)
    many = torch.autograd.grad(y, wanted, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(y, wanted, grad, retain_graph=True)
        for a, b in zip(many, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


def test_plans_know_tiles():
    net = ReversibleSequence(linear_pairs(), tile={"g": 128})
    x = torch.randn(1, 1024, WIDTH)
    peaks = []
    for tile in (net.tile, {}):
        net.tile = tile
        net.execution = plan = revnet.plan(net, x, "minimum")
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        measured = revnet.measure_memory(lambda: net(x)).peak_bytes
        assert 0.98 * measured <= plan.peak_bytes <= 1.02 * measured
        peaks.append(plan.peak_bytes)
    assert peaks[0] < peaks[1] / 2


def test_a_plan_chooses_the_tiles_and_sets_them(tmp_path: Path):
    net, x = ReversibleSequence(linear_pairs(), tile={"g": 64}), torch.randn(1, 512, WIDTH)
    smallest, largest = revnet.plan(net, x, ["minimum", 10**9], tile_sizes=(128, 512))
    assert net.tile["g"].size == 64
    assert smallest.tile == 128
    assert largest.tile in (128, 512)
    assert largest.seconds <= smallest.seconds
    largest.save(tmp_path / "plan.json")
    net.execution = revnet.Plan.load(tmp_path / "plan.json")
    assert net.tile["g"].size == largest.tile
    net.execution = smallest
    assert net.tile["g"].size == 128
    with pytest.raises(ReversibleError, match="no plan is within"):
        revnet.plan(net, x, 1000, tile_sizes=[128])
    assert net.tile["g"].size == 128


def test_the_curve_of_time_against_memory_goes_over_tiles():
    net, x = ReversibleSequence(linear_pairs(), tile={"g": 64}), torch.randn(1, 512, WIDTH)
    budgets = ["minimum", 2 * 10**5, 4 * 10**5, 10**9]
    curve = revnet.plan(net, x, budgets, tile_sizes=(32, 128, 512))
    seconds, peaks = [plan.seconds for plan in curve], [plan.peak_bytes for plan in curve]
    assert seconds == sorted(seconds, reverse=True)
    assert all(peak <= plan.budget for peak, plan in zip(peaks, curve, strict=True))
    # Relative to one stored execution, not each to that in its own tiles.
    slowdowns = [plan.slowdown for plan in curve]
    assert slowdowns == sorted(slowdowns, reverse=True)
    assert min(slowdowns) >= 0.99
    # Sixteen tiles take many times as long as one, which takes several times as much memory.
    assert curve[0].tile == 32
    assert curve[-1].tile > 32
    assert seconds[-1] < seconds[0]
    assert peaks[-1] > 2 * peaks[0]
    for plan in curve:
        net.execution = plan
        assert net.tile["g"].size == plan.tile
        assert re.search(rf"^tiles +{plan.tile} +tokens$", str(plan), re.MULTILINE)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert 0.98 <= revnet.measure_memory(lambda: net(x)).peak_bytes / plan.peak_bytes <= 1.02


def test_a_plan_on_paper_chooses_the_tiles_of_a_program():
    steps = [Step(nn.Linear(WIDTH, WIDTH), 0, 1), Step(Widening(), 1, 0, tile=64)]
    net = Reversible(steps).to("meta")
    x = tuple(torch.empty(2, 1, 512, WIDTH, device="meta"))
    smallest, largest = revnet.plan(net, x, ["minimum", 10**9], tile_sizes=(128, 512))
    assert smallest.tile == 128
    assert largest.seconds <= smallest.seconds
    assert net[1].tile.size == 64
    net.execution = smallest
    assert net[1].tile.size == 128


def test_a_plan_of_tiles_needs_tiles():
    with pytest.raises(ValueError, match="no step of this sequence runs in tiles"):
        revnet.plan(ReversibleSequence(linear_pairs()), torch.ones(1, 4, 8), tile_sizes=[2])
