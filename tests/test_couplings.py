"""Every coupling × stream kind × execution × dropout gives the gradients of the plain stored
loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import revnet
from oracle import assert_near, weighted
from revnet import (
    Additive,
    Affine,
    Bijection,
    Coupling,
    Fixed,
    Leapfrog,
    Midpoint,
    Momentum,
    Reversible,
    Step,
)
from revnet.testing import check_gradients

WIDTH = 6


class Roll(nn.Module):
    """A permutation of the features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)

    def inverse(self, y: Tensor) -> Tensor:
        return y.roll(-1, -1)


class Rotation(nn.Module):
    """An orthogonal map with a trained angle."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.randn(WIDTH // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self._turn(x, self.angles)

    def inverse(self, y: Tensor) -> Tensor:
        return self._turn(y, -self.angles)

    def _turn(self, x: Tensor, angles: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat(
            (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1
        )


class Damped(Coupling):
    """A user's rule with a constant scale above one."""

    least_scale = Fraction(7, 5)

    def scale(self, out: Any) -> Fraction:
        return self.least_scale

    def increment(self, out: Any) -> Any:
        return out.tanh()


class Cubic(Coupling):
    """A user's rule that fixed streams do not know."""

    def combine(self, target: Any, out: Any) -> Any:
        return target * (out / 8).cosh() + out

    def invert(self, target: Any, out: Any) -> Any:
        return (target - out) / (out / 8).cosh()


def branch(out: int = WIDTH, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, out))


def alternate(coupling: Coupling, out: int = WIDTH) -> Callable[[int, float], list[Step]]:
    return lambda depth, p: [
        Step(branch(out, p), i % 2, (i + 1) % 2, coupling) for i in range(depth)
    ]


def drifting(kick: Coupling, drift: Coupling) -> Callable[[int, float], list[Step]]:
    return lambda depth, p: [
        step
        for _ in range(depth // 2)
        for step in (Step(branch(dropout=p), 1, 0, kick), Step(None, 0, 1, drift))
    ]


def with_bijection(bijection: Callable[[], Coupling]) -> Callable[[int, float], list[Step]]:
    return lambda depth, p: [
        step
        for i in range(depth // 2)
        for step in (
            Step(branch(dropout=p), i % 2, (i + 1) % 2),
            Step(None, i % 2, coupling=bijection()),
        )
    ]


def _affine(x: Tensor, out: Tensor) -> Tensor:
    raw, shift = out[..., :WIDTH], out[..., WIDTH:]
    return x * torch.exp(0.7 * torch.tanh(raw / 0.7)) + shift


# The program, and the same rules written out.
RULES: dict[
    str, tuple[Callable[[int, float], list[Step]], Callable[[Step, Tensor, Any], Tensor]]
] = {
    "additive": (alternate(Additive()), lambda step, x, out: x + out),
    "affine": (alternate(Affine(limit=0.7), 2 * WIDTH), lambda step, x, out: _affine(x, out)),
    "momentum": (
        drifting(Momentum(0.9), Additive()),
        lambda step, x, out: 0.9 * x + 0.1 * out if step.target else x + out,
    ),
    "midpoint": (alternate(Midpoint(0.1)), lambda step, x, out: x + 0.2 * out),
    "leapfrog": (drifting(Leapfrog(0.1), Leapfrog(0.1)), lambda step, x, out: x + 0.1 * out),
    "permutation": (
        with_bijection(lambda: Bijection(Roll(), rearranges=True)),
        lambda step, x, out: x.roll(1, -1) if out is None else x + out,
    ),
    "rotation": (
        with_bijection(lambda: Bijection(Rotation())),
        lambda step, x, out: step.coupling.module(x) if out is None else x + out,
    ),
    "user-scale": (alternate(Damped()), lambda step, x, out: 1.4 * x + out.tanh()),
    "user-rule": (alternate(Cubic()), lambda step, x, out: x * (out / 8).cosh() + out),
}
# Undone by float streams without keeping targets.
INVERTIBLE = ["additive", "midpoint", "leapfrog", "permutation"]
# Undone by fixed streams in every bit; the others keep their targets there.
EXACT = [*INVERTIBLE, "affine", "momentum", "user-scale"]


def program(
    name: str, depth: int, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **options: Any
) -> Reversible:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Reversible(RULES[name][0](depth, dropout), **options).to(dtype)


def streams_of(dtype: torch.dtype = torch.float64, batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(batch, WIDTH, dtype=torch.float64, generator=generator)
        .to(dtype)
        .requires_grad_()
        for _ in "ab"
    ]


def loop(net: Reversible, name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The program as anyone would write it."""
    rule = RULES[name][1]

    def run(*streams: Tensor) -> tuple[Tensor, ...]:
        found = list(streams)
        for step in (net.steps[i] for i in net._order):
            out = step.fn(found[step.source[0]]) if step.fn is not None else None
            if step.fn is None and step.source:
                out = found[step.source[0]]
            found[step.target] = rule(step, found[step.target], out)
        return tuple(found)

    return run


def trained(
    run: Callable[..., Any], net: nn.Module, streams: list[Tensor], seed: int = 0
) -> dict[str, Tensor]:
    """Outputs and gradients of one pass."""
    streams = [stream.detach().clone().requires_grad_() for stream in streams]
    torch.manual_seed(seed)
    outputs = run(*streams)
    parameters = dict(net.named_parameters())
    grads = torch.autograd.grad(weighted(*outputs), [*streams, *parameters.values()])
    values = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return values | dict(zip([*map(str, range(len(streams))), *parameters], grads, strict=True))


def assert_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


EXECUTIONS = ["store", "select", "checkpoint", "offload", "invert"]


@given(
    name=st.sampled_from(sorted(RULES)),
    kind=st.sampled_from(["auto", "float", "fixed", Fixed(30)]),
    execution=st.one_of(
        st.sampled_from(EXECUTIONS), st.lists(st.sampled_from(EXECUTIONS), min_size=8, max_size=8)
    ),
    dropout=st.sampled_from([0.0, 0.4]),
)
def test_gradients_are_those_of_the_stored_loop(
    name: str, kind: Any, execution: Any, dropout: float
):
    net = program(name, 8, dropout, streams=kind, execution=execution)
    actual = trained(net, net, streams_of())
    expected = trained(loop(net, name), net, streams_of())
    fixed = isinstance(kind, Fixed) or kind == "fixed"
    for key in expected:
        assert_near(actual[key], expected[key], key, 1e-6 if fixed else 1e-12)
    if fixed:
        net.execution = "store"
        assert_bits(actual, trained(net, net, streams_of()))


def deep(name: str, dtype: torch.dtype, **options: Any) -> Reversible:
    """Return 256 steps whose streams stay in the range of fixed ones: less of the rules that
    multiply.
    """
    net = program(name, 40 if name == "user-scale" else 256, dtype=dtype, **options)
    if name == "affine":
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(0.5)
    return net


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_by_default_gradients_are_right_at_depth_256(name: str, dtype: torch.dtype):
    net = deep(name, dtype)
    actual = trained(net, net, streams_of(dtype))
    net.execution = "store"
    expected = trained(net, net, streams_of(dtype))
    exact = not isinstance(
        net._arithmetic(streams_of(dtype)[0]), type(net._arithmetic(streams_of()[0]))
    )
    for key in expected:
        tolerance = 0.0 if exact else {torch.float64: 1e-11, torch.float32: 2e-3}[dtype]
        assert_near(actual[key], expected[key], key, tolerance)


class Narrow(nn.Module):
    """A branch that reads one dtype and returns another."""

    def __init__(self, out: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float()).tanh().to(self.out)


@pytest.mark.parametrize("low", [0, 1])
def test_one_stream_in_low_precision_makes_all_fixed(low: int):
    torch.manual_seed(0)
    dtypes = [torch.bfloat16 if i == low else torch.float32 for i in range(2)]
    steps = [Step(Narrow(dtypes[i % 2]), i % 2, (i + 1) % 2) for i in range(32)]
    assert (
        check_gradients(Reversible(steps), *(torch.randn(4, 8).to(dtype) for dtype in dtypes))
        == 0.0
    )


@pytest.mark.parametrize("name", EXACT)
def test_fixed_streams_undo_in_every_bit_at_depth_256(name: str):
    net = deep(name, torch.float32, dropout=0.2, streams="fixed")
    actual = trained(net, net, streams_of(torch.float32))
    net.execution = "store"
    assert_bits(actual, trained(net, net, streams_of(torch.float32)))


def test_momentum_undone_in_floats_is_wrong_which_is_why_it_is_not_the_default():
    errors = {}
    for approximate in (False, True):
        torch.manual_seed(1)
        coupling = Momentum(0.5, approximate=approximate)
        net = Reversible(drifting(coupling, Additive())(128, 0.0), streams="float").double()
        actual = trained(net, net, streams_of())
        net.execution = "store"
        expected = trained(net, net, streams_of())
        errors[approximate] = max(
            ((actual[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected
        )
    assert errors[False] < 1e-12
    assert not errors[True] < 0.1


def test_anchors_keep_the_error_of_an_approximate_inverse_small():
    errors = {}
    for every in (4, 256):
        torch.manual_seed(1)
        net = Reversible(
            drifting(Momentum(0.5, approximate=True), Additive())(256, 0.0), streams="float"
        ).double()
        # One step of each stream keeps its target.
        net.execution = ["checkpoint" if i % (2 * every) < 2 else "invert" for i in range(256)]
        actual = trained(net, net, streams_of())
        net.execution = "store"
        expected = trained(net, net, streams_of())
        errors[every] = max(
            ((actual[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected
        )
    assert errors[4] < 1e-11
    assert not errors[256] < 0.1


@pytest.mark.parametrize("name", [*INVERTIBLE, "rotation"])
def test_an_approximate_inverse_can_be_asked_for(name: str):
    net = program(name, 32, streams="float")
    for step in net.steps:
        step.coupling.approximate = True
    kept = revnet.measure_memory(net, *streams_of()).saved_bytes
    assert kept <= 4 * 2 * 3 * WIDTH * 8
    actual = trained(net, net, streams_of())
    expected = trained(loop(net, name), net, streams_of())
    for key in expected:
        assert_near(actual[key], expected[key], key, 1e-11)


def saved(steps: list[Step], kind: Any) -> int:
    net = Reversible(steps, streams=kind)
    streams = streams_of(torch.float32, batch=512)
    net(*streams)
    return revnet.measure_memory(net, *streams).saved_bytes


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "fixed") for name in EXACT), *((name, "float") for name in INVERTIBLE)],
)
def test_memory_is_flat_in_depth(name: str, kind: str):
    few, many = (saved(RULES[name][0](depth, 0.0), kind) for depth in (4, 40))
    if name == "affine":
        # A step takes up to 0.7 / ln 2 bits of a buffer's 63 - 24: within 40 steps each stream
        # begins at most a second.
        assert few <= many <= few + 2 * 512 * WIDTH * 8
    elif (name, kind) == ("momentum", "fixed"):
        # A buffer of 8 bits has widened to 16.
        assert few <= many <= few + 512 * WIDTH
    else:
        assert many == few


def test_momentum_takes_its_bits_per_step_and_no_more():
    assert Momentum(0.9).bits_per_step == pytest.approx(math.log2(10 / 9))
    assert Momentum(0.5).bits_per_step == 1
    # One bit per step: a byte lasts for eight steps.
    sizes = [
        saved(drifting(Momentum(0.5), Additive())(2 * steps, 0.0), "fixed")
        for steps in (1, 8, 9, 64, 65)
    ]
    byte = 512 * WIDTH
    assert [size - sizes[0] for size in sizes] == [0, 0, byte, 7 * byte, 8 * byte]


def test_the_log_determinant_is_that_of_the_jacobian():
    torch.manual_seed(0)
    net = Reversible(
        [
            Step(branch(2 * WIDTH), i % 2, (i + 1) % 2, Affine(limit=1.5, log_det=True))
            for i in range(4)
        ],
        streams="float",
    ).double()
    x = torch.randn(5, 2 * WIDTH, dtype=torch.float64)

    def flat(row: Tensor) -> Tensor:
        return torch.cat(net(*row[None].chunk(2, -1))[:2], -1)[0]

    *_, aux = net(*x.chunk(2, -1))
    found = sum(extra["log_det"] for extra in aux.values())
    net.execution = "store"
    expected = torch.stack(
        [torch.autograd.functional.jacobian(flat, row).slogdet().logabsdet for row in x]
    )
    assert_near(found, expected, "log_det", 1e-12)


@pytest.mark.parametrize("kind", ["float", "fixed"])
def test_gradients_flow_through_the_log_determinant(kind: str):
    torch.manual_seed(0)
    steps = [
        Step(branch(2 * WIDTH, 0.3), i % 2, (i + 1) % 2, Affine(log_det=True)) for i in range(6)
    ]
    net = Reversible(steps, streams=kind).double()
    found = []
    for net.execution in ("store", "invert"):
        net.zero_grad()
        torch.manual_seed(3)
        y1, y2, aux = net(*streams_of())
        assert list(aux) == [f"step {i}" for i in range(6)]
        (
            weighted(y1, y2) + sum(extra["log_det"].square().sum() for extra in aux.values())
        ).backward()
        found.append({name: parameter.grad for name, parameter in net.named_parameters()})
    assert_bits(*found)


@pytest.mark.parametrize("name", [name for name in RULES if name != "user-scale"])
def test_the_inverse_undoes_the_forward_pass(name: str):
    net = program(name, 8, streams="float").eval()
    streams = streams_of()
    for given_, back in zip(streams, net.inverse(*net(*streams)), strict=True):
        assert_near(back, given_, name, 1e-12)


@pytest.mark.parametrize("gamma", [0, 1, -0.5, 1.5])
def test_momentum_takes_a_gamma_between_zero_and_one(gamma: float):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Momentum(gamma)


def test_momentum_takes_a_gamma_of_few_digits():
    with pytest.raises(ValueError, match="four decimal digits"):
        Momentum(1 / 3)
    assert Momentum(Fraction(1, 3)).gamma == Fraction(1, 3)
    assert Momentum(0.99).gamma == Fraction(99, 100)


def test_errors_name_the_step():
    net = Reversible([Step(branch(), 0, 1), Step(branch(WIDTH + 1), 1, 0, Affine())])
    with pytest.raises(revnet.ReversibleError, match=r"step 1 returned .* side by side along"):
        net(*streams_of(torch.float32))
    for limit in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive bound"):
            Affine(limit=limit)
    with pytest.raises(TypeError, match="no inverse"):
        Bijection(nn.Linear(2, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5, 0.4])
def test_a_scaled_stream_that_leaves_its_range_is_found(bad: float):
    class Scaled(Coupling):
        least_scale = 0.5

        def scale(self, out: Tensor) -> Tensor:
            return torch.full_like(out, bad)

        def increment(self, out: Tensor) -> Tensor:
            return torch.zeros_like(out)

    net = Reversible([Step(branch(), 0, 1, Scaled())], streams=Fixed(37))
    x = torch.full((3, WIDTH), 1e3)
    y, _ = net(x, x)
    assert y.isnan().all()
    with pytest.raises(revnet.ReversibleError, match="step 0: a stream left the range"):
        net.check()
