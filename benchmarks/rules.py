"""What is lost when rules are undone, and what is kept for backward so that nothing is?

    python benchmarks/rules.py --out benchmarks/results/rules_cpu.md

Programs of many steps of one rule on two streams: undone in float streams (`approximate=True`), in
float streams by default, where steps that scale their target keep it, and in fixed streams. A
gradient error is the largest relative one of a gradient against stored execution of the same
program in the same streams. First the gradients of each program of a few steps are compared with
those of a plain loop in float64, by the formulas of docs/couplings.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from _race import opening, publish
from torch import Tensor, nn

import revnet

MIB = 2**20
WAYS = {
    "floats": ("float", True),
    "default": ("float", False),
    "fixed": ("fixed", False),
}
COLUMNS = (
    "rule",
    "float64",
    *(f"{way}: {what}" for way in WAYS for what in ("error", "MiB")),
    "stored: MiB",
)
Run = Callable[..., Iterable[Tensor]]


class Rotation(nn.Module):
    """Multiply by an orthogonal matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def inverse(self, y: Tensor) -> Tensor:
        return y @ self.weight.T


# --- the rules, by the library and by hand


def branch(width: int, outputs: int = 1) -> nn.Sequential:
    leave = nn.Linear(width, outputs * width)
    # So that hundreds of steps neither blow up nor leave the range of fixed streams.
    nn.init.uniform_(leave.weight, -0.05, 0.05)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), leave)


def additive(width: int, steps: int, approximate: bool) -> list[revnet.Step]:
    return [revnet.Step(branch(width), i % 2, 1 - i % 2) for i in range(steps)]


def affine(width: int, steps: int, approximate: bool) -> list[revnet.Step]:
    rule = revnet.Affine(limit=0.3, approximate=approximate)
    return [revnet.Step(branch(width, 2), i % 2, 1 - i % 2, rule) for i in range(steps)]


def momentum(width: int, steps: int, approximate: bool, gamma: float) -> list[revnet.Step]:
    """Stream 0 is the velocity, stream 1 the state: a kick and a drift for each step."""
    rule = revnet.Momentum(gamma, approximate=approximate)
    kicks = [revnet.Step(branch(width), 0, 1, rule) for _ in range(steps)]
    return [step for kick in kicks for step in (kick, revnet.Step(None, 1, 0))]


def bijection(width: int, steps: int, approximate: bool) -> list[revnet.Step]:
    """A map of one stream, then an additive step onto the other."""
    found = []
    for i in range(steps // 2):
        rule = revnet.Bijection(Rotation(width), approximate=approximate)
        found += [
            revnet.Step(None, i % 2, coupling=rule),
            revnet.Step(branch(width), 1 - i % 2, i % 2),
        ]
    return found


RULES: dict[str, Callable[[int, int, bool], list[revnet.Step]]] = {
    "Additive": additive,
    "Affine 0.3": affine,
    "Momentum 0.9": lambda *size: momentum(*size, gamma=0.9),
    "Momentum 0.99": lambda *size: momentum(*size, gamma=0.99),
    "Bijection": bijection,
}


def by_hand(step: revnet.Step, streams: list[Tensor]) -> Tensor:
    """Return the new target of a step, by the formula of its rule."""
    x, rule = streams[step.target], step.coupling
    if isinstance(rule, revnet.Bijection):
        return x @ rule.module.weight
    source = streams[step.source[0]]
    out = source if step.fn is None else step.fn(source)
    if isinstance(rule, revnet.Momentum):
        return float(rule.gamma) * x + (1 - float(rule.gamma)) * out
    if isinstance(rule, revnet.Affine):
        raw, shift = out.chunk(2, -1)
        return (0.3 * (raw / 0.3).tanh()).exp() * x + shift
    return x + out


# --- measurements


def loss_of(net: nn.Module, run: Run, options: argparse.Namespace) -> tuple[Tensor, list[Tensor]]:
    """Return a loss and the tensors whose gradients count."""
    dtype = next(net.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4, options.rows, options.width, generator=generator).to(dtype)
    inputs = [value.requires_grad_() for value in values[:2]]
    loss = sum((y * w).sum() for y, w in zip(run(*inputs), values[2:], strict=True))
    return loss, [*inputs, *net.parameters()]


def gradients(net: nn.Module, run: Run, options: argparse.Namespace) -> list[Tensor]:
    return list(torch.autograd.grad(*loss_of(net, run, options)))


def kept(net: nn.Module, options: argparse.Namespace) -> float:
    """Return the MiB that wait for the backward pass."""
    x = torch.randn(options.rows, options.width).requires_grad_()
    return revnet.measure_memory(lambda: sum(y.sum() for y in net(x, x))).saved_bytes / MIB


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def made(rule: str, options: argparse.Namespace, way: str, steps: int) -> revnet.Reversible:
    """Return a program; the same weights for every way."""
    streams, approximate = WAYS[way]
    torch.manual_seed(0)
    return revnet.Reversible(RULES[rule](options.width, steps, approximate), streams=streams)


def check(rule: str, options: argparse.Namespace) -> float:
    """Return the largest error of a gradient of four steps in float64, of all ways."""
    errors = []
    for way in WAYS:
        net = made(rule, options, way, 4).double()
        if way == "fixed":
            net.streams = revnet.Fixed(fraction_bits=37)

        def loop(*inputs: Tensor, net: revnet.Reversible = net) -> list[Tensor]:
            streams = list(inputs)
            for step in net.steps:
                streams[step.target] = by_hand(step, streams)
            return streams

        errors.append(largest(gradients(net, net, options), gradients(net, loop, options)))
    return max(errors)


def row(rule: str, options: argparse.Namespace) -> str:
    error = check(rule, options)
    if not error < 1e-6:
        raise SystemExit(f"{rule}: gradients are off by {error:.1e} in float64")
    cells = [rule, f"{error:.1e}"]
    for way in WAYS:
        if rule == "Additive" and way == "default":
            cells += ["", ""]  # its default is to be undone
            continue
        net = made(rule, options, way, options.steps)
        found, size = gradients(net, net, options), kept(net, options)
        net.execution = "store"
        error = largest(found, gradients(net, net, options))
        cells += [f"{error:.1e}" if error else "0", f"{size:.3f}"]
    net.streams = "float"
    cells.append(f"{kept(net, options):.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64, help="of a stream")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPU cores")
    parser.add_argument("--out", type=Path, help="write the report to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        *opening(
            "What is lost when rules are undone, and what is kept so that nothing is?",
            f"{options.hardware}, {options.threads} thread",
        ),
        f"float32, {options.steps} steps on two streams of {options.rows} × {options.width}: of "
        "momentum that many kicks and as many drifts, of the bijection half maps and half additive "
        "steps. Branches are two linear layers around a GELU. An error is the largest relative one "
        "of a gradient, of inputs and parameters, against stored execution of the same program in "
        'the same streams; MiB are kept for backward. "floats" undoes every step in float '
        'streams (`approximate=True`); "default" is float streams where steps that scale keep '
        'their target; "stored" is `execution="store"` in float streams. "float64" is the largest '
        "error, of all three, of four steps in float64 against a plain loop.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(row(rule, options) for rule in RULES),
    ]
    publish(lines, options.out)


if __name__ == "__main__":
    main()
