"""FSDP2 on two gloo ranks: however a sequence is sharded, gradients equal to one process over the
whole batch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState, TrainingState

from cases import BY_NAME, randn
from oracle import assert_near, stored_copy, weighted
from parallel import (
    WIDTH,
    Check,
    Collectives,
    assert_bits,
    assert_gradients,
    batch,
    branches,
    every_execution,
    every_program,
    gradients,
    loss_of,
    mine,
    rank_loss,
    reference,
    run_checks,
    sequence,
)
from revnet import ReversibleError, ReversibleSequence, Sum
from revnet._execution import EXECUTIONS
from revnet._state import fsdp as fsdp_state
from test_ddp import Whole

# Many checks share one start of the ranks.
pytestmark = pytest.mark.timeout(300)


def shard_root(model: nn.Module, **options: Any) -> nn.Module:
    return fully_shard(model, **options)


def shard_blocks(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def shard_branches(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block.f, **options)
        fully_shard(block.g, **options)
    return fully_shard(model, **options)


def shard_blocks_in_float32(model: nn.Module, mp_policy: MixedPrecisionPolicy) -> nn.Module:
    """The model is given float32: its blocks cast the streams."""
    for block in model.blocks:
        fully_shard(block, mp_policy=mp_policy)
    return fully_shard(model)


def shard_branches_in_float32(model: nn.Module, mp_policy: MixedPrecisionPolicy) -> nn.Module:
    """Streams keep float32: each branch casts what it reads."""
    for block in model.blocks:
        fully_shard(block.f, mp_policy=mp_policy)
        for linear in (block.g.enter, block.g.leave):
            fully_shard(linear, mp_policy=mp_policy)
        fully_shard(block.g, mp_policy=mp_policy)
    return fully_shard(model)


def shard_linears(model: nn.Module, **options: Any) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def shard_branches_and_blocks(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block.f, **options)
        fully_shard(block, **options)
    return fully_shard(model, **options)


SHARDINGS = {
    "root": shard_root,
    "block": shard_blocks,
    "branch": shard_branches,
    "branch-in-block": shard_branches_and_blocks,
    "linear": shard_linears,
}


def shard_steps(program: nn.Module) -> nn.Module:
    """Step by step, or only what they call."""
    for i, step in enumerate(dict.fromkeys(program.steps)):
        fully_shard(step if i else step.fn)
    return fully_shard(program)


def fsdp(sharding: str, rank: int, world_size: int) -> None:
    for dropout in (0.0, 0.2):
        _, expected = reference(branches(dropout=dropout), world_size)
        for execution, reshard in (("invert", True), ("invert", False), ("checkpoint", True)):
            model = SHARDINGS[sharding](
                sequence(dropout=dropout, execution=execution), reshard_after_forward=reshard
            )
            for _ in range(2):
                model.zero_grad()
                rank_loss(model, rank, world_size).backward()
                assert_gradients(model, expected)


def keywords(rank: int, world_size: int) -> None:
    """Between other layers, with keywords for the branches, over two optimizer steps."""
    case = BY_NAME["modulated-L4-keywords-dropout"]
    given = {"scale": randn(2, 1, 8, seed=8), "shift": randn(6, 8, seed=9)}
    for shard in SHARDINGS.values():
        model, twin = (
            Whole(make(case.pairs(), case.route)) for make in (ReversibleSequence, stored_copy)
        )
        shard(model.body)
        fully_shard(model)
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.01) for module in (model, twin)]
        for step in range(2):
            xs = [
                randn(2, 6, 8, seed=10 * step + other, requires_grad=True)
                for other in range(world_size)
            ]
            for x in xs:
                torch.manual_seed(step)
                (weighted(twin(x, **given)) / world_size).backward()
            mine = xs[rank].detach().clone().requires_grad_()
            torch.manual_seed(step)
            weighted(model(mine, **given)).backward()
            assert_near(mine.grad, xs[rank].grad * world_size, f"x, step {step}")
            assert_gradients(model, {name: p.grad for name, p in twin.named_parameters()}, 1e-12)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def accumulation(rank: int, world_size: int) -> None:
    _, expected = reference(branches(dropout=0.2), world_size, steps=3)
    for sharding in ("block", "branch"):
        for reduce_each in (True, False):
            model = SHARDINGS[sharding](sequence(dropout=0.2))
            for step in range(3):
                if not reduce_each:
                    model.set_requires_gradient_sync(step == 2)
                    model.set_reshard_after_backward(step == 2)
                rank_loss(model, rank, world_size, step).backward()
            assert_gradients(model, expected)


def two_forwards(rank: int, world_size: int) -> None:
    _, expected = reference(branches(), world_size, steps=2)
    model = shard_branches(sequence())
    losses = [rank_loss(model, rank, world_size, step) for step in range(2)]
    sum(losses).backward()
    assert_gradients(model, expected)


POLICIES = (
    MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32),
    MixedPrecisionPolicy(torch.float32, torch.float32, output_dtype=torch.bfloat16),
)


def assert_exact_in_mixed_precision(
    shard: Any, policy: MixedPrecisionPolicy, rank: int, world_size: int, streams: str = "fixed"
) -> None:
    results = {}
    for execution in ("store", "invert", "checkpoint"):
        model = shard(
            sequence(dropout=0.2, streams=streams, execution=execution).float(), mp_policy=policy
        )
        x, target = batch(world_size)
        torch.manual_seed(100 + rank)
        loss_of(model(mine(rank, x).float()).float(), mine(rank, target).float()).backward()
        results[execution] = gradients(model)
    assert_bits(results["invert"], results["store"])
    assert_bits(results["checkpoint"], results["store"])


class Exact(nn.Module):
    """Whole-number products if, and only if, weights and input are rounded to bfloat16."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []
        whole = torch.randint(
            -1, 2, (width, width), generator=torch.Generator().manual_seed(seed)
        ).float()
        with torch.no_grad():
            self.linear.weight.copy_(whole * (1 + 2**-12))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.seen.append((x.dtype, out.dtype))
        return out.relu()


def casts(rank: int, world_size: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    pairs = [(Exact(4, 2 * i), Exact(4, 2 * i + 1)) for i in range(2)]
    found = []
    for net in (ReversibleSequence(pairs, merge="concat"), stored_copy(pairs, merge="concat")):
        for block in net.blocks:
            fully_shard(block.f, mp_policy=policy)
            fully_shard(block.g, mp_policy=policy)
        x = (torch.arange(-6.0, 6.0).view(3, 4) + rank).requires_grad_()
        out = net(x)
        assert out.dtype is torch.float32, "streams keep the dtype of x"
        out.sum().backward()
        seen = {
            pair for block in net.blocks for branch in (block.f, block.g) for pair in branch.seen
        }
        assert seen == {(torch.bfloat16, torch.bfloat16)}, (
            "every evaluation, the replay's too, in bfloat16"
        )
        found.append([out.detach(), x.grad, *gradients(net).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def mixed_precision(rank: int, world_size: int) -> None:
    """bf16 parameters, fp32 reduction: fixed streams give the bits of stored execution."""
    for shard in SHARDINGS.values():
        assert_exact_in_mixed_precision(shard, POLICIES[0], rank, world_size)
    assert_exact_in_mixed_precision(shard_blocks_in_float32, POLICIES[0], rank, world_size, "auto")
    for policy in POLICIES:
        assert_exact_in_mixed_precision(shard_branches_in_float32, policy, rank, world_size)


def replays_that_do_not_cast(rank: int, world_size: int) -> None:
    """Before torch 2.13, FSDP2 does not cast in replays: the engine does."""
    if torch.__version__ < torch.torch_version.TorchVersion("2.13"):
        # There, the checks of mixed precision meet the real thing.
        return
    cast_inputs, cast_output = FSDPState._cast_forward_inputs, FSDPState._cast_output_dtype
    replaying = TrainingState.PRE_BACKWARD

    def inputs(self: Any, args: Any, kwargs: Any) -> Any:
        return (
            (args, kwargs) if self._training_state == replaying else cast_inputs(self, args, kwargs)
        )

    def output(self: Any, out: Any) -> Any:
        return out if self._training_state == replaying else cast_output(self, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPState, "_cast_forward_inputs", inputs)
        patch.setattr(FSDPState, "_cast_output_dtype", output)
        patch.setattr(fsdp_state, "REPLAYS_UNCAST", True)
        for policy in POLICIES[1:]:
            assert_exact_in_mixed_precision(shard_branches_in_float32, policy, rank, world_size)
        patch.setattr(fsdp_state, "REPLAYS_UNCAST", False)
        with pytest.raises(
            ReversibleError, match=r"float32 .* in the replay but was .* torch.bfloat16"
        ):
            assert_exact_in_mixed_precision(
                shard_branches_in_float32, POLICIES[0], rank, world_size
            )


def autocast(rank: int, world_size: int) -> None:
    x, target = batch(world_size)
    for sharding in ("block", "branch"):
        results = {}
        for execution in ("store", "invert"):
            model = SHARDINGS[sharding](
                sequence(dropout=0.2, streams="auto", execution=execution).float()
            )
            torch.manual_seed(100 + rank)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(mine(rank, x).float())
            loss_of(out, mine(rank, target).float()).backward()
            results[execution] = gradients(model)
        assert_bits(results["invert"], results["store"])


def cpu_offload(rank: int, world_size: int) -> None:
    _, expected = reference(branches(dropout=0.2), world_size)
    for sharding in ("root", "branch"):
        model = SHARDINGS[sharding](
            sequence(dropout=0.2), offload_policy=CPUOffloadPolicy(pin_memory=False)
        )
        rank_loss(model, rank, world_size).backward()
        assert_gradients(model, expected)


def frozen_part(rank: int, world_size: int) -> None:
    """A branch without trainable parameters, and an input without gradient, still lead to the
    rest.
    """
    pairs = branches()
    for parameter in pairs[1][0].parameters():
        parameter.requires_grad_(False)
    _, expected = reference(pairs, world_size)
    model = shard_branches(ReversibleSequence(pairs, streams="float"))
    rank_loss(model, rank, world_size).backward()
    assert_gradients(model, expected)


def step_between(rank: int, world_size: int) -> None:
    """An optimizer step between forward and backward raises."""
    model = shard_branches(sequence())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank_loss(model, rank, world_size).backward()
    loss = rank_loss(model, rank, world_size)
    optimizer.step()
    with pytest.raises(ReversibleError, match="changed in place"):
        loss.backward()


def training(rank: int, world_size: int) -> None:
    """Eight optimizer steps with clipping follow one process."""
    single = ReversibleSequence(branches(), streams="float", execution="store")
    model = shard_branches(sequence())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (single, model)]
    x, target = batch(world_size)
    for step in range(8):
        loss_of(single(x * (1 + step / 8)), target).backward()
        loss_of(model(mine(rank, x) * (1 + step / 8)), mine(rank, target)).backward()
        for module, optimizer in zip((single, model), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-8, atol=1e-10, msg=name)


def gathers(rank: int, world_size: int) -> None:
    """One all-gather per sharded module for forward, one for replay and gradient together."""
    depth = 3
    for sharding, modules in (("branch", 2 * depth), ("block", depth)):
        for execution in EXECUTIONS:
            model = SHARDINGS[sharding](sequence(depth, execution=execution))
            rank_loss(model, rank, world_size).backward()
            model.zero_grad()
            counts = Collectives()
            with counts:
                loss = rank_loss(model, rank, world_size)
            forward = dict(counts.counts)
            counts.counts.clear()
            with counts:
                loss.backward()
            found = (
                {name: count for name, count in forward.items() if "gather" in name},
                {name: count for name, count in counts.counts.items() if "gather" in name},
            )
            assert [sum(part.values()) for part in found] == [modules, modules], (
                sharding,
                execution,
                found,
            )
            scatters = sum(count for name, count in counts.counts.items() if "scatter" in name)
            assert scatters == modules, (sharding, execution, counts.counts)


def tiles(rank: int, world_size: int) -> None:
    """Weights are gathered and gradients reduced once per step, however many tiles it has."""
    depth = 3
    _, expected = reference(branches(), world_size)
    for sharding, modules in (("root", 1), ("block", depth)):
        for execution in EXECUTIONS:
            model = SHARDINGS[sharding](sequence(depth, execution=execution, tile={"g": 1}))
            for _ in range(2):
                model.zero_grad()
                counts = Collectives()
                with counts:
                    rank_loss(model, rank, world_size).backward()
                assert_gradients(model, expected)
            gathers = sum(count for name, count in counts.counts.items() if "gather" in name)
            scatters = sum(count for name, count in counts.counts.items() if "scatter" in name)
            # The root is not freed between forward and backward.
            assert gathers == (1 if sharding == "root" else 2 * modules), (sharding, counts.counts)
            assert scatters == modules, (sharding, execution, counts.counts)
    x, target = batch(world_size)
    results = {}
    for execution in EXECUTIONS:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        model = sequence(depth, 0.2, execution=execution, tile={"g": 1}, streams="fixed").float()
        model = shard_blocks_in_float32(model, mp_policy=policy)
        torch.manual_seed(100 + rank)
        loss_of(model(mine(rank, x).float()).float(), mine(rank, target).float()).backward()
        results[execution] = gradients(model)
    for result in results.values():
        assert_bits(result, results["store"])
    model = SHARDINGS["block"](
        ReversibleSequence([(Sum([f, g]), g) for f, g in branches()], tile={"g": 1})
    )
    counts = Collectives()
    with counts:
        rank_loss(model, rank, world_size).backward()
    gathers = sum(count for name, count in counts.counts.items() if "gather" in name)
    assert gathers == 2 * depth, counts.counts
    for shard in (shard_branches, shard_linears):
        with pytest.raises(ReversibleError, match=r"branch g: fully_shard was called on this"):
            rank_loss(shard(sequence(tile={"g": 1})), rank, world_size)


CHECKS: dict[str, Check] = {
    **{sharding: partial(fsdp, sharding) for sharding in SHARDINGS},
    "executions": partial(every_execution, shard_branches),
    "programs": partial(every_program, shard_steps),
    "keywords": keywords,
    "accumulation": accumulation,
    "two_forwards": two_forwards,
    "mixed_precision": mixed_precision,
    "casts": casts,
    "old_replays": replays_that_do_not_cast,
    "autocast": autocast,
    "cpu_offload": cpu_offload,
    "frozen": frozen_part,
    "step_between": step_between,
    "training": training,
    "gathers": gathers,
    "tiles": tiles,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(__name__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_gradients_are_those_of_one_process(name: str, outcomes: dict[str, str]) -> None:
    if outcomes[name] != "passed":
        pytest.fail(outcomes[name], pytrace=False)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("policy", POLICIES, ids=["bf16", "bf16-float32", "float32-bf16"])
def test_mixed_precision_on_a_gpu(policy: MixedPrecisionPolicy, tmp_path: Path) -> None:
    """Exact gradients through FSDP2's own streams and gathers; on torch < 2.13, the engine's casts
    for real.
    """
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        x = torch.randn(4, 64, WIDTH, device="cuda")
        for shard in (shard_blocks, shard_branches, shard_branches_in_float32):
            results = {}
            for execution in EXECUTIONS:
                model = sequence(dropout=0.2, streams="fixed", execution=execution).float().cuda()
                model = shard(model, mp_policy=policy)
                for _ in range(2):
                    model.zero_grad()
                    torch.manual_seed(1)
                    model(x).float().square().mean().backward()
                results[execution] = gradients(model)
            for result in results.values():
                assert_bits(result, results["store"])
    finally:
        torch.distributed.destroy_process_group()
