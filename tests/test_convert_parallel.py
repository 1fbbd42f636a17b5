"""Converted networks on two gloo ranks: DDP, and FSDP2 by layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import revnet
from distributed import run_ranks
from revnet import ReversibleError
from revnet._conversion import layer as conversion_layer
from test_convert import WIDTH, Block, Net, weighted

pytestmark = pytest.mark.timeout(300)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    weighted(model(x)).backward()
    return [whole(p.grad) for p in model.parameters()]


def check_ranks(rank: int, world_size: int, kind: str) -> None:
    torch.manual_seed(0)
    net, x = (
        Net(layer=lambda: Block(dropout=0.2 if kind == "ddp" else 0.0)),
        torch.randn(4, 3, WIDTH),
    )
    mine = x.chunk(world_size)[rank]
    new, calls, found = conversion_layer._new_call, [], []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return new(*args)

    conversion_layer._new_call = counted
    for execution in ("store", "invert"):
        model = copy.deepcopy(net)
        revnet.convert(model, execution=execution, calibrate=x)
        keys = list(model.state_dict())
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            options = {}
            if kind == "bfloat16":
                options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            model = shard(model, **options)
            assert list(model.state_dict()) == keys
        gradients(model, mine)
        calls.clear()
        found.append(gradients(model, mine))
        # The layers share one call, although FSDP2 hands on other tensor objects.
        assert len(calls) == 1
    assert all(map(torch.equal, *found))
    if kind == "fsdp2":
        revnet.convert(net, calibrate=x)
        shares = [gradients(net, part) for part in x.chunk(world_size)]
        for a, *b in zip(found[0], *shares, strict=True):
            torch.testing.assert_close(a, sum(b) / world_size)
        with pytest.raises(ReversibleError, match="given another class after its conversion"):
            revnet.unconvert(model)
        with pytest.raises(ReversibleError, match=r"layers\.0 is sharded by FSDP2 already"):
            revnet.convert(shard(Net()))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "bfloat16"])
def test_ranks(kind: str) -> None:
    run_ranks(check_ranks, 2, kind)
