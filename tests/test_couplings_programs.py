"""Programs of steps: many streams, trees, extra outputs, routing, bijections, weights used many
times.
"""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import revnet
from cases import noted
from oracle import assert_near, weighted
from revnet import (
    Affine,
    Bijection,
    Coupling,
    Fixed,
    Momentum,
    Reversible,
    ReversibleSequence,
    Step,
)
from revnet._factors import Increment, factor_of
from revnet._streams.buffer import BufferedStream, multiply_and_add, subtract_and_divide
from revnet._streams.monitor import RangeMonitor

KINDS = ["float", "fixed"]


class Mix(nn.Module):
    """Reads any number of streams of any widths, returns one of width `out`."""

    def __init__(self, *widths: int, out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Linear(width, 8) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Linear(8, out)

    def forward(self, *xs: Tensor) -> Tensor:
        total = sum(enter(x) for enter, x in zip(self.enter, xs, strict=True))
        return self.leave(self.dropout(total.tanh()))


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def gradients(net: nn.Module, run: Any, *streams: Any) -> list[Tensor]:
    """Outputs and gradients, from a fixed seed."""
    torch.manual_seed(0)
    outputs = [out for out in pytree.tree_leaves(run(*streams)) if isinstance(out, Tensor)]
    wanted = [*pytree.tree_leaves(streams), *net.parameters()]
    return [*outputs, *torch.autograd.grad(weighted(*outputs), wanted)]


def assert_as_stored(net: Reversible, *streams: Any, oracle: Any = None) -> None:
    exact = isinstance(net.streams, Fixed)
    actual = gradients(net, net, *streams)
    execution, net.execution = net.execution, "store"
    stored = gradients(net, net, *streams)
    net.execution = execution
    for a, b in zip(actual, stored, strict=True):
        assert_near(a, b, tolerance=0.0 if exact else 1e-12)
    if oracle is not None:
        for a, b in zip(actual, gradients(net, oracle, *streams), strict=True):
            assert_near(a, b, tolerance=1e-6 if exact else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_streams_of_different_shapes_in_any_order(kind: str, dropout: float):
    torch.manual_seed(0)
    widths = (3, 5, 7, 2)
    plan = [(0, (1,)), (2, (0, 1)), (1, (3,)), (3, (2, 0, 1)), (0, (3, 2)), (0, (1,)), (2, (3,))]
    steps = [
        Step(Mix(*(widths[i] for i in source), out=widths[target], dropout=dropout), target, source)
        for target, source in plan
    ]
    net = Reversible(steps, streams=kind).double()

    def loop(*streams: Tensor) -> list[Tensor]:
        found = list(streams)
        for step in steps:
            found[step.target] = found[step.target] + step.fn(*(found[i] for i in step.source))
        return found

    assert_as_stored(net, *leaves(*((2, width) for width in widths)), oracle=loop)
    net.eval()
    streams = leaves(*((2, width) for width in widths))
    for given_, back in zip(streams, net.inverse(*net(*streams)), strict=True):
        assert_near(back, given_, tolerance=1e-6)


class Vectors(nn.Module):
    """Reads and returns {"scalar", "vectors": [...]}, as equivariant networks do."""

    def __init__(self, out: int = 4) -> None:
        super().__init__()
        self.scalar, self.vector = nn.Linear(4, out), nn.Linear(4, out)

    def forward(self, x: dict[str, Any]) -> dict[str, Any]:
        norm = x["vectors"][0].square().sum(-1)
        gate = self.vector(x["scalar"] + norm).sigmoid()
        return {
            "scalar": self.scalar(norm).tanh(),
            "vectors": [gate[..., None] * self._wide(x["vectors"][0], gate)],
        }

    def _wide(self, vectors: Tensor, gate: Tensor) -> Tensor:
        return torch.cat([vectors] * (gate.shape[-1] // vectors.shape[-2]), -2)


class Sized(Coupling):
    """A user's rule on trees with a scale per element."""

    least_scale = 0.5

    def scale(self, out: Any) -> Any:
        return pytree.tree_map(lambda leaf: 0.5 + leaf.sigmoid(), out)

    def increment(self, out: Any) -> Any:
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coupling", [revnet.Additive, Momentum, Sized])
def test_streams_may_be_trees(kind: str, coupling: type[Coupling]):
    torch.manual_seed(0)
    net = Reversible(
        [Step(Vectors(), i % 2, (i + 1) % 2, coupling()) for i in range(6)], streams=kind
    ).double()
    a, b, c, d = leaves((3, 4), (3, 4, 3), (3, 4), (3, 4, 3))
    assert_as_stored(net, {"scalar": a, "vectors": [b]}, {"scalar": c, "vectors": [d]})


def test_an_affine_coupling_takes_trees_and_other_dimensions():
    torch.manual_seed(0)
    net = Reversible(
        [Step(Vectors(8), i % 2, (i + 1) % 2, Affine(dim=1)) for i in range(4)], streams="fixed"
    ).double()
    a, b, c, d = leaves((3, 4), (3, 4, 3), (3, 4), (3, 4, 3))
    assert_as_stored(net, {"scalar": a, "vectors": [b]}, {"scalar": c, "vectors": [d]})


def test_a_branch_must_return_the_structure_of_its_target():
    net = Reversible([Step(nn.Linear(4, 4), 0, 1)])
    with pytest.raises(revnet.ReversibleError, match=r"step 0 returned a tensor .* same structure"):
        net({"a": torch.randn(2, 4)}, torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"stream 1 is torch\.int64"):
        net(torch.randn(2, 4), torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="the streams hold no tensors: give at least one"):
        Reversible([Step(None)])({}, [])
    with pytest.raises(ValueError, match="got 1 streams, but the steps refer to 2"):
        net(torch.randn(2, 4))


class Squeeze(nn.Module):
    """Pixel-unshuffle, and a permutation of what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(x, 2).flip(1)

    def inverse(self, y: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(y.flip(1), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_bijections_change_shapes_between_steps(kind: str):
    torch.manual_seed(0)

    def convolution(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Tanh())

    steps = [Step(convolution(2), 0, 1), Step(convolution(2), 1, 0)]
    steps += [Step(None, i, coupling=Bijection(Squeeze(), rearranges=True)) for i in (0, 1)]
    steps += [Step(convolution(8), 0, 1), Step(convolution(8), 1, 0)]
    back = Bijection(nn.PixelShuffle(2), nn.PixelUnshuffle(2), rearranges=True)
    steps += [Step(None, i, coupling=back) for i in (0, 1)]
    net = Reversible(steps, streams=kind).double()
    streams = leaves((2, 2, 4, 4), (2, 2, 4, 4))
    assert_as_stored(net, *streams)
    with torch.no_grad():
        y = net(*streams)
    for given_, back in zip(streams, net.inverse(*y), strict=True):
        assert_near(back, given_, tolerance=1e-6)


def test_no_activation_is_kept_around_a_bijection():
    def kept(depth: int) -> int:
        steps = [
            step
            for i in range(depth)
            for step in (
                Step(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), i % 2, (i + 1) % 2),
                Step(None, i % 2, coupling=Bijection(Reverse(), rearranges=True)),
            )
        ]
        return revnet.measure_memory(
            Reversible(steps).double(), *leaves((64, 8), (64, 8))
        ).saved_bytes

    assert kept(4) == kept(32)


class Mixing(nn.Module):
    """A 1 × 1 convolution by an orthogonal matrix, times `stretch` or its inverse along each
    axis.
    """

    def __init__(self, width: int, stretch: float = 1.0) -> None:
        super().__init__()
        self.skew = nn.Parameter(0.3 * torch.randn(width, width))
        self.register_buffer("axes", torch.tensor([stretch, 1 / stretch]).repeat(width // 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, (self._rotation() * self.axes)[..., None, None])

    def inverse(self, y: Tensor) -> Tensor:
        return nn.functional.conv2d(y, (self._rotation() * (1 / self.axes)).T[..., None, None])

    def _rotation(self) -> Tensor:
        return torch.linalg.matrix_exp(self.skew - self.skew.T)


def mixed(depth: int, approximate: bool, stretch: float = 1.0) -> Reversible:
    torch.manual_seed(0)
    steps = []
    for i in range(depth):
        steps.append(Step(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()), i % 2, (i + 1) % 2))
        steps.append(
            Step(None, i % 2, coupling=Bijection(Mixing(8, stretch), approximate=approximate))
        )
    return Reversible(steps, streams="float")


def error_of_gradients(net: Reversible, *streams: Tensor) -> float:
    actual = gradients(net, net, *streams)
    net.execution = "store"
    pairs = zip(actual, gradients(net, net, *streams), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def test_an_orthogonal_convolution_is_undone_in_floats_where_that_is_asked_for():
    images = leaves((4, 8, 3, 3), (4, 8, 3, 3), dtype=torch.float32)

    def kept(depth: int) -> int:
        return revnet.measure_memory(mixed(depth, approximate=True), *images).saved_bytes

    assert kept(4) == kept(64)
    assert error_of_gradients(mixed(64, approximate=True), *images) < 1e-3
    # Any other map enlarges rounding errors, which is why the default is to keep the target.
    assert error_of_gradients(mixed(64, approximate=False, stretch=2.0), *images) < 1e-4
    assert not error_of_gradients(mixed(64, approximate=True, stretch=2.0), *images) < 1e-1


class Shear(nn.Module):
    """Multiplies by a matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def rotation(angles: Tensor) -> list[Step]:
    """`(a, b)` becomes `(a cos - b sin, a sin + b cos)`."""
    tan, sin = (-(angles / 2).tan()).diag(), angles.sin().diag()
    return [Step(Shear(tan), 0, 1), Step(Shear(sin), 1, 0), Step(Shear(tan.clone()), 0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_three_additive_steps_mix_streams_and_are_undone_exactly(kind: str):
    torch.manual_seed(0)
    angles = torch.randn(32, 4, dtype=torch.float64)
    net = Reversible([step for row in angles for step in rotation(row)], streams=kind).double()
    streams = leaves((5, 4), (5, 4))

    def oracle(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for row in angles:
            a, b = a * row.cos() - b * row.sin(), a * row.sin() + b * row.cos()
        return a, b

    for found, expected in zip(net(*streams), oracle(*streams), strict=True):
        assert_near(found, expected, tolerance=1e-12 if kind == "float" else 1e-5)
    assert_as_stored(net, *streams)
    few = Reversible(rotation(angles[0]), streams=kind).double()
    few(*streams)
    assert (
        revnet.measure_memory(net, *streams).saved_bytes
        == revnet.measure_memory(few, *streams).saved_bytes
    )


class Reverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    def inverse(self, y: Tensor) -> Tensor:
        return y.flip(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_reads_its_target_keeps_it(kind: str):
    torch.manual_seed(0)
    net = Reversible(
        [Step(Mix(4, 4, out=4), i % 2, (0, 1)) for i in range(5)], streams=kind
    ).double()
    assert_as_stored(net, *leaves((2, 4), (2, 4)))
    with pytest.raises(revnet.ReversibleError, match="reads its target"):
        net.inverse(*leaves((2, 4), (2, 4)))


class Experts(nn.Module):
    """Routes each token to one of two experts by a bit that rounding errors tip; counts the load of
    the first.
    """

    def __init__(self, *, remember: bool) -> None:
        super().__init__()
        self.expert = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.gate = nn.Linear(6, 2)
        self.remember = remember

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.gate(x).softmax(-1)
        route = ((x.sum(-1, keepdim=True) * 1e14).sin() > 0).long()
        if self.remember:
            route = revnet.remember(route)
        noted(self).append(route)
        out = torch.where(
            route == 0, self.expert[0](x), self.expert[1](x)
        ).tanh() * probability.gather(-1, route)
        return out, probability.mean(0)[0]


@pytest.mark.parametrize(("kind", "remember"), [("float", True), ("fixed", False), ("fixed", True)])
def test_routes_and_auxiliary_losses(kind: str, remember: bool):
    torch.manual_seed(0)
    experts = [Experts(remember=remember) for _ in range(12)]
    net = Reversible(
        [Step(fn, i % 2, (i + 1) % 2) for i, fn in enumerate(experts)], streams=kind
    ).double()
    assert_as_stored(net, *leaves((20, 6), (20, 6)))
    for fn in experts:
        forward, replay, *_ = noted(fn)
        assert torch.equal(forward, replay)


def test_without_remembering_float_streams_tip_these_routes():
    torch.manual_seed(0)
    experts = [Experts(remember=False) for _ in range(12)]
    net = Reversible(
        [Step(fn, i % 2, (i + 1) % 2) for i, fn in enumerate(experts)], streams="float"
    ).double()
    gradients(net, net, *leaves((20, 6), (20, 6)))
    assert not all(torch.equal(*noted(fn)) for fn in experts)


def test_remember_takes_decisions():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(TypeError, match="which has no gradient"):
        revnet.remember(x * 2)
    chosen = torch.tensor([1, 2])
    assert revnet.remember(chosen) is chosen


def test_remembering_in_a_nested_sequence():
    torch.manual_seed(0)
    inner = Reversible(
        [Step(Experts(remember=True), i % 2, (i + 1) % 2) for i in range(4)], streams="float"
    )

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y1, y2, _ = self.inner(x, x.tanh())
            return (y1 + y2).tanh()

    net = Reversible(
        [Step(Outer(), 0, 1), Step(Mix(6, out=6), 1, 0), Step(Mix(6, out=6), 0, 1)]
    ).double()
    assert_as_stored(net, *leaves((20, 6), (20, 6)))


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_layers_between_stages(kind: str):
    torch.manual_seed(0)

    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pairs = [[(Mix(w, out=w), Mix(w, out=w)) for _ in range(3)] for w in (4, 6)]
            self.first = ReversibleSequence(pairs[0], streams=kind)
            self.change = nn.Linear(4, 6)
            self.second = ReversibleSequence(pairs[1], streams=kind)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.change(self.first(x)).relu())

    net = Stages().double()
    stored = copy.deepcopy(net)
    stored.first.execution = stored.second.execution = "store"
    x = leaves((5, 4))
    for a, b in zip(gradients(net, net, *x), gradients(stored, stored, *x), strict=True):
        assert_near(a, b, tolerance=0.0 if kind == "fixed" else 1e-12)


def tied(
    applications: int, coupling: type[Coupling] = revnet.Additive, **options: Any
) -> Reversible:
    torch.manual_seed(0)
    f = Step(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), 0, 1, coupling())
    g = Step(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), 1, 0)
    with torch.no_grad():
        for parameter in (*f.parameters(), *g.parameters()):
            parameter.mul_(0.1)
    return Reversible([f, g] * (applications // 2), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_are_registered_once_and_gradients_add_up(kind: str):
    net = tied(40, streams=kind).double()
    assert len(net.steps) == 2
    assert len(net.state_dict()) == len(list(net.parameters())) == 8
    f, g = net.steps

    def loop(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(20):
            x1 = x1 + f.fn(x2)
            x2 = x2 + g.fn(x1)
        return x1, x2

    assert_as_stored(net, *leaves((3, 8), (3, 8)), oracle=loop)


@pytest.mark.slow
def test_thousands_of_tied_steps_in_constant_memory():
    def report(applications: int) -> revnet.MemoryReport:
        net = tied(applications, streams="fixed")
        streams = leaves((512, 8), (512, 8), dtype=torch.float32)
        net(*streams)
        return revnet.measure_memory(net, *streams)

    few, many = report(100), report(2000)
    assert many.saved_bytes == few.saved_bytes
    assert many.grad_bytes == few.grad_bytes
    assert many.peak_bytes == few.peak_bytes


def test_keywords_go_where_the_route_says():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
            out = self.linear(x).tanh()
            return out if by is None else out * by

    torch.manual_seed(0)
    net = Reversible(
        [Step(Scaled(), i % 2, (i + 1) % 2) for i in range(4)], args_route={"by": [1, 0, 0, 1]}
    ).double()
    x1, x2, by = leaves((3, 4), (3, 4), (3, 1))
    found = []
    for net.execution in ("store", "invert"):
        grads = torch.autograd.grad(weighted(*net(x1, x2, by=by)), [x1, x2, by, *net.parameters()])
        found.append(grads)
    for a, b in zip(*found, strict=True):
        assert_near(a, b)
    with pytest.raises(TypeError, match="no route for keyword 'mask'"):
        net(x1, x2, mask=by)
    with pytest.raises(ValueError, match="has 2 entries for 4 steps"):
        Reversible(list(net.steps), args_route={"by": [True, False]})


def test_what_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="steps is empty"):
        Reversible([])
    with pytest.raises(TypeError, match="step 1 is Linear"):
        Reversible([Step(nn.Linear(2, 2)), nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="fn is int"):
        Step(3)
    with pytest.raises(TypeError, match="which is not a Coupling"):
        Step(nn.Linear(2, 2), coupling=Momentum)
    with pytest.raises(ValueError, match="counted from 0"):
        Step(nn.Linear(2, 2), -1)
    for wrong in ({"target": 0.5}, {"target": "0"}, {"source": 1.0}, {"source": (0, "a")}):
        with pytest.raises(TypeError, match="counted by integers"):
            Step(nn.Linear(2, 2), **wrong)
    assert Step(nn.Linear(2, 2), np.int64(1), np.array([0])).source == (0,)


@pytest.mark.parametrize("rule", [revnet.Midpoint, revnet.Leapfrog])
def test_a_step_size_is_a_finite_number(rule: Any) -> None:
    for wrong in ("a", None, [1.0], torch.ones(())):
        with pytest.raises(TypeError, match=r"\(step_size=.*\): expected a number"):
            rule(wrong)
    for wrong in (math.nan, -math.inf):
        with pytest.raises(ValueError, match=r"\(step_size=.*\): expected a finite one"):
            rule(wrong)
    assert rule(np.float32(0.5)).step_size == rule(Fraction(1, 2)).step_size == 0.5


@given(
    ratios=st.lists(st.tuples(st.integers(1, 9999), st.integers(1, 9999)), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    per_element=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_multiplying_integers_loses_nothing(
    ratios: list[tuple[int, int]], dtype: torch.dtype, per_element: bool, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    fixed = Fixed()
    monitor = RangeMonitor()
    start: Any = fixed.encode(torch.randn(50, generator=generator, dtype=dtype))
    start.value[0] = torch.nan
    held = start
    nothing = Increment(torch.zeros(50))
    # Growth stays in range, and a float says what comes out.
    product, scales, befores = fixed.counts(held)[0].double(), [], []
    for n, d in ratios:
        scale: Any = Fraction(min(n, d), max(n, d))
        if per_element:
            scale = 0.5 + torch.rand(50, generator=generator, dtype=torch.float64) / 2
        scales.append(factor_of(scale, 0.5))
        befores.append(held)
        product = product * (scale if per_element else float(scale))
        held = multiply_and_add(held, scales[-1], nothing, fixed, monitor, 0)
    assert monitor.check() is None
    assert ((fixed.counts(held.stream)[0].double() - product)[1:].abs() <= 3 * len(ratios)).all()
    assert held.stream.value[0].isnan()
    for factor, before in zip(reversed(scales), reversed(befores), strict=True):
        held = subtract_and_divide(held, factor, nothing, fixed)
        assert isinstance(held, BufferedStream) == isinstance(before, BufferedStream)
        for a, b in zip(pytree.tree_leaves(held), pytree.tree_leaves(before), strict=True):
            assert torch.equal(a[1:], b[1:])
    assert held.residual.equal(start.residual)


class Normed(nn.Module):
    """Offers its branch as a method."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)

    def branch(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(x)).tanh())


def test_a_branch_may_be_the_method_of_a_module_with_state() -> None:
    found = []
    for execution in ("store", "invert"):
        torch.manual_seed(0)
        modules = [Normed().double() for _ in range(4)]
        net = Reversible(
            [Step(m.branch, i % 2, (i + 1) % 2) for i, m in enumerate(modules)], execution=execution
        )
        x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6).requires_grad_()
        loss = weighted(*net(x, x.sin()))
        for module in modules:
            module.eval()
        loss.backward()
        state = [
            tensor
            for module in modules
            for tensor in (*module.buffers(), module.linear.weight.grad)
        ]
        found.append([x.grad, *state])
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected)
