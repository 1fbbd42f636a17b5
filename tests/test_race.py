"""The arms that the benchmarks time train one network: their gradients are those of the loop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import _race
from _models import branches


def gradients(name: str, autocast: bool) -> list[torch.Tensor]:
    """Return the gradients of two steps of an arm, of parameters and of the input."""
    row = _race.Row("", 16, 3, 2, 3, device="cpu", autocast=autocast)
    dtype = torch.float32 if autocast else torch.float64
    pairs = branches(row.blocks, row.width, dtype=dtype)
    torch.manual_seed(1)
    x = torch.randn(row.batch, row.tokens, row.width, dtype=dtype, requires_grad=True)
    pull = torch.randn_like(x)
    arm = _race.make_arm(name, row, pairs, x, pull)
    for _ in range(2):
        arm.step()
    leaves = [x, *(p for pair in pairs for branch in pair for p in branch.parameters())]
    assert all(leaf.grad is not None for leaf in leaves)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", _race.EAGER[1:])
def test_gradients_of_an_arm(name: str, autocast: bool) -> None:
    difference = _race.difference(gradients(name, autocast), gradients(_race.STORED, autocast))
    # Fixed streams round to 24 fraction bits.
    assert difference < (0.02 if autocast else 1e-6 if name == _race.FIXED else 1e-12)
