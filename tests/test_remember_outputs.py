"""Routers of mixtures of experts, whose near ties rounding tips in a replay."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Mlp
from oracle import gradients_of, relative_error, weighted
from revnet import (
    ReversibleError,
    ReversibleSequence,
    measure_memory,
    remember_outputs,
    replaying,
)
from revnet._state import outputs

WIDTH, TOKENS, DEPTH = 8, 256, 4


class Scores(nn.Module):
    """Pairs of scores that differ by rounding alone: one sum, taken in two orders.

    Their parameters are apart, so that the gradient shows which of them was chosen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, WIDTH))
        self.twin = nn.Parameter(self.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        forwards = (x[..., None, :] * self.weight).sum(-1)
        backwards = sum((x[..., None, :] * self.twin).flip(-1).unbind(-1))
        return torch.stack((forwards, backwards), -1).flatten(-2)


class Router(nn.Module):
    """Returns the weights of the best expert and which it is."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = Scores()

    def forward(self, x: Tensor) -> Any:
        weights, experts = self.scores(x).softmax(-1).topk(1, -1)
        return weights, experts


class Dicts(Router):
    def forward(self, x: Tensor) -> Any:
        weights, experts = super().forward(x)
        return {"weights": [weights, None], "experts": experts}


class Sliced(Router):
    """Returns parts of larger tensors, whose strides are others."""

    def forward(self, x: Tensor) -> Any:
        weights, experts = self.scores(x).softmax(-1).sort(-1, descending=True)
        return weights[..., :1], experts[..., :1]


class Compares(Router):
    """Decides by a comparison and a search, without topk."""

    def forward(self, x: Tensor) -> Any:
        scores = self.scores(x)
        first = scores[..., 1] > scores[..., 0]
        experts = first.long()[..., None]
        return scores.gather(-1, experts).sigmoid(), experts


class Mixture(nn.Module):
    """Experts without parameters in common: a token at another one has another gradient."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def routed(self, x: Tensor) -> Any:
        found = self.router(x)
        return (found["weights"][0], found["experts"]) if isinstance(found, dict) else found

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.routed(x)
        outs = torch.stack([expert(x) for expert in self.experts], -2)
        place = experts[..., None].expand(*experts.shape, WIDTH)
        return outs.gather(-2, place).squeeze(-2) * weights


class FromScores(Mixture):
    """Chooses outside of the module that scores, as many models do."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__(router.scores)

    def routed(self, x: Tensor) -> Any:
        return self.router(x).softmax(-1).topk(1, -1)


class Dispatched(Mixture):
    """Gives each expert its tokens alone, as many as there are."""

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.routed(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.where(experts[..., 0] == i)
            out = out.index_put(rows, expert(x[rows]) * weights[rows])
        return out


CASES: dict[str, Callable[[], Mixture]] = {
    "topk": lambda: Mixture(Router()),
    "dict": lambda: Mixture(Dicts()),
    "slice": lambda: Mixture(Sliced()),
    "comparison": lambda: Mixture(Compares()),
    "scores": lambda: FromScores(Router()),
    "dispatched": lambda: Dispatched(Router()),
}


def network(make: Callable[[], Mixture], **options: Any) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([(Mlp(WIDTH, 0.1), make()) for _ in range(DEPTH)], **options)


def routers(net: ReversibleSequence) -> list[nn.Module]:
    return [block.g.router for block in net]


def trained(net: ReversibleSequence, execution: str = "invert") -> dict[str, Tensor | None]:
    net.zero_grad()
    net.execution = execution
    torch.manual_seed(1)
    weighted(net(torch.randn(TOKENS, WIDTH))).backward()
    return gradients_of(net)


def error(found: Any, expected: Any) -> float:
    return max(
        relative_error(found[name], each) for name, each in expected.items() if each is not None
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_router_under_it_routes_replays_as_the_forward(case: Callable[[], Mixture]):
    net = network(case, streams="float")
    expected = trained(net, "store")
    try:
        tipped = error(trained(net), expected)
    except ReversibleError:
        tipped = 1.0
    assert tipped > 1e-3, "no near tie was tipped: this test shows nothing"
    handles = [remember_outputs(router) for router in routers(net)]
    assert error(trained(net, "store"), expected) == 0
    assert error(trained(net), expected) < 1e-4
    for handle in handles:
        handle.remove()
    with remember_outputs(net[0].g.router):
        assert net[0].g.router._forward_hooks
    assert all(not router._forward_hooks for router in routers(net))
    assert all(not router._forward_pre_hooks for router in routers(net))


def test_the_error_of_a_near_tie_says_what_to_do():
    net = network(CASES["dispatched"], streams="float")
    with pytest.raises(
        ReversibleError, match=r"near tie: use streams='fixed', or revnet\.remember_"
    ):
        trained(net)
    net.streams = "fixed"
    expected = trained(net, "store")
    assert error(trained(net), expected) == 0


def test_integers_made_inside_are_kept_and_not_only_those_returned(
    monkeypatch: pytest.MonkeyPatch,
):
    """The gradient of topk goes by the indices that it saved."""
    net = network(CASES["topk"], streams="float")
    expected = trained(net, "store")
    for router in routers(net):
        remember_outputs(router)
    assert error(trained(net), expected) < 1e-4
    monkeypatch.setattr(outputs, "_decided", lambda out: out)
    assert error(trained(net), expected) > 1e-3


@pytest.mark.parametrize("execution", ["checkpoint", "select", "offload"])
def test_other_executions(execution: str):
    net = network(CASES["topk"])
    expected = trained(net, "store")
    for router in routers(net):
        remember_outputs(router)
    assert error(trained(net, execution), expected) < 1e-6


def test_memory_is_that_of_what_the_router_decides_and_returns():
    net = network(CASES["topk"], streams="float")
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    net.eval()(x)
    before = measure_memory(net, x).saved_bytes
    for router in routers(net):
        remember_outputs(router)
    # Indices from inside; weights and indices as they were returned.
    assert measure_memory(net, x).saved_bytes == before + DEPTH * TOKENS * (8 + 4 + 8)


def test_outside_of_reversible_steps_it_does_nothing():
    torch.manual_seed(0)
    router = Router()
    x = torch.randn(TOKENS, WIDTH)
    expected = router(x)
    remember_outputs(router)
    weights, experts = router(x)
    assert torch.equal(weights, expected[0])
    assert torch.equal(experts, expected[1])
    with pytest.raises(RuntimeError):
        router(torch.randn(2, 3))
    assert torch.equal(torch.compile(router, backend="eager")(x)[1], experts)


def test_an_error_or_an_interrupt_leaves_no_mode_behind():
    class Raises(Router):
        error: BaseException | None = None

        def forward(self, x: Tensor) -> Any:
            if self.error is not None:
                raise self.error
            return super().forward(x)

    net = network(lambda: Mixture(Raises()))
    for router in routers(net):
        remember_outputs(router)
    for net[2].g.router.error in (ValueError("its own"), KeyboardInterrupt()):
        with pytest.raises((ValueError, KeyboardInterrupt)):
            trained(net)
        assert torch._C._len_torch_dispatch_stack() == 0
    net[2].g.router.error = None
    trained(net)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_copies_remember_too():
    net = network(CASES["topk"], streams="float")
    expected = trained(net, "store")
    for router in routers(net):
        remember_outputs(router)
    assert error(trained(copy.deepcopy(net)), expected) < 1e-4
    saved = pickle.dumps(net[0].g.router._forward_hooks)
    assert len(pickle.loads(saved)) == 1


def test_a_router_that_decides_otherwise_is_named():
    class Twice(Router):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return (*found, found[1]) if replaying() else found

    class Takes(Mixture):
        def routed(self, x: Tensor) -> Any:
            return self.router(x)[:2]

    net = network(lambda: Takes(Twice()))
    remember_outputs(net[0].g.router)
    with pytest.raises(ReversibleError, match=r"block 0, branch g: decision 3.*remember_outputs"):
        trained(net)


def test_a_container_that_hides_its_tensors_is_refused():
    @dataclass
    class Routes:
        experts: Tensor

    class Hides(Router):
        def forward(self, x: Tensor) -> Any:
            return Routes(super().forward(x)[1])

    class Takes(Mixture):
        def routed(self, x: Tensor) -> Any:
            experts = self.router(x).experts
            return experts.float(), experts

    net = network(lambda: Takes(Hides()))
    remember_outputs(net[0].g.router)
    with pytest.raises(TypeError, match=r"Hides returned Routes, which holds no tensors"):
        trained(net)
