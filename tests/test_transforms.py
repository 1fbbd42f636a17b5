"""Forward mode, several gradients at once, and scripted pieces of branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import oracle
import revnet
from revnet import Additive, Momentum, Reversible, ReversibleSequence, Step
from revnet._streams.fixed import fusible

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")

STREAMS = [pytest.param("float", id="float"), pytest.param(revnet.Fixed(37), id="fixed")]
WIDTH = 8


def network(branch: Any, **options: Any) -> ReversibleSequence:
    torch.manual_seed(0)
    pairs = [(branch(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    return ReversibleSequence(pairs, **options).double()


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.4))


def data(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("coupling", [Additive(), Momentum(0.9)], ids=["additive", "momentum"])
@pytest.mark.parametrize("how", ["jvp", "dual"])
def test_forward_mode(how: str, coupling: Any, streams: Any):
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(4)]
    steps = [Step(fn, i % 2, 1 - i % 2, coupling) for i, fn in enumerate(branches)]
    net = Reversible(steps, streams=streams)
    x, v = data(2, 3)

    def plain(x: Tensor) -> Tensor:
        y = [x, x.tanh()]
        for i, fn in enumerate(branches):
            y[i % 2] = coupling.combine(y[i % 2], fn(y[1 - i % 2]))
        return y[0] + y[1]

    def found(x: Tensor) -> Tensor:
        y1, y2 = net(x, x.tanh())
        return y1 + y2

    wanted = torch.func.jvp(plain, (x,), (v,))[1]
    if how == "jvp":
        tangent = torch.func.jvp(found, (x,), (v,))[1]
    else:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(found(forward_ad.make_dual(x, v))).tangent
    oracle.assert_near(tangent, wanted, tolerance=1e-10)


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
def test_reverse_over_forward(execution: str, streams: Any):
    x, v = data(2, 3)
    found = []
    for name in ("store", execution):
        net = network(lambda: nn.Linear(WIDTH, WIDTH), execution=name, streams=streams)
        with forward_ad.dual_level():
            out = net(forward_ad.make_dual(x, v)).pow(2).sum()
            tangent = forward_ad.unpack_dual(out).tangent
            found.append(torch.autograd.grad(tangent, list(net.parameters())))
    for actual, wanted in zip(found[1], found[0], strict=True):
        oracle.assert_near(actual, wanted)


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap", "jacobian"])
def test_several_gradients_at_once_with_dropout(how: str, execution: str):
    found = []
    for name in ("store", execution):
        net, x, v = network(dropout, execution=name), data(3).requires_grad_(), data(4, 3)
        if how == "jacobian":
            torch.manual_seed(2)
            gradient = torch.autograd.functional.jacobian(net, x, vectorize=True)
        elif how == "vmap":
            y = net(x)
            gradient = torch.func.vmap(
                lambda v, y=y, x=x: torch.autograd.grad(y, x, v, retain_graph=True)[0]
            )(v)
        else:
            gradient = torch.autograd.grad(net(x), x, v, is_grads_batched=True)[0]
        found.append(gradient)
    oracle.assert_near(found[1], found[0])


class Piece(nn.Module):
    """Has what a replay must find again: statistics, and whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(self.norm(x)))


def script() -> nn.Module:
    return torch.jit.script(Piece())


def trace() -> nn.Module:
    return torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.randn(4, WIDTH))


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
@pytest.mark.parametrize("piece", [script, trace])
def test_scripted_pieces(piece: Any, execution: str):
    found = []
    for name in ("store", execution):
        net = network(lambda: nn.Sequential(nn.Tanh(), piece()), execution=name)
        x = data(4).requires_grad_()
        loss = net(x).pow(2).sum() + net(2 * x).sum()
        net.eval()
        loss.backward()
        assert not net.blocks[0].f[1].training
        state = {key: value.clone() for key, value in net.state_dict().items() if value.ndim}
        found.append(({"x": x.grad, **oracle.gradients_of(net)}, state))
    oracle.assert_same_gradients(found[1][0], found[0][0])
    oracle.assert_same_gradients(found[1][1], found[0][1])


def scripted_module() -> nn.Module:
    class Fresh(Piece):
        """A class that the compiler of scripts has not met."""

    return torch.jit.script(Fresh())


def scripted_function() -> nn.Module:
    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return torch.layer_norm(x, [x.shape[-1]], weight).tanh() * weight

    class Calls(nn.Module):
        """A plain module that calls a script, where nobody can look for it."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return script(x, self.weight)

    script = torch.jit.script(scaled)
    return Calls()


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
@pytest.mark.parametrize("piece", [scripted_module, scripted_function])
def test_the_first_call_of_a_script_is_replayed(piece: Any, execution: str):
    # Scripts are profiled when first called, and then compiled anew.
    found = []
    for name in (execution, "store"):
        net = network(lambda: nn.Sequential(nn.Tanh(), piece()), execution=name)
        x = data(4).requires_grad_()
        net.eval()(x).pow(2).sum().backward()
        found.append({"x": x.grad, **oracle.gradients_of(net)})
    oracle.assert_same_gradients(found[0], found[1])
    assert torch._C._get_graph_executor_optimize()


CHOSEN = {"wide": False}


class Fickle(nn.Module):
    """Two branches, one of which a variable of Python chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Linear(WIDTH, 2), nn.Tanh(), nn.Linear(2, WIDTH))
        self.wide = nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, WIDTH))

    @torch.jit.ignore
    def chosen(self):  # A script takes what has no annotation for a tensor.
        return torch.tensor(CHOSEN["wide"])

    def forward(self, x: Tensor) -> Tensor:
        if bool(self.chosen()):
            return self.wide(x)
        return self.narrow(x)


class Forgiving(nn.Module):
    """A branch that goes on where another one fails."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.inner(x)
        except RuntimeError:
            return x


@pytest.mark.parametrize("wrapped", [torch.jit.script, Forgiving])
def test_a_replay_that_differs_raises_our_error(wrapped: Any, monkeypatch: Any):
    net = network(lambda: wrapped(Fickle()), execution="invert")
    loss = net(data(4)).sum()
    monkeypatch.setitem(CHOSEN, "wide", True)
    with pytest.raises(revnet.ReversibleError, match="block 1, branch f: saved tensor"):
        loss.backward()


def test_a_scripted_parameter_changed_before_backward_raises():
    net = network(lambda: nn.Sequential(script()))
    loss = net(data(4)).sum()
    with torch.no_grad():
        net.blocks[0].f[0].linear.weight.mul_(2)
    with pytest.raises(revnet.ReversibleError, match="changed in place"):
        loss.backward()


class Returns(nn.Module):
    """A branch that returns a tensor that it was given before."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out


@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_a_tensor_that_outlived_its_transform(streams: Any):
    values, left = torch.randn(2, 3), list[Tensor]()
    torch.func.grad(lambda t: (left.append(t * 1), t.sum())[1])(values)
    # A kernel would find no memory in it.
    assert not fusible(left)
    x = torch.randn(2, 3, requires_grad=True)
    found = [
        ReversibleSequence([(Returns(out), nn.Identity())], streams=streams)(x)
        for out in (left[0], values)
    ]
    assert torch.equal(*found)
