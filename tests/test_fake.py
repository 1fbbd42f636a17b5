"""Forward and backward on tensors without memory, and noted down as a graph by tracers other than
torch.compile.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

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


@pytest.mark.parametrize("execution", ["store", "select", "checkpoint", "offload", "invert"])
@pytest.mark.parametrize("streams", ["auto", "float", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_on_the_meta_device(dtype: Any, streams: Any, execution: str) -> None:
    pairs = [(cases.with_dropout(cases.Mlp)(8), cases.Mlp(8)) for _ in range(2)]
    net = revnet.ReversibleSequence(pairs, streams=streams, execution=execution)
    net.to("meta", dtype)
    x = torch.empty(2, 3, 8, device="meta", dtype=dtype, requires_grad=True)
    with torch.no_grad():
        assert net(x).shape == x.shape
    y = net(x)
    y.sum().backward()
    net.check()
    for tensor in (y, x.grad, *(p.grad for p in net.parameters())):
        assert (tensor.device.type, tensor.dtype) == ("meta", dtype)
    y1, y2 = net.run(x, x)
    assert net.inverse(y1, y2)[0].shape == x.shape


def test_a_program_on_the_meta_device_with_steps_that_scale() -> None:
    steps = [
        revnet.Step(nn.Linear(8, 8), i % 2, (i + 1) % 2, revnet.Momentum(0.9)) for i in range(4)
    ]
    net = revnet.Reversible(steps).to("meta")
    x = torch.empty(2, 8, device="meta")
    assert [y.shape for y in net(x, x)] == [x.shape] * 2
    sum(net(x, x)).sum().backward()


@pytest.mark.parametrize("execution", ["select", "checkpoint", "invert"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_training_step_as_a_graph_of_make_fx(mode: str, execution: str) -> None:
    net = revnet.ReversibleSequence(
        [(cases.with_dropout(cases.Mlp)(8), cases.Mlp(8)) for _ in range(2)]
    )

    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])

    x = torch.randn(2, 3, 8, requires_grad=True)
    net.execution = execution
    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    net.execution = "store"
    torch.manual_seed(0)
    expected = step(x)
    torch.manual_seed(0)
    for found, wanted in zip(graph(x), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning"
)
def test_a_network_under_torch_jit_trace() -> None:
    net = revnet.ReversibleSequence([(cases.Mlp(8), cases.Mlp(8)) for _ in range(2)])
    x = torch.randn(2, 3, 8, requires_grad=True)
    traced = torch.jit.trace(net, torch.randn(2, 3, 8))
    (found,) = torch.autograd.grad(traced(x).square().sum(), x)
    net.execution = "store"
    torch.testing.assert_close(found, *torch.autograd.grad(net(x).square().sum(), x))
