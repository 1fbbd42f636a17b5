"""The checks for users pass what is right, and say what to fix where something is wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnet import (
    Additive,
    Affine,
    Bijection,
    Coupling,
    Momentum,
    Reversible,
    ReversibleBlock,
    ReversibleError,
    ReversibleSequence,
    Step,
    plan,
    replaying,
)
from revnet.testing import check_gradients, check_inverse


def branch(width: int = 4, out: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, out))


def net(fn: Any = branch, coupling: Any = Additive, depth: int = 6, **options: Any) -> Reversible:
    torch.manual_seed(0)
    return Reversible([Step(fn(), i % 2, (i + 1) % 2, coupling()) for i in range(depth)], **options)


def streams(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)


class Wrong(Coupling):
    def combine(self, target: Tensor, out: Tensor) -> Tensor:
        return target * 2 + out

    def invert(self, target: Tensor, out: Tensor) -> Tensor:
        return target / 2 - out


class Widens(Coupling):
    def combine(self, target: Tensor, out: Tensor) -> Tensor:
        return target.double() + out

    def invert(self, target: Tensor, out: Tensor) -> Tensor:
        return target - out


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).sin()


class PythonRandom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * random.random()


class Counting(nn.Module):
    """Another result in each call, from a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sin() * self.calls


@pytest.mark.parametrize("coupling", [Additive(), Affine(), Momentum(0.5)])
def test_a_right_coupling_passes(coupling: Coupling):
    out = torch.randn(3, 8 if isinstance(coupling, Affine) else 4)
    assert check_inverse(coupling, torch.randn(3, 4), out) < 1e-6


def test_a_wrong_inverse_is_named():
    with pytest.raises(
        ReversibleError, match=r"target came back with a relative error .* reverse order"
    ):
        check_inverse(Wrong(), *streams())
    with pytest.raises(ReversibleError, match="the inverse undoes shape and dtype"):
        check_inverse(Widens(), *streams())


def test_the_drift_of_a_program_is_measured():
    right = net(depth=20).eval()
    assert check_inverse(right, *streams()) < 1e-5
    lossy = Reversible(
        [s for _ in range(100) for s in (Step(branch(), 1, 0, Momentum(0.5)), Step(None, 0, 1))],
        streams="float",
    ).eval()
    with pytest.raises(ReversibleError, match="stream"):
        check_inverse(lossy, *streams())


@pytest.mark.parametrize(
    "options", [{}, {"streams": "fixed"}, {"execution": "checkpoint"}], ids=str
)
def test_right_gradients_pass(options: dict[str, Any]):
    error = check_gradients(net(**options), *streams())
    assert error == 0 if options else error < 1e-4
    pairs = [(branch(), branch()) for _ in range(3)]
    assert check_gradients(ReversibleSequence(pairs, **options), torch.randn(3, 4)) < 1e-4


def test_nothing_is_left_behind():
    module = net(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), execution="checkpoint")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    check_gradients(module, *streams())
    assert module.execution == "checkpoint"
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_generators_are_left_alone():
    module, given = net(), streams()
    state = torch.get_rng_state()
    check_gradients(module, *given)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_gradient_is_named():
    class Claims(Wrong):
        def __init__(self) -> None:
            super().__init__(approximate=True)

    with pytest.raises(ReversibleError, match=r"relative error .* check_inverse"):
        check_gradients(net(coupling=Claims, streams="float"), *streams())


def test_gradients_that_rounding_has_made_wrong_are_named_in_low_precision():
    torch.manual_seed(0)
    program = ReversibleSequence(
        [(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(30)], streams="float"
    ).bfloat16()
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with pytest.raises(ReversibleError, match="use streams='fixed'"):
        check_gradients(program, x)
    assert check_gradients(program, x, tolerance=float("inf")) > 0.1
    program.streams = "fixed"
    assert check_gradients(program, x) == 0.0


@pytest.mark.parametrize("fn", [PythonRandom, Counting])
def test_what_is_not_deterministic_is_named(fn: type[nn.Module]):
    with pytest.raises(ReversibleError, match="two stored runs with the same seed differ"):
        check_gradients(net(fn), *streams())


def test_a_change_in_place_is_named():
    with pytest.raises(ReversibleError, match="in place"):
        check_gradients(net(InPlace), *streams())


def test_a_bijection_without_the_right_inverse_is_named():
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.roll(1, -1)

        def inverse(self, y: Tensor) -> Tensor:
            return y.roll(1, -1)

    module = Reversible(
        [Step(branch()), Step(None, 0, coupling=Bijection(Shift(), rearranges=True))]
    )
    with pytest.raises(ReversibleError, match="stream 0 came back"):
        check_inverse(module.eval(), *streams())


def test_a_block_is_a_program_like_any():
    block = ReversibleBlock(branch(), branch()).eval()
    assert check_inverse(block, *streams()) < 1e-5
    assert check_gradients(block, *streams()) < 1e-5
    assert plan(block, streams(), "minimum").budget <= plan(block, streams(), "stored").budget


class BeforeNorm(nn.Module):
    """A linear layer before a batch norm: in theory the gradient of its bias is zero."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.norm(self.linear(x)).tanh()


@pytest.mark.parametrize("execution", ["invert", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_of_rounding_errors_is_not_accused(execution: str, dtype: torch.dtype):
    for seed in range(5):
        torch.manual_seed(seed)
        program = net(BeforeNorm, depth=12, streams="float", execution=execution).to(dtype)
        assert check_gradients(program, *(torch.randn(16, 4, dtype=dtype) for _ in "ab")) < 1e-3


class WrongBias(torch.autograd.Function):
    """Adds a bias whose gradient is wrong by `error`, but not in stored execution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, error: float) -> Tensor:
        ctx.save_for_backward(x.new_tensor(error))
        return x + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad.sum(0) + ctx.saved_tensors[0], None


class WrongInReplays(BeforeNorm):
    """Has a wrong gradient of the bias before the norm, or of the bias of a small branch."""

    def __init__(self, error: float, normed: bool, factor: float = 1.0) -> None:
        super().__init__(factor)
        self.error, self.normed = error, normed
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        error = self.error if replaying() else 0.0
        x = WrongBias.apply(self.linear(x), self.bias, error)
        return self.factor * (self.norm(x) if self.normed else x).tanh()


@pytest.mark.parametrize(
    ("normed", "factor", "error"), [(True, 1.0, 1e-2), (False, 1.0, 1e-1), (False, 1e-6, 1e-6)]
)
def test_a_wrong_gradient_beside_a_norm_is_named(normed: bool, factor: float, error: float):
    def fn() -> nn.Module:
        return WrongInReplays(error, normed, factor)

    given = torch.randn(16, 4), torch.randn(16, 4)
    with pytest.raises(ReversibleError, match=r"gradient of parameter .*bias has a relative"):
        check_gradients(net(fn, depth=4, streams="float"), *given)
    right = net(lambda: WrongInReplays(0.0, normed, factor), depth=4, streams="float")
    assert check_gradients(right, *given) < 1e-3
