"""One function applied many times. The oracle is a plain loop of the formulas in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnet
from revnet import integrate, measure_memory

WIDTH = 4


class Field(nn.Module):
    """A field that depends on time, with activations larger than its state."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.leave((self.enter(x) * (1 + t)).tanh()).sin() + t * x


def midpoint(f: Callable[..., Tensor], x: Tensor, ts: Tensor) -> Tensor:
    before, now = x, x + (ts[1] - ts[0]) * f(ts[0], x)
    for n in range(1, len(ts) - 1):
        before, now = now, before + (ts[n + 1] - ts[n - 1]) * f(ts[n], now)
    return now


def leapfrog(
    f: Callable[..., Tensor], x: tuple[Tensor, Tensor], ts: Tensor
) -> tuple[Tensor, Tensor]:
    position, velocity = x
    for n in range(len(ts) - 1):
        h = ts[n + 1] - ts[n]
        velocity = velocity + h / 2 * f(ts[n], position)
        position = position + h * velocity
        velocity = velocity + h / 2 * f(ts[n + 1], position)
    return position, velocity


def uneven(steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=dtype) ** 1.5


def given(method: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = 1 if method == "midpoint" else 2
    parts = torch.randn(count, 3, WIDTH, generator=generator).to(dtype)
    return [part.clone().requires_grad_() for part in parts]


def gradients(
    solve: Callable[..., Any], f: nn.Module, method: str, ts: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Return the solution, and gradients of x, of the parameters and of the times."""
    f.zero_grad()
    x = given(method, dtype)
    ts = ts.clone().requires_grad_()
    solution = solve(f, x[0] if method == "midpoint" else tuple(x), ts)
    solution = [solution] if method == "midpoint" else list(solution)
    sum((y * (i + y.cos())).sum() for i, y in enumerate(solution)).backward()
    found = [*solution, *(part.grad for part in x), *(p.grad for p in f.parameters()), ts.grad]
    return [tensor.detach().clone() for tensor in found]


def field() -> Field:
    torch.manual_seed(0)
    return Field()


ORACLES = {"midpoint": midpoint, "leapfrog": leapfrog}


def solver(method: str, **options: Any) -> Callable[..., Any]:
    return lambda f, x, ts: integrate(f, x, ts, method, **options)


@pytest.mark.parametrize("steps", [1, 2, 17])
@pytest.mark.parametrize("method", ORACLES)
def test_gradients_are_those_of_the_discrete_steps(method: str, steps: int):
    f, ts = field().double(), uneven(steps, torch.float64)
    expected = gradients(ORACLES[method], f, method, ts, torch.float64)
    found = gradients(solver(method), f, method, ts, torch.float64)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ORACLES)
def test_in_fixed_streams_they_equal_stored_execution_in_every_bit(method: str, dtype: torch.dtype):
    f, ts = field().to(dtype), uneven(200).to(dtype)
    found, expected = (
        gradients(solver(method, streams="fixed", execution=each), f, method, ts, dtype)
        for each in ("invert", "store")
    )
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("method", "streams", "few", "many"),
    [
        ("midpoint", "fixed", 100, 1000),
        ("midpoint", "float", 10, 60),
        ("leapfrog", "fixed", 10, 60),
        ("leapfrog", "float", 10, 60),
    ],
)
def test_a_step_keeps_its_numbers_of_the_grid_and_nothing_else(
    method: str, streams: str, few: int, many: int
):
    f = field()
    x = given(method, torch.float32)

    def kept(steps: int) -> tuple[int, int]:
        ts = torch.linspace(0, 1, steps + 1).tolist()

        def run() -> Tensor:
            solution = integrate(
                f, x[0] if method == "midpoint" else x, ts, method, streams=streams
            )
            return sum(y.sum() for y in ([solution] if method == "midpoint" else solution))

        report = measure_memory(run)
        return report.saved_bytes, report.peak_bytes

    kept(3)  # the gradients are there from now on
    (saved, peak), (saved_many, peak_many) = kept(few), kept(many)
    # The time and the length of each step; a drift has a length of its own.
    numbers = 2 if method == "midpoint" else 3
    assert saved_many - saved == (many - few) * numbers * 4
    assert peak_many - peak == (many - few) * numbers * 4


@pytest.mark.parametrize("method", ORACLES)
def test_the_error_falls_with_the_square_of_the_step(method: str):
    """Of x'' = -x from (1, 0), which the midpoint rule solves as a system of first order."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def error(steps: int) -> float:
        ts = torch.linspace(0, 2, steps + 1, dtype=torch.float64)
        if method == "leapfrog":
            x, v = integrate(lambda t, x: -x, (one, zero), ts, method)
        else:
            x, v = integrate(lambda t, s: (s[1], -s[0]), (one, zero), ts)
        return abs(x.item() - math.cos(2)) + abs(v.item() + math.sin(2))

    assert 3.7 < error(50) / error(100) < 4.3


def test_times_may_be_a_list_and_lie_on_another_grid_than_the_state():
    f, x = field(), torch.randn(3, WIDTH)
    ts = uneven(9)
    torch.testing.assert_close(integrate(f, x, ts.tolist()), midpoint(f, x, ts))
    backwards = ts.flip(0)
    torch.testing.assert_close(integrate(f, x, backwards), midpoint(f, x, backwards))


def test_a_state_may_be_a_tree():
    state = {"a": torch.randn(3), "b": [torch.randn(2, 2)]}

    def f(t: Tensor, x: dict[str, Any]) -> dict[str, Any]:
        return {"a": x["a"].sin() + x["b"][0].sum(), "b": [x["b"][0] * t]}

    found = integrate(f, state, uneven(5))
    ts, before, now = uneven(5), state, None
    now = {
        "a": state["a"] + (ts[1] - ts[0]) * f(ts[0], state)["a"],
        "b": [state["b"][0] + (ts[1] - ts[0]) * f(ts[0], state)["b"][0]],
    }
    for n in range(1, 5):
        h, out = ts[n + 1] - ts[n - 1], f(ts[n], now)
        before, now = (
            now,
            {"a": before["a"] + h * out["a"], "b": [before["b"][0] + h * out["b"][0]]},
        )
    torch.testing.assert_close(found, now)


def test_dropout_is_repeated():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))

    def found(execution: str) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(3, WIDTH, requires_grad=True)
        solution = integrate(
            lambda t, x: net(x), x, uneven(20), streams="fixed", execution=execution
        )
        net.zero_grad()
        solution.square().sum().backward()
        return [x.grad, net[0].weight.grad]

    assert all(map(torch.equal, found("invert"), found("store")))


def test_transforms_differentiate_the_solution():
    f, x = field().double(), torch.randn(3, WIDTH, dtype=torch.float64)
    ts = uneven(6, torch.float64)
    found = torch.func.grad(lambda x: integrate(f, x, ts).sum())(x)
    expected = torch.func.grad(lambda x: midpoint(f, x, ts).sum())(x)
    torch.testing.assert_close(found, expected)


def test_a_stream_out_of_range_raises():
    with pytest.raises(revnet.ReversibleError, match="step 0: a stream left the range"):
        integrate(lambda t, x: x * 1e6, torch.ones(3), [0.0, 1.0, 2.0], streams="fixed")


def test_updates_too_small_to_count_are_named_once():
    x = torch.ones(64, requires_grad=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        integrate(lambda t, x: x * 1e-6, x, torch.linspace(0, 1, 51), streams="fixed")
    assert len(found) == 1
    assert "step 0: 100% of its nonzero outputs" in str(found[0].message)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"method": "euler"}, ValueError, "method 'euler' is not 'midpoint' or 'leapfrog'"),
        ({"ts": [0.0]}, ValueError, "at least two times"),
        ({"ts": torch.zeros(2, 2)}, ValueError, "at least two times"),
        ({"ts": torch.arange(3)}, TypeError, "times are floating-point"),
        ({"x": torch.arange(3)}, TypeError, "x is torch.int64"),
        ({"x": {}}, TypeError, "x holds no tensors"),
        ({"method": "leapfrog"}, TypeError, "a pair"),
        ({"f": lambda t, x: x[:1]}, revnet.ReversibleError, "step 0 returned a tensor"),
        ({"execution": "keep"}, ValueError, "execution 'keep'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], match: str):
    arguments = {"f": lambda t, x: x, "x": torch.randn(3), "ts": [0.0, 1.0], **change}
    with pytest.raises(error, match=match):
        integrate(**arguments)


# torch.compile itself reads the .grad of whatever crosses a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_caller_leaves_it_to_the_engine():
    f, x, ts = field(), torch.randn(3, WIDTH, requires_grad=True), uneven(6)
    compiled = torch.compile(lambda x: integrate(f, x, ts) * 2, backend="eager")
    torch.testing.assert_close(compiled(x), 2 * midpoint(f, x, ts))
