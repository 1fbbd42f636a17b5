"""Rules of whole sequences, with their start and end; rules that read their source.

The oracles are the formulas of the papers, unrolled in float64 under ordinary autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnet
from revnet import Reversible, ReversibleSequence, Step, TwoStep, measure_memory
from revnet.testing import check_inverse

WIDTH, DEPTH = 6, 3


class Branch(nn.Module):
    def __init__(self, out: int = WIDTH) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, out)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        out = self.leave(self.enter(x).tanh())
        return out if shift is None else out + shift


def pairs(depth: int = DEPTH, out: int = WIDTH) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(0)
    return [(Branch(out), Branch(out)) for _ in range(depth)]


def flat(blocks: Any) -> list[nn.Module]:
    return [branch for pair in blocks for branch in pair]


def momentum(fs: list[Callable[..., Tensor]], x: Tensor, gamma: float = 0.9) -> Tensor:
    v = torch.zeros_like(x)
    for f in fs:
        v = gamma * v + (1 - gamma) * f(x)
        x = x + v
    return x


def leapfrog(fs: list[Callable[..., Tensor]], x: Tensor, h: float = 0.3) -> Tensor:
    """The recurrence in positions, with v = 0 at first."""
    before, now = x, x + h**2 * fs[0](x)
    for f in fs[1:]:
        before, now = now, 2 * now - before + h**2 * f(now)
    return now


def midpoint(fs: list[Callable[..., Tensor]], x: Tensor, h: float = 0.3) -> Tensor:
    before, now = x, x + h * fs[0](x)
    for f in fs[1:]:
        before, now = now, before + 2 * h * f(now)
    return now


def bdia(fs: list[Callable[..., Tensor]], x: Tensor, gamma: float = 0.3) -> Tensor:
    before, now = x, x + fs[0](x)
    for f in fs[1:]:
        before, now = now, gamma * before + (1 - gamma) * now + (1 + gamma) * f(now)
    return now


def dr2net(fs: list[Callable[..., Tensor]], x: Tensor) -> Tensor:
    before, now = x, x + fs[0](x)
    for f in fs[1:]:
        before, now = now, 0.4 * before + 0.7 * now + f(now)
    return now


RULES: dict[str, tuple[Callable[[], revnet.Coupling], Callable[..., Tensor]]] = {
    "momentum": (lambda: revnet.Momentum(0.9), momentum),
    "leapfrog": (lambda: revnet.Leapfrog(0.3), leapfrog),
    "midpoint": (lambda: revnet.Midpoint(0.3), midpoint),
    "bdia": (lambda: TwoStep(0.3), bdia),
    "dr2net": (lambda: TwoStep(0.4, present=0.7, update=1), dr2net),
}


def gradients(
    module: nn.Module, run: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> list[Tensor]:
    module.zero_grad()
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    y = run(x)
    (y * (1 + y.detach().cos())).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("name", RULES)
def test_start_and_end_are_those_of_the_paper(name: str):
    make, oracle = RULES[name]
    net = ReversibleSequence(pairs(), coupling=make(), streams="float").double()
    fs = flat((block.f, block.g) for block in net.blocks)
    expected = gradients(net, lambda x: oracle(fs, x), torch.float64)
    for actual, wanted in zip(gradients(net, net, torch.float64), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_fixed_streams_equal_stored_execution_in_every_bit(name: str):
    make, oracle = RULES[name]
    # streams="auto" takes them for float32 where the rule scales.
    streams = "auto" if make().scales else "fixed"
    net = ReversibleSequence(pairs(6), coupling=make(), streams=streams)
    found = gradients(net, net, torch.float32)
    net.execution = "store"
    assert all(map(torch.equal, found, gradients(net, net, torch.float32)))
    fs = flat((block.f, block.g) for block in net.blocks)
    for actual, wanted in zip(
        found, gradients(net, lambda x: oracle(fs, x), torch.float32), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_the_inverse_comes_back_and_trains(name: str):
    make, _ = RULES[name]
    net = ReversibleSequence(pairs(), coupling=make(), streams="float").double()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    for given, back in zip(x, net.inverse(*net.run(*x)), strict=True):
        torch.testing.assert_close(back, given, rtol=1e-9, atol=1e-9)
    net = ReversibleSequence(pairs(), coupling=make(), streams="fixed")
    found = gradients(net, lambda x: sum(net.inverse(x, 2 * x)), torch.float32)
    net.execution = "store"
    expected = gradients(net, lambda x: sum(net.inverse(x, 2 * x)), torch.float32)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["midpoint", "leapfrog"])
def test_depth_adds_no_memory(name: str):
    def kept(depth: int) -> tuple[int, int]:
        net = ReversibleSequence(pairs(depth), coupling=RULES[name][0](), streams="fixed")
        net.requires_grad_(False)
        x = torch.randn(16, WIDTH, requires_grad=True)
        net(x).sum().backward()
        report = measure_memory(lambda: net(x).sum())
        return report.saved_bytes, report.peak_bytes

    assert kept(3) == kept(20)


def test_rules_that_scale_keep_a_buffer_alone():
    """2 · 20 steps of log2(1/0.9) bits are 6.1 bits per element: a byte."""

    def kept(depth: int) -> int:
        net = ReversibleSequence(pairs(depth), coupling=TwoStep(0.9), streams="fixed")
        x = torch.randn(16, WIDTH, requires_grad=True)
        net(x).sum().backward()
        return measure_memory(lambda: net(x).sum()).saved_bytes

    # Both streams are multiplied depth times, the first of them once less.
    assert kept(20) - kept(3) <= 2 * 2 * 16 * WIDTH


@pytest.mark.parametrize("name", ["momentum", "bdia"])
def test_keywords_checkpoints_of_blocks_and_names(name: str):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    make, oracle = RULES[name]
    route = {"shift": ((False, True),) * DEPTH}
    net = ReversibleSequence(pairs(), route, coupling=make(), streams="float").double()
    shift = torch.randn(WIDTH, dtype=torch.float64)

    def shifted(i: int, f: nn.Module) -> Callable[..., Tensor]:
        return (lambda x: f(x, shift)) if i % 2 else f

    fs = [shifted(i, f) for i, f in enumerate(flat((b.f, b.g) for b in net.blocks))]
    expected = gradients(net, lambda x: oracle(fs, x), torch.float64)
    found = gradients(net, lambda x: net(x, shift=shift), torch.float64)
    for i in (0, 1):
        net.blocks[i] = checkpoint_wrapper(net.blocks[i])
    wrapped = gradients(net, lambda x: net(x, shift=shift), torch.float64)
    for results in (found, wrapped):
        for actual, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    last = 2 * DEPTH * (2 if name == "momentum" else 1) - 1
    names = {"momentum": "block 2, drift after g", "bdia": "block 2, branch g"}
    assert net._step_name(last) == names[name]
    assert net._step_name(0) == "block 0, branch f"


def test_an_execution_per_step_counts_the_drifts():
    net = ReversibleSequence(pairs(1), coupling=revnet.Momentum(0.9), streams="fixed")
    expected = gradients(net, net, torch.float32)
    net.execution = ["checkpoint", "invert", "store", "invert"]
    assert all(map(torch.equal, gradients(net, net, torch.float32), expected))
    with pytest.raises(ValueError, match="execution names 2 steps, but there are 4"):
        net.execution = ["store", "invert"]


def test_affine_sequences_return_their_log_determinants():
    rule = revnet.Affine(limit=0.5, log_det=True)
    net = ReversibleSequence(
        pairs(out=2 * WIDTH), coupling=rule, split="chunk", merge="concat", streams="float"
    ).double()
    x = torch.randn(1, 2 * WIDTH, dtype=torch.float64)
    _, aux = net(x)
    log_det = sum(step["log_det"] for step in aux.values())
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x[None])[0][0], x[0])
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet)


class Pair(nn.Module):
    """A branch on trees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: dict[str, Any]) -> dict[str, Any]:
        return {"a": self.a(x["a"]).sin(), "b": [self.b(x["a"]) + x["b"][0].tanh()]}


def tree_momentum(net: ReversibleSequence, x: dict[str, Any]) -> dict[str, Any]:
    a, b = x["a"], x["b"][0]
    va, vb = torch.zeros_like(a), torch.zeros_like(b)
    for f in flat((block.f, block.g) for block in net.blocks):
        out = f({"a": a, "b": [b]})
        va, vb = 0.9 * va + (1 - 0.9) * out["a"], 0.9 * vb + (1 - 0.9) * out["b"][0]
        a, b = a + va, b + vb
    return {"a": a, "b": [b]}


def test_streams_may_be_trees():
    torch.manual_seed(0)
    blocks = [(Pair(), Pair()) for _ in range(DEPTH)]
    net = ReversibleSequence(blocks, coupling=revnet.Momentum(0.9), streams="float").double()

    def run(solve: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def of(x: Tensor) -> Tensor:
            y = solve({"a": x, "b": [x[:, :2] * 2]})
            return torch.cat((y["a"], y["b"][0]), -1)

        return of

    expected = gradients(net, run(lambda x: tree_momentum(net, x)), torch.float64)
    for actual, wanted in zip(gradients(net, run(net), torch.float64), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    calls = []
    net.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    for actual, wanted in zip(gradients(net, run(net), torch.float64), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    assert calls == [1]
    additive = ReversibleSequence(blocks, merge="sum", streams="float").double()
    x = {"a": torch.randn(3, WIDTH, dtype=torch.float64), "b": [torch.randn(3, 2).double()]}
    y1 = y2 = x
    for f, g in blocks:
        y1 = torch.utils._pytree.tree_map(torch.add, y1, f(y2))
        y2 = torch.utils._pytree.tree_map(torch.add, y2, g(y1))
    torch.testing.assert_close(additive(x), torch.utils._pytree.tree_map(torch.add, y1, y2))


def test_split_and_merge_may_be_functions_and_modules():
    class Readout(nn.Module):
        """x + γ / (1 - γ) v: where a momentum network is going."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(9.0))

        def forward(self, v: Tensor, x: Tensor) -> Tensor:
            return x + self.scale * v

    net = ReversibleSequence(
        pairs(),
        coupling=revnet.Momentum(0.9),
        split=lambda x: (x.cos(), x.sin()),
        merge=Readout(),
        streams="float",
    ).double()
    assert "merge.scale" in net.state_dict()

    def oracle(x: Tensor) -> Tensor:
        v, x = x.cos(), x.sin()
        for f in flat((block.f, block.g) for block in net.blocks):
            v = 0.9 * v + (1 - 0.9) * f(x)
            x = x + v
        return x + net.merge.scale * v

    expected = gradients(net, oracle, torch.float64)
    for actual, wanted in zip(gradients(net, net, torch.float64), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="split returned Tensor"):
        ReversibleSequence(pairs(), split=lambda x: x)(torch.randn(3, WIDTH))


def test_two_states_of_ones_own_start_a_two_step_rule():
    net = ReversibleSequence(
        pairs(), coupling=revnet.Midpoint(0.3), split=lambda x: (x, 2 * x), streams="float"
    )
    x = torch.randn(3, WIDTH)
    before, now = x, 2 * x
    for f in flat((block.f, block.g) for block in net.blocks):
        before, now = now, before + 0.6 * f(now)
    torch.testing.assert_close(net(x), now)


# Rules that read their source, in programs.


class Relative(revnet.Coupling):
    """y = target + out · source: linear, by `increment`."""

    reads_source = True

    def increment(self, out: Tensor, source: Tensor) -> Tensor:
        return out * source


class Blend(revnet.Coupling):
    """Any rule of three: by `combine` and `invert`."""

    reads_source = True

    def combine(self, target: Tensor, out: Tensor, source: Tensor) -> Tensor:
        return target * (2 + source.sin()) + out

    def invert(self, target: Tensor, out: Tensor, source: Tensor) -> Tensor:
        return (target - out) / (2 + source.sin())


class Wrong(Blend):
    def invert(self, target: Tensor, out: Tensor, source: Tensor) -> Tensor:
        return target - out


@pytest.mark.parametrize("streams", ["float", "fixed"])
@pytest.mark.parametrize("make", [Relative, Blend])
def test_rules_of_ones_own_read_their_source(make: type, streams: str):
    torch.manual_seed(0)
    dtype = torch.float64 if streams == "float" else torch.float32
    rule = make()
    net = Reversible(
        [Step(Branch(), i % 2, (i + 1) % 2, rule) for i in range(6)], streams=streams
    ).to(dtype)

    def oracle(x: Tensor) -> Tensor:
        found = [x, x.sin()]
        for step in net.steps:
            target, (source,) = step.target, step.source
            out = step.fn(found[source])
            if make is Relative:
                found[target] = found[target] + out * found[source]
            else:
                found[target] = found[target] * (2 + found[source].sin()) + out
        return found[0] + found[1]

    expected = gradients(net, oracle, dtype)
    found = gradients(net, lambda x: sum(net(x, x.sin())), dtype)
    tolerance = 1e-12 if streams == "float" else 1e-3
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    net.execution = "store"
    if streams == "fixed":
        stored = gradients(net, lambda x: sum(net(x, x.sin())), dtype)
        assert all(map(torch.equal, found, stored))
    back = net.inverse(*net(torch.ones(3, WIDTH, dtype=dtype), torch.zeros(3, WIDTH, dtype=dtype)))
    torch.testing.assert_close(back[0], torch.ones(3, WIDTH, dtype=dtype), rtol=1e-4, atol=1e-4)


def test_bdia_trains_with_random_signs_and_evaluates_the_ordinary_network():
    net = ReversibleSequence(pairs(6), coupling=TwoStep(0.5, random_sign=True), streams="fixed")

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        return net(x)

    found = gradients(net, seeded, torch.float32)
    net.execution = "store"
    assert all(map(torch.equal, found, gradients(net, seeded, torch.float32)))

    def oracle(x: Tensor) -> Tensor:
        """The signs in the order in which the steps draw them; the first step draws none."""
        torch.manual_seed(2)
        fs = flat((block.f, block.g) for block in net.blocks)
        before, now = x, x + fs[0](x)
        for f in fs[1:]:
            gamma = 0.5 * (torch.randint(2, (3,)) * 2 - 1).to(x.dtype)[:, None]
            before, now = now, gamma * before + (1 - gamma) * now + (1 + gamma) * f(now)
        return now

    for actual, wanted in zip(found, gradients(net, oracle, torch.float32), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
    net.execution = "invert"
    x = torch.randn(3, WIDTH)
    z = x
    for f in flat((block.f, block.g) for block in net.blocks):
        z = z + f(z)
    torch.testing.assert_close(net.eval()(x), z, rtol=1e-4, atol=1e-5)
    with pytest.raises(revnet.ReversibleError, match=r"block 5, branch g: its rule, TwoStep"):
        net.inverse(x, x)
    # With gradients, too: the steps keep their targets.
    found = gradients(net, net, torch.float32)
    net.execution = "store"
    assert all(map(torch.equal, found, gradients(net, net, torch.float32)))


def test_a_schedule_is_in_the_state_dict():
    rule = TwoStep(1, start=0.2, steps=4)
    net = ReversibleSequence(pairs(), coupling=rule, streams="fixed")
    assert [float(rule.gamma), int(net.state_dict()["coupling.taken"])] == [0.2, 0]
    gammas = []
    for _ in range(5):
        rule.advance()
        gammas.append(float(rule.gamma))
    assert gammas == [0.4, 0.6, 0.8, 1.0, 1.0]
    resumed = ReversibleSequence(pairs(), coupling=TwoStep(1, start=0.2, steps=4), streams="fixed")
    other = copy.deepcopy(net.state_dict())
    other["coupling.taken"].fill_(2)
    resumed.load_state_dict(other)
    assert float(resumed.coupling.gamma) == 0.6


def test_a_schedule_may_advance_between_forward_and_backward():
    """As with gradients that are accumulated over calls: a replay sees the γ of its call."""
    rule = TwoStep(1, start=0.25, steps=4)
    net = ReversibleSequence(pairs(), coupling=rule, streams="fixed")

    def run(x: Tensor) -> Tensor:
        rule._count = 0
        rule.taken = torch.zeros_like(rule.taken)
        y = net(x)
        rule.advance()
        return y

    found = gradients(net, run, torch.float32)
    assert float(rule.gamma) == 0.4375
    net.execution = "store"
    assert all(map(torch.equal, found, gradients(net, run, torch.float32)))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: TwoStep(1.5), ValueError, "from 0 to 1"),
        (lambda: TwoStep(-0.5), ValueError, "from 0 to 1"),
        (lambda: TwoStep(0.12345), ValueError, "four decimal digits"),
        (lambda: TwoStep(0.5, start=0.1), ValueError, "both start and steps"),
        (lambda: TwoStep(0.5, steps=3), ValueError, "both start and steps"),
        (
            lambda: ReversibleSequence(pairs(), coupling=revnet.Momentum),
            TypeError,
            r"did you leave out the \(\)",
        ),
        (lambda: ReversibleSequence(pairs(), split="halves"), ValueError, "split 'halves'"),
        (lambda: ReversibleSequence(pairs(), merge="max"), ValueError, "merge 'max'"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], Any], error: type, match: str):
    with pytest.raises(error, match=match):
        make()


def test_a_plan_for_streams_that_are_trees():
    torch.manual_seed(0)
    net = ReversibleSequence([(Pair(), Pair()) for _ in range(DEPTH)], merge="sum")
    x = {"a": torch.randn(3, WIDTH), "b": [torch.randn(3, 2)]}
    net.execution = revnet.plan(net, x, "1 MiB")
    assert len(net.execution.for_steps(2 * DEPTH)) == 2 * DEPTH
    assert net(x)["a"].requires_grad


def test_a_plan_counts_the_steps_of_a_coupling():
    net = ReversibleSequence(pairs(), coupling=revnet.Momentum(0.9), streams="fixed")
    expected = gradients(net, net, torch.float32)
    net.execution = revnet.plan(net, torch.randn(3, WIDTH), "1 MiB")
    assert len(net.execution.for_steps(4 * DEPTH)) == 4 * DEPTH
    assert all(map(torch.equal, gradients(net, net, torch.float32), expected))


@pytest.mark.parametrize("rule", [Relative(), Blend(), TwoStep(0.5)], ids=str)
def test_rules_that_read_their_source_can_be_checked(rule: revnet.Coupling):
    assert check_inverse(rule, *torch.randn(3, 4, WIDTH)) < 1e-5
    with pytest.raises(revnet.ReversibleError):
        check_inverse(Wrong(), *torch.randn(3, 4, WIDTH))


# torch.compile itself reads the .grad of whatever crosses a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_models_leave_made_rules_to_the_engine():
    torch.manual_seed(0)
    steps = [Step(Branch(), i % 2, (i + 1) % 2, TwoStep(0.5)) for i in range(4)]
    program = Reversible(steps, streams="fixed")
    sequence = ReversibleSequence(pairs(1), coupling=revnet.Midpoint(0.3), streams="fixed")

    def model(x: Tensor) -> Tensor:
        x = x * 2
        return sequence(x) + sum(program(x, x))

    net = nn.ModuleList((program, sequence))
    expected = gradients(net, model, torch.float32)
    compiled = torch.compile(model, backend="eager")
    for actual, wanted in zip(gradients(net, compiled, torch.float32), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
