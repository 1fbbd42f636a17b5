"""FSDP2 on two gloo ranks: on the root, on every block, on every branch, gradients equal to one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cases import BY_NAME, Attention, Linear, Mlp, build, randn, with_dropout
from oracle import assert_near, stored_copy, weighted
from parallel import Check, run_checks
from revnet import ReversibleSequence
from test_ddp import Whole

STEPS = 2


def shard_root(model: Whole, **options: Any) -> None:
    fully_shard(model, **options)


def shard_sequence(model: Whole, **options: Any) -> None:
    fully_shard(model.body, **options)
    fully_shard(model, **options)


def shard_blocks(model: Whole, **options: Any) -> None:
    for block in model.body.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def shard_branches(model: Whole, **options: Any) -> None:
    for block in model.body.blocks:
        fully_shard(block.f, **options)
        fully_shard(block.g, **options)
    fully_shard(model, **options)


def shard_branches_and_blocks(model: Whole, **options: Any) -> None:
    for block in model.body.blocks:
        fully_shard(block.f, **options)
        fully_shard(block, **options)
    fully_shard(model, **options)


SHARDED: list[Callable[..., None]] = [
    shard_root,
    shard_sequence,
    shard_blocks,
    shard_branches,
    shard_branches_and_blocks,
]


def full(value: Tensor | None) -> Tensor | None:
    return value.full_tensor() if isinstance(value, DTensor) else value


def train_against_one_process(
    rank: int,
    world_size: int,
    shard: Callable[..., None],
    pairs: list,
    label: str,
    given: dict,
    route: Any,
    **options: Any,
) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    net, oracle = Whole(ReversibleSequence(pairs, route)), Whole(stored_copy(pairs, route))
    shard(net, mesh=mesh, **options)
    assert all(isinstance(parameter, DTensor) for parameter in net.parameters())
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.01) for module in (net, oracle)]
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.manual_seed(step)
        x = randn(2, 6, 8, seed=10 * step + rank, requires_grad=True)
        weighted(net(x, **given)).backward()
        total: Tensor | float = 0.0
        inputs = []
        for other in range(world_size):
            torch.manual_seed(step)
            inputs.append(randn(2, 6, 8, seed=10 * step + other, requires_grad=True))
            total = total + weighted(oracle(inputs[-1], **given))
        (total / world_size).backward()
        assert_near(x.grad, inputs[rank].grad * world_size, f"{label}, step {step}, x")
        for (name, p), q in zip(net.named_parameters(), oracle.parameters(), strict=True):
            assert_near(full(p.grad), q.grad, f"{label}, step {step}, {name}")
        for optimizer in optimizers:
            optimizer.step()
    for (name, p), q in zip(net.named_parameters(), oracle.parameters(), strict=True):
        assert_near(full(p.detach()), q.detach(), f"{label}, weights, {name}")


NETWORKS: dict[str, Callable[[], tuple[list, dict, Any]]] = {
    "dropout": lambda: (build([(with_dropout(Attention), with_dropout(Mlp))] * 3, 8), {}, {}),
    "keywords": lambda: (
        BY_NAME["modulated-L4-keywords-dropout"].pairs(),
        {"scale": randn(2, 1, 8, seed=8), "shift": randn(6, 8, seed=9)},
        BY_NAME["modulated-L4-keywords-dropout"].route,
    ),
}


def _place(shard: Callable[..., None], network: str, rank: int, world_size: int) -> None:
    pairs, given, route = NETWORKS[network]()
    train_against_one_process(rank, world_size, shard, pairs, network, given, route)


def _without_resharding(shard: Callable[..., None], rank: int, world_size: int) -> None:
    pairs = build([(with_dropout(Mlp), Linear)] * 3, 8)
    train_against_one_process(rank, world_size, shard, pairs, "", {}, {}, reshard_after_forward=False)


class Exact(nn.Module):
    """Whole-number products if, and only if, weights and input are rounded to bfloat16."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []
        whole = torch.randint(-1, 2, (width, width), generator=torch.Generator().manual_seed(seed)).float()
        with torch.no_grad():
            self.linear.weight.copy_(whole * (1 + 2**-12))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.seen.append((x.dtype, out.dtype))
        return out.relu()


def _mixed_precision(rank: int, world_size: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (world_size,))
    pairs = [(Exact(4, 2 * i), Exact(4, 2 * i + 1)) for i in range(2)]
    found = []
    for net in (ReversibleSequence(pairs, merge="concat"), stored_copy(pairs, merge="concat")):
        for block in net.blocks:
            fully_shard(block.f, mesh=mesh, mp_policy=policy)
            fully_shard(block.g, mesh=mesh, mp_policy=policy)
        x = (torch.arange(-6.0, 6.0).view(3, 4) + rank).requires_grad_()
        out = net(x)
        assert out.dtype is torch.float32, "streams keep the dtype of x"
        out.sum().backward()
        seen = {pair for block in net.blocks for branch in (block.f, block.g) for pair in branch.seen}
        assert seen == {(torch.bfloat16, torch.bfloat16)}, "every evaluation, the replay's too, in bfloat16"
        found.append([out.detach(), x.grad, *(full(p.grad) for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


CHECKS: dict[str, Check] = {
    **{f"{s.__name__[6:]}-{network}": partial(_place, s, network) for s in SHARDED for network in NETWORKS},
    **{f"{s.__name__[6:]}-without-resharding": partial(_without_resharding, s) for s in (shard_blocks, shard_branches)},
    # Before torch 2.13 FSDP2 does not cast the inputs of a recomputation itself (pytorch #159359).
    "mixed-precision": _mixed_precision,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(__name__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_gradients_are_those_of_one_process(name: str, outcomes: dict[str, str]):
    assert outcomes[name] == "passed", outcomes[name]
