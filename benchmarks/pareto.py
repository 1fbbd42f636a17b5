"""At the peak memory of every rival, is a plan for that budget at least as fast?

    python benchmarks/pareto.py                                # the shapes of the report; on a GPU
    python benchmarks/pareto.py --shapes 128x128x4x8 --dtype float32 --device cpu --rounds 5
    python benchmarks/pareto.py --only eager --streams float --out benchmarks/results

A shape is width x tokens x batch x blocks. Every way to run the network is first checked for its gradients against the
plain stored loop, then measured for its peak (above weights, gradients and input); then all run in turn, once a round,
and the medians of their times, and of the ratios of times within a round, go into one table and one plot. Rivals that
are compiled meet plans of compiled branches.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _models import branches
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import revnet

SHAPES = ("2048x4096x2x24", "1024x1024x8x48")
BUDGETS = (0.1, 0.3, 0.5, 0.7, 0.9)
CURVE = ("minimum", "5%", "15%", "30%", "50%", "75%", "stored")
MIB = 2**20

Pairs = list[tuple[nn.Module, nn.Module]]
Run = Callable[[Tensor], Tensor]


@dataclass
class Arm:
    """One way to run the network."""

    name: str
    run: Run
    ours: bool = False
    host: bool = False  # uses host memory
    rival: str = ""  # of a plan: whose budget it has
    peak: int = 0
    error: float = 0.0
    times: list[float] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.times = []

    @property
    def time(self) -> float:
        return statistics.median(self.times)


def block(f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    y1 = x1 + f(x2)
    return y1, x2 + g(y1)


def loop(pairs: Pairs, apply: Callable[..., tuple[Tensor, Tensor]] = block) -> Run:
    """Returns the two-stream loop that runs each block by `apply`."""

    def run(x: Tensor) -> Tensor:
        x1 = x2 = x
        for f, g in pairs:
            x1, x2 = apply(f, g, x1, x2)
        return (x1 + x2) / 2

    return run


def per_block(**options: Any) -> Callable[..., Any]:
    return lambda f, g, x1, x2: checkpoint(block, f, g, x1, x2, use_reentrant=False, **options)


def per_branch(f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    y1 = x1 + checkpoint(f, x2, use_reentrant=False)
    return y1, x2 + checkpoint(g, y1, use_reentrant=False)


def selective(*kept: str) -> Callable[..., Any]:
    """Returns torch's selective checkpoint of each block, which keeps the results of operations of these names."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = any(name in str(op) for name in kept)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return per_block(context_fn=lambda: create_selective_checkpoint_contexts(policy))


ATTENTION = ("scaled_dot_product",)
PRODUCTS = (*ATTENTION, "aten.mm", "aten.addmm", "aten.bmm")


def offloaded(run: Run, device: str) -> Run:
    def offload(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=device == "cuda"):
            return run(x)

    return offload


def eager_rivals(pairs: Pairs, device: str) -> list[Arm]:
    return [
        Arm("stored", loop(pairs)),
        Arm("checkpoint per block", loop(pairs, per_block())),
        Arm("checkpoint per branch", loop(pairs, per_branch)),
        Arm("selective: attention", loop(pairs, selective(*ATTENTION))),
        Arm("selective: products and attention", loop(pairs, selective(*PRODUCTS))),
        Arm("checkpoint per block, offloaded", offloaded(loop(pairs, per_block()), device), host=device == "cuda"),
    ]


def compiled_rivals(pairs: Pairs, x: Tensor) -> list[Arm]:
    """Returns blocks compiled with each memory budget, compiled here."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    # Branches meet several modes of autograd, and all must stay compiled.
    dynamo.recompile_limit = 64
    arms = []
    for budget in BUDGETS:
        # Compiled code is kept with the code object: each budget needs one of its own.
        code = block.__code__.replace(co_name=f"block_{round(100 * budget)}")
        compiled = torch.compile(types.FunctionType(code, block.__globals__))
        arm = Arm(f"activation_memory_budget {budget}", loop(pairs, compiled))
        with functorch.patch(activation_memory_budget=budget):
            step(arm.run, x)
        arms.append(arm)
    return arms


def step(run: Run, x: Tensor) -> None:
    run(x).backward(torch.full_like(x, 1e-2))


def sequence_of(pairs: Pairs, streams: str) -> revnet.ReversibleSequence:
    return revnet.ReversibleSequence(pairs, streams=streams)


def planned(net: revnet.ReversibleSequence, found: revnet.Plan) -> Run:
    def run(x: Tensor) -> Tensor:
        net.execution = found
        return net(x)

    return run


def our_arms(net: revnet.ReversibleSequence, x: Tensor, rivals: list[Arm], label: str) -> list[Arm]:
    """Returns a plan for the peak of each rival, and plans along the curve."""
    least = revnet.plan(net, x, "minimum")
    reachable = [rival for rival in rivals if rival.peak >= least.budget]
    for rival in rivals:
        if rival not in reachable:
            print(f"  {label}: no plan within {rival.peak / MIB:.0f} MiB, the peak of {rival.name}", flush=True)
    budgets: list[Any] = [*(rival.peak for rival in reachable), *CURVE]
    plans = revnet.plan(net, x, budgets)
    names = [f"at {rival.name}" for rival in reachable] + [f"plan {budget}" for budget in CURVE]
    sources = [rival.name for rival in reachable] + [""] * len(CURVE)
    return [
        Arm(f"{label} {name}", planned(net, found), ours=True, rival=source)
        for name, found, source in zip(names, plans, sources, strict=True)
    ]


def gradients(pairs: Pairs) -> list[Tensor]:
    return [parameter.grad for pair in pairs for branch in pair for parameter in branch.parameters()]


def zero(pairs: Pairs) -> None:
    """Gradients exist beforehand, and are not what the ways differ in."""
    for pair in pairs:
        for branch in pair:
            for parameter in branch.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.zero_()


def examine(arm: Arm, pairs: Pairs, x: Tensor, expected: list[Tensor] | None) -> list[Tensor]:
    """Fills in the arm's peak and the error of its gradients; returns the gradients."""
    step(arm.run, x)
    zero(pairs)
    step(arm.run, x)
    found = [gradient.double() for gradient in gradients(pairs)]
    if expected is not None:
        off = sum((a - b).square().sum().item() for a, b in zip(found, expected, strict=True))
        arm.error = (off / sum(b.square().sum().item() for b in expected)) ** 0.5
    seed = torch.full_like(x, 1e-2)

    def train() -> None:
        arm.run(x).backward(seed)

    arm.peak = revnet.measure_memory(train).peak_bytes
    zero(pairs)
    return found


def race(arms: list[Arm], x: Tensor, rounds: int, seconds: float) -> None:
    """Runs all arms in turn, `rounds` times or as long as there are seconds."""
    cuda = x.is_cuda
    began = time.perf_counter()
    for turn in range(rounds + 1):
        for arm in arms:
            if cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                step(arm.run, x)
                end.record()
                torch.cuda.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                before = time.perf_counter()
                step(arm.run, x)
                elapsed = 1000 * (time.perf_counter() - before)
            if turn:  # the first round warms up
                arm.times.append(elapsed)
        if turn >= 3 and time.perf_counter() - began > seconds:
            break


def noise(arm: Arm) -> float:
    """Half the distance between the quartiles, as a share of the median: how well a median is known."""
    quartiles = statistics.quantiles(arm.times, n=4)
    return (quartiles[2] - quartiles[0]) / 2 / arm.time


def table(arms: list[Arm]) -> list[str]:
    rivals = [arm for arm in arms if not arm.ours]
    stored = rivals[0]
    lines = [
        "| way | peak MiB | time ms | noise | against stored | plan at that peak | its peak MiB | plan / rival |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rival in rivals:
        plans: list[Arm | None] = [arm for arm in arms if arm.rival == rival.name] or [None]
        for ours in plans:
            ratio = "no plan so small"
            if ours is not None:
                ratios = [a / b for a, b in zip(ours.times, rival.times, strict=True)]
                ratio = f"{statistics.median(ratios):.3f}"
            lines.append(
                f"| {rival.name} | {rival.peak / MIB:.0f} | {rival.time:.2f} | {noise(rival):.1%} "
                f"| {rival.time / stored.time:.3f} | {ours.name.partition(' at ')[0] if ours else '–'} "
                f"| {f'{ours.peak / MIB:.0f}' if ours else '–'} | {ratio} |"
            )
    lines += [
        "",
        "| plan | peak MiB | time ms | noise | against stored | gradient error |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {arm.name} | {arm.peak / MIB:.0f} | {arm.time:.2f} | {noise(arm):.1%} | {arm.time / stored.time:.3f} "
        f"| {arm.error:.1e} |"
        for arm in arms
        if arm.ours and not arm.rival
    ]
    smallest = min((arm for arm in arms if arm.ours), key=lambda arm: arm.peak)
    rival = min((arm for arm in rivals if not arm.host), key=lambda arm: arm.peak)
    lines += [
        "",
        f"Smallest: {smallest.name}, {smallest.peak / MIB:.0f} MiB; {rival.name}, {rival.peak / MIB:.0f} MiB: "
        f"ratio {smallest.peak / rival.peak:.2f}.",
        "Gradient errors of rivals: " + ", ".join(f"{arm.name} {arm.error:.1e}" for arm in rivals) + ".",
    ]
    return lines


def plot(arms: list[Arm], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    stored = arms[0].time
    labels = list(dict.fromkeys(arm.name.partition(" plan ")[0] for arm in arms if " plan " in arm.name))
    for label in labels:
        line = sorted(
            ((arm.peak / MIB, arm.time / stored) for arm in arms if arm.ours and arm.name.startswith(label + " ")),
        )
        axes.plot(*zip(*line, strict=True), marker=".", label=label)
    markers = itertools.cycle("osD^v<>P*X")
    for arm in arms:
        if not arm.ours:
            axes.plot(arm.peak / MIB, arm.time / stored, next(markers), linestyle="none", label=arm.name)
    axes.set(xscale="log", xlabel="peak memory, MiB", ylabel="time, stored = 1", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def compiled_pairs(pairs: Pairs) -> Pairs:
    return [(torch.compile(f), torch.compile(g)) for f, g in pairs]


def compare(shape: str, options: argparse.Namespace, out: Path, stamp: str) -> list[str]:
    width, tokens, batch, blocks = map(int, shape.split("x"))
    dtype = getattr(torch, options.dtype)
    pairs = branches(blocks, width, device=options.device, dtype=dtype)
    x = torch.randn(batch, tokens, width, device=options.device, dtype=dtype, requires_grad=True)
    x.grad = torch.zeros_like(x)
    zero(pairs)
    lines = [f"## width {width}, {tokens} tokens, batch {batch}, {blocks} blocks, {options.dtype}"]
    for kind in ("eager", "compiled"):
        if options.only and options.only != kind:
            continue
        rivals = eager_rivals(pairs, options.device)
        if kind == "compiled":
            rivals = [rivals[0], *compiled_rivals(pairs, x)]
        expected = examine(rivals[0], pairs, x, None)
        for rival in rivals[1:]:
            examine(rival, pairs, x, expected)
        arms = list(rivals)
        for streams in options.streams:
            net = sequence_of(pairs if kind == "eager" else compiled_pairs(pairs), streams)
            started = time.perf_counter()
            ours = our_arms(net, x, rivals, f"{streams} streams")
            print(f"  {kind}, {streams}: planned in {time.perf_counter() - started:.1f} s", flush=True)
            for arm in ours:
                examine(arm, pairs, x, expected)
            arms += ours
        race(arms, x, options.rounds, options.seconds)
        name = f"pareto_{stamp}_{shape}_{kind}.png"
        with contextlib.suppress(ImportError):
            plot(arms, f"width {width}, {tokens} tokens, {blocks} blocks, {kind}", out / name)
        lines += ["", f"### {kind}", "", *table(arms), "", f"![time against memory]({name})"]
        print("\n".join(lines[-len(table(arms)) - 4 :]), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="width x tokens x batch x blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", nargs="+", default=["float"], help="float, fixed, or both")
    parser.add_argument("--only", choices=("eager", "compiled"), help="one kind of rivals")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20.0, help="no further round after these, for each table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    cuda = options.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    stamp = f"{'-'.join(name.replace(',', '').split()).lower()}_{datetime.date.today()}"
    options.out.mkdir(parents=True, exist_ok=True)
    report = [
        "# At the peak memory of every rival, is a plan for that budget at least as fast?",
        "",
        f"{name}, torch {torch.__version__}, {datetime.date.today()}: `python {' '.join(sys.argv)}`",
        "",
        'Medians over rounds in which all ways run in turn; peaks are above weights, gradients and input. "plan / '
        'rival" is the median of the ratios within a round: below 1 the plan is faster.',
    ]
    for shape in options.shapes:
        print(f"{shape} on {name}", flush=True)
        report += ["", *compare(shape, options, options.out, stamp)]
    path = options.out / f"pareto_{stamp}.md"
    path.write_text("\n".join(report) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
