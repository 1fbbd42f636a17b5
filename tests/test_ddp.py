"""DistributedDataParallel on two gloo ranks: gradients equal to one process over the whole
batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cases import BY_NAME, OLD_TORCH, Linear, Mlp, Unused, build, every, randn, with_dropout
from oracle import Evaluations, assert_near, stored_copy, weighted
from parallel import Check, every_execution, every_program, run_checks
from revnet import ReversibleError, ReversibleSequence
from revnet._distributed import shared_generator

# Many checks share one start of the ranks.
pytestmark = pytest.mark.timeout(300)

STEPS = 3


class Whole(nn.Module):
    """A sequence between two layers, as in a real model."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.enter, self.leave = build([(Linear, Linear)], 8, seed=5)[0]
        self.body = body

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return self.leave(self.body(self.enter(x), **given))


def train_against_one_process(
    rank: int,
    world_size: int,
    net: nn.Module,
    oracle: nn.Module,
    label: str,
    given: dict | None = None,
    **options: Any,
) -> DistributedDataParallel:
    """Raises unless every step's gradients, and the weights after it, are those of one process over
    all ranks' data.
    """
    model = DistributedDataParallel(net, **options)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.01) for module in (net, oracle)]
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.manual_seed(step)
        weighted(model(randn(2, 6, 8, seed=10 * step + rank), **(given or {}))).backward()
        total: Tensor | float = 0.0
        for other in range(world_size):
            # Each rank drew its dropout from the same seed.
            torch.manual_seed(step)
            total = total + weighted(
                oracle(randn(2, 6, 8, seed=10 * step + other), **(given or {}))
            )
        (total / world_size).backward()
        for (name, p), q in zip(net.named_parameters(), oracle.named_parameters(), strict=True):
            # DDP gives a parameter that no rank used no gradient either, as the stored loop does.
            assert_near(p.grad, q[1].grad, f"{label}, step {step}, {name}")
        for optimizer in optimizers:
            optimizer.step()
    return model


def both(pairs: list, route: Any = None) -> tuple[Whole, Whole]:
    return Whole(ReversibleSequence(pairs, route or {})), Whole(stored_copy(pairs, route))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "small-buckets": {"bucket_cap_mb": 0.0001},
}


def _option(label: str, rank: int, world_size: int) -> None:
    for case in ("attention-L4", "attention-L8-dropout"):
        pairs = BY_NAME[case].pairs()
        train_against_one_process(
            rank, world_size, *both(pairs), f"{label} {case}", **OPTIONS[label]
        )


def _shared(rank: int, world_size: int) -> None:
    pairs = build([(Mlp, with_dropout(Mlp))], 8) * 3
    for label in ("plain", "static_graph", "find_unused_parameters"):
        train_against_one_process(rank, world_size, *both(pairs), label, **OPTIONS[label])


def _unused(rank: int, world_size: int) -> None:
    pairs = build([(Unused, Linear)] * 3, 8)
    for label in ("static_graph", "find_unused_parameters"):
        train_against_one_process(rank, world_size, *both(pairs), label, **OPTIONS[label])


def _frozen(rank: int, world_size: int) -> None:
    pairs = build([(Mlp, Linear)] * 4, 8)
    for f, _ in pairs[:2]:
        f.requires_grad_(False)
    train_against_one_process(rank, world_size, *both(pairs), "frozen")


def _keywords(rank: int, world_size: int) -> None:
    case = BY_NAME["modulated-L4-keywords-dropout"]
    given = {"scale": randn(2, 1, 8, seed=8), "shift": randn(6, 8, seed=9)}
    train_against_one_process(
        rank, world_size, *both(case.pairs(), case.route), "keywords", given=given
    )
    route, given = {"scale": every(4, True, True)}, {"scale": randn(8, seed=3)}
    train_against_one_process(
        rank, world_size, *both(case.pairs(), route), "f and g", given, static_graph=True
    )


def assert_gradients_of(oracle: nn.Module, net: nn.Module) -> None:
    for (name, p), q in zip(net.named_parameters(), oracle.parameters(), strict=True):
        assert_near(p.grad, q.grad, name)


def _no_sync(rank: int, world_size: int) -> None:
    net, oracle = both(build([(with_dropout(Mlp), Mlp)] * 3, 8))
    model = DistributedDataParallel(net)
    counted = Evaluations(net.body)
    xs = [[randn(2, 6, 8, seed=10 * r + i) for i in range(3)] for r in range(world_size)]
    torch.manual_seed(0)
    with model.no_sync():
        for x in xs[rank][:2]:
            weighted(model(x)).backward()
    weighted(model(xs[rank][2])).backward()
    evaluated = counted.take()
    assert all(evaluated.count(name) == 6 for name in set(evaluated)), (
        "a forward and a replay per step"
    )
    for r in range(world_size):
        torch.manual_seed(0)
        for x in xs[r]:
            (weighted(oracle(x)) / world_size).backward()
    assert_gradients_of(oracle, net)


def _two_forwards(
    rank: int, world_size: int, branch: type[nn.Module] = Mlp, **options: Any
) -> None:
    net, oracle = both(build([(with_dropout(Mlp), branch)] * 3, 8))
    model = DistributedDataParallel(net, **options)
    xs = [[randn(2, 6, 8, seed=10 * r + i) for i in range(2)] for r in range(world_size)]
    torch.manual_seed(0)
    (weighted(model(xs[rank][0])) + weighted(model(xs[rank][1]))).backward()
    for r in range(world_size):
        torch.manual_seed(0)
        ((weighted(oracle(xs[r][0])) + weighted(oracle(xs[r][1]))) / world_size).backward()
    assert_gradients_of(oracle, net)


class Shifted(Mlp):
    """Adds a constant buffer, which DDP broadcasts in place before each forward."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("shift", torch.linspace(-1, 1, width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.shift)


def _two_forwards_with_buffers(rank: int, world_size: int) -> None:
    if OLD_TORCH:
        with pytest.raises(ReversibleError, match="buffer 'shift' was changed in place"):
            _two_forwards(rank, world_size, Shifted)
        _two_forwards(rank, world_size, Shifted, broadcast_buffers=False)
    else:
        _two_forwards(rank, world_size, Shifted)


def _generator(rank: int, world_size: int) -> None:
    """The one that ranks draw alike from (`layer_dropout`) costs the user's own no draw."""
    state = torch.get_rng_state()
    torch.manual_seed(rank)
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, torch.rand(3, generator=shared_generator()).tolist())
    assert found == [found[0]] * world_size
    torch.set_rng_state(state)
    shared_generator()
    assert torch.equal(torch.get_rng_state(), state)


CHECKS: dict[str, Check] = {label: partial(_option, label) for label in OPTIONS} | {
    "shared": _shared,
    "unused": _unused,
    "frozen": _frozen,
    "keywords": _keywords,
    "no_sync": _no_sync,
    "two-forwards": _two_forwards,
    "two-forwards-with-buffers": _two_forwards_with_buffers,
    "generator": _generator,
    "executions": partial(every_execution, DistributedDataParallel),
    "programs": partial(every_program, DistributedDataParallel),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(__name__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_gradients_are_those_of_one_process(name: str, outcomes: dict[str, str]):
    assert outcomes[name] == "passed", outcomes[name]
