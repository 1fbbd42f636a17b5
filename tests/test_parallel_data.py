"""Data parallel training, replicated (DDP) and sharded (FSDP2), gives the gradients of one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_state
from torch.nn.parallel import DistributedDataParallel

from cases import Mlp
from parallel import (
    WIDTH,
    Collectives,
    assert_bits,
    assert_gradients,
    batch,
    branches,
    gradients,
    loss_of,
    mine,
    rank_loss,
    reference,
    run_checks,
    sequence,
)
from revnet import Fixed, ReversibleError, ReversibleSequence, _replay
from revnet._distributed import shared_generator
from revnet._execution import EXECUTIONS

# 37 fraction bits: the rounding of the streams stays below the tolerance in float64.
STREAMS = {"float": "float", "fixed": Fixed(fraction_bits=37)}


def ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)


# DDP


def ddp_options(dropout: float, rank: int, world_size: int) -> None:
    _, expected = reference(branches(dropout=dropout), world_size)
    for options in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"bucket_cap_mb": 1e-4}):
        model = ddp(sequence(dropout=dropout), **options)
        rank_loss(model, rank, world_size).backward()
        assert_gradients(model, expected)


def ddp_static_graph(rank: int, world_size: int) -> None:
    _, expected = reference(branches(shared=True, dropout=0.2), world_size)
    model = ddp(sequence(shared=True, dropout=0.2), static_graph=True)
    # The first iteration learns the graph, the next ones rely on it.
    for _ in range(3):
        model.zero_grad()
        rank_loss(model, rank, world_size).backward()
        assert_gradients(model, expected)


def ddp_no_sync(rank: int, world_size: int) -> None:
    _, expected = reference(branches(dropout=0.2), world_size, steps=3)
    model = ddp(sequence(dropout=0.2))
    with model.no_sync():
        for step in range(2):
            rank_loss(model, rank, world_size, step).backward()
    rank_loss(model, rank, world_size, 2).backward()
    assert_gradients(model, expected)


def ddp_shared_modules(rank: int, world_size: int) -> None:
    _, expected = reference(branches(shared=True), world_size)
    for options in ({}, {"find_unused_parameters": True}):
        model = ddp(sequence(shared=True), **options)
        rank_loss(model, rank, world_size).backward()
        assert_gradients(model, expected)


class Sometimes(nn.Module):
    """One of two MLPs, as told; the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([Mlp(WIDTH).double(), Mlp(WIDTH).double()])

    def forward(self, x: Tensor, which: int = 0) -> Tensor:
        return self.nets[which](x)


def ddp_unused_parameters(rank: int, world_size: int) -> None:
    torch.manual_seed(3)
    pairs = [(Sometimes(), Mlp(WIDTH).double()), (Mlp(WIDTH).double(), Sometimes())]
    route = {"which": ((True, False), (False, True))}
    model = ddp(ReversibleSequence(pairs, route, streams="float"), find_unused_parameters=True)
    x, target = batch(world_size)
    for which in (0, 1):
        twin = ReversibleSequence(pairs, route, streams="float", execution="store")
        twin.zero_grad()
        loss_of(twin(x, which=which), target).backward()
        expected = {name: None if p.grad is None else p.grad.clone() for name, p in twin.named_parameters()}
        twin.zero_grad()
        loss_of(model(mine(rank, x), which=which), mine(rank, target)).backward()
        for name, gradient in expected.items():
            if gradient is None:
                # DDP gives zeros where no rank had a gradient in its first iteration with the bucket.
                continue
            torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-10, atol=1e-12)
        model.zero_grad()


def ddp_layer_dropout(rank: int, world_size: int) -> None:
    model = ddp(sequence(depth=8, layer_dropout=0.5), find_unused_parameters=True)
    inner = model.module
    entered: list[int] = []
    for i, block in enumerate(inner.blocks):
        block.f.register_forward_pre_hook(lambda *_, i=i: entered.append(i))
    state = torch.get_rng_state()
    assert shared_generator() is not None
    assert torch.equal(torch.get_rng_state(), state), "agreeing on a generator draws from the user's own"
    draws = []
    for _ in range(4):
        # Ranks whose own generators differ still skip the same blocks.
        torch.manual_seed(rank)
        entered.clear()
        out = model(mine(rank, batch(world_size)[0]))
        draws.append(list(entered))
        loss_of(out, mine(rank, batch(world_size)[1])).backward()
    everyone: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyone, draws)
    assert all(other == everyone[0] for other in everyone), everyone
    assert len({tuple(draw) for draw in draws}) > 1, "the draws never change"


def every_execution(kind: str, rank: int, world_size: int) -> None:
    """All executions and stream kinds agree with one process; in fixed streams, bit for bit with each other."""
    _, expected = reference(branches(dropout=0.2), world_size)
    mixed = [EXECUTIONS[i % len(EXECUTIONS)] for i in range(6)]
    for name, streams in STREAMS.items():
        results = {}
        for execution in (*EXECUTIONS, mixed):
            inner = sequence(dropout=0.2, streams=streams, execution=execution)
            model = shard_branches(inner) if kind == "fsdp" else ddp(inner)
            rank_loss(model, rank, world_size).backward()
            assert_gradients(model, expected)
            results[str(execution)] = gradients(model)
        if name == "fixed":
            for result in results.values():
                assert_bits(result, results["store"])


# FSDP2


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


SHARDINGS = {"root": shard_root, "block": shard_blocks, "branch": shard_branches, "linear": shard_linears}


def fsdp(sharding: str, rank: int, world_size: int) -> None:
    for dropout in (0.0, 0.2):
        _, expected = reference(branches(dropout=dropout), world_size)
        for reshard in (True, False):
            for execution in ("invert", "checkpoint"):
                model = SHARDINGS[sharding](
                    sequence(dropout=dropout, execution=execution), reshard_after_forward=reshard
                )
                for _ in range(2):
                    model.zero_grad()
                    rank_loss(model, rank, world_size).backward()
                    assert_gradients(model, expected)


def fsdp_accumulation(rank: int, world_size: int) -> None:
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


def fsdp_two_forwards(rank: int, world_size: int) -> None:
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


def assert_exact_in_mixed_precision(shard: Any, policy: MixedPrecisionPolicy, rank: int, world_size: int) -> None:
    results = {}
    for execution in ("store", "invert", "checkpoint"):
        model = shard(sequence(dropout=0.2, streams="fixed", execution=execution).float(), mp_policy=policy)
        x, target = batch(world_size)
        torch.manual_seed(100 + rank)
        loss_of(model(mine(rank, x).float()).float(), mine(rank, target).float()).backward()
        results[execution] = gradients(model)
    assert_bits(results["invert"], results["store"])
    assert_bits(results["checkpoint"], results["store"])


def fsdp_mixed_precision(rank: int, world_size: int) -> None:
    """bf16 parameters, fp32 reduction: fixed streams give the bits of stored execution."""
    for shard in SHARDINGS.values():
        assert_exact_in_mixed_precision(shard, POLICIES[0], rank, world_size)
    for policy in POLICIES:
        assert_exact_in_mixed_precision(shard_branches_in_float32, policy, rank, world_size)


def fsdp_replays_that_do_not_cast(rank: int, world_size: int) -> None:
    """Before torch 2.13, FSDP2 does not cast in replays: the engine does."""
    if torch.__version__ < torch.torch_version.TorchVersion("2.13"):
        # There, the checks of mixed precision meet the real thing.
        return
    state = _fsdp_state.FSDPState
    cast_inputs, cast_output = state._cast_forward_inputs, state._cast_output_dtype
    replaying = _fsdp_state.TrainingState.PRE_BACKWARD

    def inputs(self: Any, args: Any, kwargs: Any) -> Any:
        return (args, kwargs) if self._training_state == replaying else cast_inputs(self, args, kwargs)

    def output(self: Any, out: Any) -> Any:
        return out if self._training_state == replaying else cast_output(self, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_cast_forward_inputs", inputs)
        patch.setattr(state, "_cast_output_dtype", output)
        patch.setattr(_replay, "_FSDP_REPLAYS_UNCAST", True)
        for policy in POLICIES:
            assert_exact_in_mixed_precision(shard_branches_in_float32, policy, rank, world_size)
        patch.setattr(_replay, "_FSDP_REPLAYS_UNCAST", False)
        with pytest.raises(ReversibleError, match=r"float32 .* in the replay but was .* torch.bfloat16"):
            assert_exact_in_mixed_precision(shard_branches_in_float32, POLICIES[0], rank, world_size)


def fsdp_autocast(rank: int, world_size: int) -> None:
    x, target = batch(world_size)
    for sharding in ("block", "branch"):
        results = {}
        for execution in ("store", "invert"):
            model = SHARDINGS[sharding](sequence(dropout=0.2, streams="auto", execution=execution).float())
            torch.manual_seed(100 + rank)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(mine(rank, x).float())
            loss_of(out, mine(rank, target).float()).backward()
            results[execution] = gradients(model)
        assert_bits(results["invert"], results["store"])


def fsdp_cpu_offload(rank: int, world_size: int) -> None:
    _, expected = reference(branches(dropout=0.2), world_size)
    for sharding in ("root", "branch"):
        model = SHARDINGS[sharding](sequence(dropout=0.2), offload_policy=CPUOffloadPolicy(pin_memory=False))
        rank_loss(model, rank, world_size).backward()
        assert_gradients(model, expected)


def fsdp_frozen_part(rank: int, world_size: int) -> None:
    """A branch without trainable parameters, and an input without gradient, still lead to the rest."""
    pairs = branches()
    for parameter in pairs[1][0].parameters():
        parameter.requires_grad_(False)
    _, expected = reference(pairs, world_size)
    model = shard_branches(ReversibleSequence(pairs, streams="float"))
    rank_loss(model, rank, world_size).backward()
    assert_gradients(model, expected)


def fsdp_step_between(rank: int, world_size: int) -> None:
    """An optimizer step between forward and backward raises."""
    model = shard_branches(sequence())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank_loss(model, rank, world_size).backward()
    loss = rank_loss(model, rank, world_size)
    optimizer.step()
    with pytest.raises(ReversibleError, match="changed in place"):
        loss.backward()


def fsdp_training(rank: int, world_size: int) -> None:
    """Twenty optimizer steps with clipping follow one process."""
    single = ReversibleSequence(branches(), streams="float", execution="store")
    model = shard_branches(sequence())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (single, model)]
    x, target = batch(world_size)
    for step in range(20):
        loss_of(single(x * (1 + step / 20)), target).backward()
        loss_of(model(mine(rank, x) * (1 + step / 20)), mine(rank, target)).backward()
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
            assert [sum(part.values()) for part in found] == [modules, modules], (sharding, execution, found)
            scatters = sum(count for name, count in counts.counts.items() if "scatter" in name)
            assert scatters == modules, (sharding, execution, counts.counts)


CHECKS = {
    "ddp": partial(ddp_options, 0.0),
    "ddp-dropout": partial(ddp_options, 0.2),
    "ddp-static_graph-shared": ddp_static_graph,
    "ddp-no_sync": ddp_no_sync,
    "ddp-shared": ddp_shared_modules,
    "ddp-unused": ddp_unused_parameters,
    "ddp-layer_dropout": ddp_layer_dropout,
    "ddp-executions": partial(every_execution, "ddp"),
    **{f"fsdp-{sharding}": partial(fsdp, sharding) for sharding in SHARDINGS},
    "fsdp-executions": partial(every_execution, "fsdp"),
    "fsdp-accumulation": fsdp_accumulation,
    "fsdp-two_forwards": fsdp_two_forwards,
    "fsdp-mixed_precision": fsdp_mixed_precision,
    "fsdp-old_replays": fsdp_replays_that_do_not_cast,
    "fsdp-autocast": fsdp_autocast,
    "fsdp-cpu_offload": fsdp_cpu_offload,
    "fsdp-frozen": fsdp_frozen_part,
    "fsdp-step_between": fsdp_step_between,
    "fsdp-training": fsdp_training,
    "fsdp-gathers": gathers,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(__name__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_data_parallel(name: str, outcomes: dict[str, str]) -> None:
    if outcomes[name] != "passed":
        pytest.fail(outcomes[name], pytrace=False)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("policy", POLICIES, ids=["bf16", "bf16-float32", "float32-bf16"])
def test_mixed_precision_on_a_gpu(policy: MixedPrecisionPolicy, tmp_path: Path) -> None:
    """Exact gradients through FSDP2's own streams and gathers; on torch < 2.13, the engine's casts for real."""
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
