"""Forward and backward on tensors without memory, as those use who plan shapes and memory beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import cases
import revnet


@pytest.mark.parametrize("execution", ["store", "select", "checkpoint", "offload", "invert"])
@pytest.mark.parametrize("streams", ["float", "fixed"])
@pytest.mark.parametrize("parameters", ["fake", "real"])
def test_a_training_step_without_memory(parameters: str, streams: Any, execution: str) -> None:
    def net() -> nn.Module:
        pairs = [(cases.with_dropout(cases.Mlp)(8), cases.Mlp(8)) for _ in range(2)]
        return revnet.ReversibleSequence(pairs, streams=streams, execution=execution)

    made = net()
    state = torch.get_rng_state()
    with FakeTensorMode(allow_non_fake_inputs=parameters == "real"):
        made = net() if parameters == "fake" else made
        x = torch.randn(2, 3, 8, requires_grad=True)
        made(x).sum().backward()
    for tensor in (x, *made.parameters()):
        assert isinstance(tensor.grad, FakeTensor)
        assert tensor.grad.shape == tensor.shape
    assert torch.equal(torch.get_rng_state(), state)
