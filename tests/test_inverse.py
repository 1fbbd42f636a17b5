"""Training through the inverse: a pass of the engine in reverse order.

The oracle is a plain loop of the formulas, under ordinary autograd in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import revnet
from revnet import Reversible, ReversibleBlock, ReversibleSequence, Step, measure_memory

WIDTH = 6


class Branch(nn.Module):
    """Two layers whose activations are many times as large as the stream."""

    def __init__(self, out: int = WIDTH, hidden: int = 4 * WIDTH) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        out = self.leave(self.enter(x).tanh()).sin()
        return out if shift is None else out + shift * x


class Damped(revnet.Coupling):
    """The rule of docs/couplings.md, with both bounds of its scale."""

    least_scale, greatest_scale = 0.5, 1.0

    def scale(self, out: Tensor) -> Tensor:
        return 0.5 + out.chunk(2, -1)[0].sigmoid() / 2

    def increment(self, out: Tensor) -> Tensor:
        return out.chunk(2, -1)[1]


class Cubic(revnet.Coupling):
    def combine(self, target: Tensor, out: Tensor) -> Tensor:
        return (target + out) ** 3

    def invert(self, target: Tensor, out: Tensor) -> Tensor:
        return target.sign() * target.abs() ** (1 / 3) - out


class Reverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    inverse = forward


class Rotation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.matrix_exp(self.angles - self.angles.T)

    def inverse(self, x: Tensor) -> Tensor:
        return x @ torch.matrix_exp(self.angles.T - self.angles)


# Of each rule how it is made, the outputs of its branch, and its inverse as a formula.
RULES: dict[str, tuple[Callable[[], revnet.Coupling], int, Callable[..., Tensor]]] = {
    "additive": (revnet.Additive, WIDTH, lambda rule, y, out: y - out),
    "midpoint": (lambda: revnet.Midpoint(0.3), WIDTH, lambda rule, y, out: y - 0.6 * out),
    "leapfrog": (lambda: revnet.Leapfrog(0.3), WIDTH, lambda rule, y, out: y - 0.3 * out),
    "momentum": (lambda: revnet.Momentum(0.9), WIDTH, lambda rule, y, out: (y - 0.1 * out) / 0.9),
    "affine": (
        lambda: revnet.Affine(limit=0.5),
        2 * WIDTH,
        lambda rule, y, out: (
            (y - out[..., WIDTH:]) * (-0.5 * (out[..., :WIDTH] / 0.5).tanh()).exp()
        ),
    ),
    "damped": (
        Damped,
        2 * WIDTH,
        lambda rule, y, out: (y - out[..., WIDTH:]) / (0.5 + out[..., :WIDTH].sigmoid() / 2),
    ),
    "cubic": (
        Cubic,
        WIDTH,
        lambda rule, y, out: y.sign() * y.abs() ** (1 / 3) - out,
    ),
    "reverse": (
        lambda: revnet.Bijection(Reverse(), rearranges=True),
        0,
        lambda rule, y, out: y.flip(-1),
    ),
    "rotation": (
        lambda: revnet.Bijection(Rotation()),
        0,
        lambda rule, y, out: y @ torch.matrix_exp(rule.module.angles.T - rule.module.angles),
    ),
}


def program(name: str, depth: int = 6, **options: object) -> Reversible:
    torch.manual_seed(0)
    make, out, _ = RULES[name]
    steps = []
    for i in range(depth):
        if out:
            steps.append(Step(Branch(out), i % 2, (i + 1) % 2, make()))
        else:
            steps += [Step(None, i % 2, coupling=make()), Step(Branch(), i % 2, (i + 1) % 2)]
    return Reversible(steps, **options)


def unrolled(net: Reversible, name: str, streams: list[Tensor]) -> list[Tensor]:
    """Return the inverse of `program`, by the formulas alone."""
    found = list(streams)
    for step in reversed(net.steps):
        out = None if step.fn is None else step.fn(*(found[i] for i in step.source))
        if isinstance(step.coupling, revnet.Additive):
            found[step.target] = found[step.target] - out
        else:
            found[step.target] = RULES[name][2](step.coupling, found[step.target], out)
    return found


def gradients(
    module: nn.Module, run: Callable[[Tensor, Tensor], tuple[Tensor, ...]], dtype: torch.dtype
) -> list[Tensor]:
    """Return outputs, and gradients of the inputs and of all parameters."""
    module.zero_grad()
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(3, WIDTH, generator=generator).to(dtype).requires_grad_() for _ in "12"]
    outputs = run(*given)
    weights = [torch.randn(3, WIDTH, generator=generator).to(dtype) for _ in "12"]
    sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True)).backward()
    found = [*outputs, *(x.grad for x in given), *(p.grad for p in module.parameters())]
    return [tensor.detach().clone() for tensor in found]


@pytest.mark.parametrize("name", RULES)
def test_the_inverse_of_a_program_has_the_gradients_of_a_plain_loop(name: str):
    net = program(name, streams="float").double()
    expected = gradients(net, lambda *y: unrolled(net, name, y), torch.float64)
    for actual, wanted in zip(gradients(net, net.inverse, torch.float64), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_in_fixed_streams_the_inverse_equals_stored_execution_in_every_bit(name: str):
    net = program(name, streams="fixed")
    found = gradients(net, net.inverse, torch.float32)
    net.execution = "store"
    expected = gradients(net, net.inverse, torch.float32)
    assert all(map(torch.equal, found, expected))
    # And it is the inverse of the rule, not any function.
    near = gradients(net, lambda *y: unrolled(net, name, y), torch.float32)
    for actual, wanted in zip(found, near, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)


def pairs(depth: int) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(0)
    return [(Branch(), Branch()) for _ in range(depth)]


def plain(blocks: list[tuple[nn.Module, nn.Module]], y1: Tensor, y2: Tensor, **keywords: Tensor):
    for f, g in reversed(blocks):
        y2 = y2 - g(y1)
        y1 = y1 - f(y2, **keywords)
    return y1, y2


def test_the_inverse_of_a_sequence_takes_its_keywords():
    blocks = pairs(4)
    net = ReversibleSequence(blocks, {"shift": ((True, False),) * 4}, streams="float").double()
    shift = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    found = gradients(net, lambda *y: net.inverse(*y, shift=shift), torch.float64)
    found.append(shift.grad)
    shift.grad = None
    expected = gradients(net, lambda *y: plain(blocks, *y, shift=shift), torch.float64)
    for actual, wanted in zip(found, [*expected, shift.grad], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_the_inverse_of_a_block():
    block = ReversibleBlock(*pairs(1)[0]).double()
    pair = [(block.f, block.g)]
    expected = gradients(block, lambda *y: plain(pair, *y), torch.float64)
    for actual, wanted in zip(
        gradients(block, block.inverse, torch.float64), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_dropout_of_the_inverse_is_repeated_in_its_backward():
    torch.manual_seed(0)
    blocks = [(nn.Sequential(Branch(), nn.Dropout(0.5)), Branch()) for _ in range(4)]
    net = ReversibleSequence(blocks, streams="fixed")

    def seeded(*y: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return net.inverse(*y)

    found = gradients(net, seeded, torch.float32)
    net.execution = "store"
    assert all(map(torch.equal, found, gradients(net, seeded, torch.float32)))


@pytest.mark.parametrize(
    ("kind", "streams"),
    [
        ("sequence", "float"),
        ("sequence", "fixed"),
        ("additive", "float"),
        ("additive", "fixed"),
        ("momentum", "fixed"),  # float streams keep the target of a rule that scales
    ],
)
def test_depth_adds_no_memory_to_the_inverse(kind: str, streams: str):
    def kept(depth: int) -> tuple[int, int]:
        if kind == "sequence":
            net: nn.Module = ReversibleSequence(pairs(depth), streams=streams)
        else:
            net = program(kind, 2 * depth, streams=streams)
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        y1, y2 = torch.randn(2, 16, WIDTH, requires_grad=True)

        def run() -> Tensor:
            return sum(x.sum() for x in net.inverse(y1, y2))

        run().backward()
        report = measure_memory(run)
        return report.saved_bytes, report.peak_bytes

    assert kept(4) == kept(24)


def test_a_flow_trains_through_its_samples():
    """The likelihood of a sample: minus the log-determinants that the steps return."""
    torch.manual_seed(0)
    rule = revnet.Affine(limit=0.5, log_det=True)
    net = Reversible(
        [Step(Branch(2 * WIDTH), i % 2, (i + 1) % 2, rule) for i in range(4)], streams="float"
    ).double()
    z = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    *x, aux = net.inverse(*z, return_aux=True)
    log_det = -sum(step["log_det"] for step in aux.values())

    def flat(part: Tensor) -> Tensor:
        return torch.cat(net.inverse(*part.view(2, 1, WIDTH))).flatten()

    jacobian = torch.autograd.functional.jacobian(flat, z[:, :1].reshape(-1))
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet)
    (log_det.sum() + sum(part.square().sum() for part in x)).backward()
    found = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net.execution = "store"
    *x, aux = net.inverse(*z, return_aux=True)
    log_det = -sum(step["log_det"] for step in aux.values())
    (log_det.sum() + sum(part.square().sum() for part in x)).backward()
    for actual, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-12, atol=1e-12)
    assert Reversible([Step(Branch())]).inverse(*z.float(), return_aux=True)[2] == {}


def test_both_directions_in_one_loss():
    net = program("additive", streams="fixed")
    copied = copy.deepcopy(net)
    copied.execution = "store"

    def both(module: Reversible) -> Callable[..., tuple[Tensor, ...]]:
        return lambda x1, x2: [
            a * b for a, b in zip(module(x1, x2), module.inverse(x2, x1), strict=True)
        ]

    found = gradients(net, both(net), torch.float32)
    assert all(map(torch.equal, found, gradients(copied, both(copied), torch.float32)))


def test_transforms_differentiate_the_inverse():
    net = program("additive", streams="float").double()
    y1, y2 = torch.randn(2, 3, WIDTH, dtype=torch.float64)

    def loss(y: Tensor) -> Tensor:
        return sum(x.sin().sum() for x in net.inverse(y, y2))

    def expected(y: Tensor) -> Tensor:
        return sum(x.sin().sum() for x in unrolled(net, "additive", [y, y2]))

    torch.testing.assert_close(torch.func.grad(loss)(y1), torch.func.grad(expected)(y1))


def test_a_step_that_reads_its_target_has_no_inverse():
    net = Reversible([Step(Branch(), 0, 0)])
    with pytest.raises(revnet.ReversibleError, match="no inverse"):
        net.inverse(torch.randn(3, WIDTH))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_inverse():
    net = ReversibleSequence(pairs(2), streams="float")

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
            return self.net.inverse(y1, y2)

    compiled = torch.compile(Backwards(), backend="aot_eager", fullgraph=True)
    expected = gradients(net, net.inverse, torch.float32)
    for actual, wanted in zip(gradients(net, compiled, torch.float32), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
