"""What do time, memory and gradients of an integration cost, against stored execution and against
the adjoint method of torchdiffeq with the same rule?

python benchmarks/integrate.py --out benchmarks/results/integrate_cpu.md
python benchmarks/integrate.py --steps 1000 --width 64 --batch 64
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _race import difference
from torch import Tensor, nn

import revnet

MIB = 2**20
LOOP, STORED, FIXED, FLOAT, DIRECT, ADJOINT = (
    "plain loop",
    "stored, fixed streams",
    "integrate, fixed streams",
    "integrate, float streams",
    "torchdiffeq odeint",
    "torchdiffeq odeint_adjoint",
)


class Field(nn.Module):
    """Two layers, as in a neural differential equation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.leave((self.enter(x) + t).tanh())


def plain(f: nn.Module, x: Tensor, ts: Tensor) -> Tensor:
    before, now = x, x + (ts[1] - ts[0]) * f(ts[0], x)
    for n in range(1, len(ts) - 1):
        before, now = now, before + (ts[n + 1] - ts[n - 1]) * f(ts[n], now)
    return now


def peers() -> tuple[dict[str, Callable[..., Tensor]], str]:
    """Return the arms of torchdiffeq, or why there are none."""
    try:
        import torchdiffeq
        from torchdiffeq._impl.odeint import SOLVERS
        from torchdiffeq._impl.solvers import FixedGridODESolver
    except ImportError as error:
        return {}, f"torchdiffeq was skipped: {error}"

    class TwoStepMidpoint(FixedGridODESolver):
        """The rule of `revnet.integrate`: torchdiffeq has no solver of two steps."""

        order = 2
        before: tuple[Tensor, Tensor] | None = None

        def _step_func(
            self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor
        ) -> tuple[Tensor, Tensor]:
            slope = func(t0, y0)
            if self.before is None:
                change = dt * slope
            else:
                time_before, y_before = self.before
                change = y_before + (t1 - time_before) * slope - y0
            self.before = t0, y0
            return change, slope

    SOLVERS["two_step_midpoint"] = TwoStepMidpoint

    def arm(solve: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(f: nn.Module, x: Tensor, ts: Tensor) -> Tensor:
            # Backward gets the times in reverse.
            def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
                return ts if bool(t[0] < t[-1]) else ts.flip(0)

            options = {"grid_constructor": grid}
            return solve(f, x, ts[[0, -1]], method="two_step_midpoint", options=options)[-1]

        return run

    arms = {DIRECT: arm(torchdiffeq.odeint), ADJOINT: arm(torchdiffeq.odeint_adjoint)}
    return arms, f"torchdiffeq {importlib.metadata.version('torchdiffeq')}"


def gradients(f: nn.Module, solve: Callable[..., Tensor], x: Tensor, ts: Tensor) -> list[Tensor]:
    f.zero_grad()
    x = x.detach().requires_grad_()
    solve(f, x, ts).square().mean().backward()
    return [x.grad, *(parameter.grad for parameter in f.parameters())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    f, x = Field(args.width), torch.randn(args.batch, args.width)
    ts = torch.linspace(0, 1, args.steps + 1)
    others, said = peers()

    def revnets(**options: str) -> Callable[..., Tensor]:
        return lambda f, x, ts: revnet.integrate(f, x, ts, **options)

    arms = {
        LOOP: plain,
        STORED: revnets(streams="fixed", execution="store"),
        FIXED: revnets(streams="fixed"),
        FLOAT: revnets(streams="float"),
        **others,
    }
    exact = Field(args.width).double()
    exact.load_state_dict(f.state_dict())
    oracle = gradients(exact, plain, x.double(), ts.double())
    # Correctness first.
    found = {name: gradients(f, solve, x, ts) for name, solve in arms.items()}
    assert all(map(torch.equal, found[FIXED], found[STORED])), "fixed streams differ from stored"
    errors = {name: difference(each, oracle) for name, each in found.items()}
    assert max(errors[FIXED], errors[FLOAT]) < 1e-4, errors
    peaks = {}
    for name, solve in arms.items():
        f.zero_grad()
        report = revnet.measure_memory(lambda solve=solve: solve(f, x, ts).square().mean())
        peaks[name] = report.peak_bytes - report.grad_bytes
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, solve in arms.items():
            start = time.perf_counter()
            gradients(f, solve, x, ts)
            times[name].append(time.perf_counter() - start)
    lines = [
        f"## {args.steps} steps, width {args.width}, batch {args.batch}, {args.rounds} rounds",
        "",
        "    python benchmarks/integrate.py " + " ".join(sys.argv[1:]),
        "",
        f"{datetime.date.today()}; torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} CPU threads; {said}.",
        "",
        "| | ms per step | × stored | × plain loop | peak, MiB | gradient error |",
        "|---|---|---|---|---|---|",
    ]
    for name in arms:
        ratios = [
            statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
            for base in (STORED, LOOP)
        ]
        lines.append(
            f"| {name} | {statistics.median(times[name]) / args.steps * 1e3:.3g} "
            f"| {ratios[0]:.3f} | {ratios[1]:.3f} | {peaks[name] / MIB:.4g} "
            f"| {errors[name]:.1e} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out is not None:
        with args.out.open("a") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
