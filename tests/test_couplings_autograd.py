"""Couplings in what surrounds them: autocast, nested checkpoints, functional_call, double backward,
a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from oracle import assert_near, weighted
from revnet import Bijection, Reversible, Step, measure_memory
from test_couplings import EXACT, RULES, Rotation, branch, loop, program, streams_of, trained


@pytest.mark.parametrize("name", EXACT)
def test_autocast_is_the_same_where_steps_are_undone(name: str):
    net = program(name, 12, 0.2, dtype=torch.float32)
    found = []
    for net.execution in ("store", "invert"):
        streams = streams_of(torch.float32)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = net(*streams)
        # Outside the region, as training loops do it.
        found.append(torch.autograd.grad(weighted(*outputs), [*streams, *net.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", RULES)
def test_double_backward(name: str):
    net = program(name, 6, streams="float")
    found = []
    for run in (net, loop(net, name)):
        streams = streams_of()
        grads = torch.autograd.grad(weighted(*run(*streams)), streams, create_graph=True)
        again = torch.autograd.grad(
            weighted(*grads), [*streams, *net.parameters()], allow_unused=True
        )
        found.append([*grads, *again])
    for a, b in zip(*found, strict=True):
        assert_near(a, b, tolerance=1e-11)


@pytest.mark.parametrize("kind", ["float", "fixed"])
@pytest.mark.parametrize("name", RULES)
def test_backward_twice_and_out_of_order(name: str, kind: str):
    net = program(name, 6, 0.2, streams=kind)
    first, second = (
        streams_of(),
        [stream.detach().mul(0.5).requires_grad_() for stream in streams_of()],
    )
    expected = [trained(net, net, streams) for streams in (first, second)]
    totals = []
    for streams in (first, second):
        torch.manual_seed(0)
        totals.append(weighted(*net(*streams)))
    for _ in range(2):
        for i, streams in ((0, first), (1, second)):
            grads = torch.autograd.grad(totals[i], [*streams, *net.parameters()], retain_graph=True)
            for grad, (key, right) in zip(grads, list(expected[i].items())[2:], strict=True):
                assert_near(grad, right, key, 0.0 if kind == "fixed" else 1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_inside_a_checkpoint(name: str):
    net = program(name, 8, 0.2, streams="fixed")
    expected = trained(net, net, streams_of())
    actual = trained(
        lambda *streams: checkpoint(net, *streams, use_reentrant=False), net, streams_of()
    )
    for key, right in expected.items():
        assert torch.equal(actual[key], right), key


@pytest.mark.parametrize("approximate", [False, True])
def test_parameters_of_a_coupling_under_functional_call(approximate: bool):
    torch.manual_seed(0)
    steps = []
    for i in range(6):
        steps.append(Step(branch(), i % 2, (i + 1) % 2))
        steps.append(Step(None, i % 2, coupling=Bijection(Rotation(), approximate=approximate)))
    net = Reversible(steps).double()
    other = {
        name: (parameter.detach() * 1.5 + 0.1).requires_grad_()
        for name, parameter in net.named_parameters()
    }
    found = []
    for net.execution in ("store", "invert"):
        streams = streams_of()
        outputs = functional_call(net, other, tuple(streams))
        found.append(torch.autograd.grad(weighted(*outputs), [*streams, *other.values()]))
    for a, b in zip(*found, strict=True):
        assert_near(a, b)


def test_nothing_is_left_after_backward():
    net = program("momentum", 40, dtype=torch.float32, streams="fixed")

    def step() -> Tensor:
        return weighted(*net(*(stream.detach() for stream in streams_of(torch.float32, batch=256))))

    step().backward()
    parameters = sum(parameter.numel() * 4 for parameter in net.parameters())
    net.zero_grad()
    assert measure_memory(step).grad_bytes == parameters


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXACT)
def test_a_gpu_undoes_in_every_bit(name: str):
    net = program(name, 32, 0.1, dtype=torch.float32).cuda()
    found: list[Any] = []
    for net.execution in ("store", "invert"):
        streams = [
            stream.detach().cuda().requires_grad_()
            for stream in streams_of(torch.float32, batch=512)
        ]
        torch.manual_seed(0)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            outputs = net(*streams)
        found.append(torch.autograd.grad(weighted(*outputs), [*streams, *net.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXACT)
def test_memory_on_a_gpu_is_flat_in_depth(name: str):
    def kept(depth: int) -> int:
        net = program(name, depth, dtype=torch.float32, streams="fixed").cuda()
        streams = [
            stream.detach().cuda().requires_grad_()
            for stream in streams_of(torch.float32, batch=512)
        ]
        net(*streams)
        return measure_memory(net, *streams).saved_bytes

    # Affine coupling: one more buffer of 8 bytes per element and stream. Momentum: a buffer grows
    # from 8 to 16 bits.
    more = {"affine": 8, "momentum": 1}.get(name, 0)
    assert kept(40) - kept(4) <= 2 * 512 * 6 * more


class _Unused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def test_a_stream_that_no_loss_reads():
    net = Reversible([Step(branch(), 0, 1), Step(_Unused(), 1, 0), Step(branch(), 2, 1)]).double()
    x = [*streams_of(), streams_of()[0].detach().clone().requires_grad_()]
    found = []
    for net.execution in ("store", "invert"):
        found.append(
            torch.autograd.grad(weighted(net(*x)[2]), [*x, *net.parameters()], allow_unused=True)
        )
    for a, b in zip(*found, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("name", EXACT)
def test_exact_determinism_checks_see_scaled_streams(name: str):
    net = program(name, 8, 0.2, streams="fixed", determinism_check="exact")
    actual = trained(net, net, streams_of())
    net.execution = "store"
    for key, right in trained(net, net, streams_of()).items():
        assert torch.equal(actual[key], right), key


@pytest.mark.parametrize("kind", ["float", "fixed"])
@pytest.mark.parametrize("name", RULES)
def test_transforms_of_torch_func(name: str, kind: str):
    net = program(name, 6, streams=kind)
    expected = trained(net, net, streams_of())
    streams = [stream.detach() for stream in streams_of()]
    actual = torch.func.grad(lambda *xs: weighted(*net(*xs)), argnums=(0, 1))(*streams)
    for i, grad in enumerate(actual):
        assert_near(grad, expected[str(i)])


# torch.compile itself reads the .grad of whatever crosses a graph break, and makes Function
# objects, in any model.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["additive", "momentum", "affine", "permutation"])
def test_a_compiled_program(name: str):
    net = program(name, 4, streams="fixed")
    actual = trained(torch.compile(net, backend="aot_eager"), net, streams_of())
    for key, right in trained(net, net, streams_of()).items():
        assert_near(actual[key], right, key)
