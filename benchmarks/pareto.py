"""At the peak memory of every rival, is a plan for that budget at least as fast?

    python benchmarks/pareto.py                                # the shapes of the report; on a GPU
    python benchmarks/pareto.py --shapes 128x128x4x8 --dtype float32 --device cpu --rounds 5
    python benchmarks/pareto.py --only compiled --streams float fixed --out benchmarks/results
    python benchmarks/pareto.py --only graph --streams float fixed --shapes 1024x1024x8x48 --warm 7

A shape is width x tokens x batch x blocks. Every way to run the network is first checked for its
gradients against the plain stored loop, then measured for its peak (above weights, gradients and
input). The ways of one part then run in turn, once a round; medians of their times, and of the
ratios of times within a round, go into tables and plots. After each part the report is written
anew, with all that is known by then.

Rivals that are compiled, block by block, each with another `activation_memory_budget`, meet plans
of compiled branches, each compiled with one of these settings, whichever plan is predicted to be
the fastest. `graph` has the same rivals meet the network in parts that are each one graph, rebuilt
or, the last of them, stored with one of these settings; whichever mixture was the fastest of those
whose peak, measured, is at or below the rival's. Parts take long to compile: `--warm` compiles
several at a time, in processes of their own that leave what they compiled in caches on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import itertools
import multiprocessing
import statistics
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from _models import branches
from _race import difference
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import revnet

SHAPES = ("2048x4096x2x24", "1024x1024x8x48")
CURVE = ("minimum", "5%", "15%", "30%", "50%", "75%", "stored")
# Of torch._functorch.config.activation_memory_budget; the first is its default.
SETTINGS = (1.0, 0.5, 0.1, 0.3, 0.7, 0.9)
MIB = 2**20

Pairs = list[tuple[nn.Module, nn.Module]]
Run = Callable[[Tensor], Tensor]


@dataclass
class Arm:
    """One way to run the network."""

    name: str
    run: Run
    host: bool = False  # uses host memory
    peak: int = 0
    error: float = 0.0
    times: list[float] = field(default_factory=list)  # milliseconds, one per round

    @property
    def time(self) -> float:
        return statistics.median(self.times)

    @property
    def noise(self) -> float:
        return _half_quartiles(self.times) / self.time

    def against(self, other: Arm) -> float:
        """The median of the ratios of times within a round."""
        return statistics.median(self._ratios(other))

    def slower(self, other: Arm) -> tuple[float, float]:
        """The median and the noise of those ratios."""
        ratios = self._ratios(other)
        return statistics.median(ratios), _half_quartiles(ratios)

    def _ratios(self, other: Arm) -> list[float]:
        return [mine / theirs for mine, theirs in zip(self.times, other.times, strict=True)]


def _half_quartiles(values: list[float]) -> float:
    """Half the distance between the quartiles: how well a median is known."""
    quartiles = statistics.quantiles(values, n=4)
    return (quartiles[2] - quartiles[0]) / 2


@dataclass
class Part:
    """Ways that ran in turn: rivals, with the plans for the peak of each, and plans along the
    curve, by streams.
    """

    stored: Arm
    rivals: list[Arm]
    plans: dict[str, dict[str, Arm]] = field(default_factory=dict)  # by rival, then streams
    curve: dict[str, list[Arm]] = field(
        default_factory=dict
    )  # by streams, from the smallest budget to the largest

    def arms(self) -> list[Arm]:
        plans = [arm for by_streams in self.plans.values() for arm in by_streams.values()]
        found = [self.stored, *self.rivals, *plans, *itertools.chain(*self.curve.values())]
        return [arm for i, arm in enumerate(found) if not any(arm is other for other in found[:i])]


# The rivals


def block(f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    y1 = x1 + f(x2)
    return y1, x2 + g(y1)


def loop(pairs: Pairs, apply: Callable[..., tuple[Tensor, Tensor]] = block) -> Run:
    """Returns the two-stream loop that runs each block by `apply`."""
    return one_after_another([partial(apply, f, g) for f, g in pairs])


def one_after_another(parts: list[Callable[..., tuple[Tensor, Tensor]]]) -> Run:
    def run(x: Tensor) -> Tensor:
        # Two tensors, because a compiler would make another graph for a part whose inputs are one.
        x1, x2 = x, x.view_as(x)
        for part in parts:
            x1, x2 = part(x1, x2)
        return (x1 + x2) / 2

    return run


def per_block(**options: Any) -> Callable[..., Any]:
    return lambda f, g, x1, x2: checkpoint(block, f, g, x1, x2, use_reentrant=False, **options)


def per_branch(f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    y1 = x1 + checkpoint(f, x2, use_reentrant=False)
    return y1, x2 + checkpoint(g, y1, use_reentrant=False)


def selective(*kept: str) -> Callable[..., Any]:
    """Returns torch's selective checkpoint of each block, which keeps the results of operations of
    these names.
    """

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
        Arm(
            "checkpoint per block, offloaded",
            offloaded(loop(pairs, per_block()), device),
            host=device == "cuda",
        ),
    ]


# Compiled code is kept with the code object: each setting needs code objects of its own.


@contextlib.contextmanager
def compiling(setting: float) -> Iterator[None]:
    """What is compiled inside recomputes as much as the memory budget `setting` of the compiler
    asks.
    """
    import torch._functorch.config

    with torch._functorch.config.patch(activation_memory_budget=setting):
        yield


def apart(fn: Any, *labels: object) -> Any:
    """A function like `fn` with a code object of its own."""
    code = fn.__code__.replace(co_name="_".join(map(str, (fn.__name__, *labels))))
    return types.FunctionType(code, fn.__globals__, closure=fn.__closure__)


@cache
def kind_apart(kind: type, setting: float) -> type:
    return type(f"{kind.__name__}_{setting}", (kind,), {"forward": apart(kind.forward, setting)})


def compiled_pairs(pairs: Pairs, setting: float) -> Pairs:
    """The same branches, with the same parameters, to be compiled with a setting."""

    def compiled(branch: nn.Module) -> nn.Module:
        twin = copy.copy(branch)
        twin.__class__ = kind_apart(type(branch), setting)
        twin.compile()
        return twin

    return [(compiled(f), compiled(g)) for f, g in pairs]


# Plans


# A plan, the setting with which the branches were compiled, and their sequence.
Choice = tuple[revnet.Plan, float, revnet.ReversibleSequence]


def planned(net: revnet.ReversibleSequence, found: revnet.Plan) -> Run:
    # A slice shares the blocks, and has settings of its own.
    own = net[:]
    own.execution = found
    return own


def plans_for(
    net: revnet.ReversibleSequence, x: Tensor, budgets: list[Any]
) -> list[revnet.Plan | None]:
    """A plan for each budget; None where the budget is below the minimum."""
    try:
        return list(revnet.plan(net, x, budgets))
    except revnet.ReversibleError:
        least = revnet.plan(net, x, "minimum").budget
    possible = [budget for budget in budgets if isinstance(budget, str) or budget >= least]
    found = iter(revnet.plan(net, x, possible))
    return [next(found) if budget in possible else None for budget in budgets]


# Parts that are each one graph


def parts_of(
    pairs: Pairs, length: int, streams: str, execution: str, setting: float
) -> list[Callable[..., Any]]:
    """Returns the network in parts of `length` blocks, each one graph: what is compiled for one
    serves all.
    """
    compiled = torch.compile(apart(through, execution, setting), fullgraph=True)
    chunks = [pairs[start : start + length] for start in range(0, len(pairs), length)]
    return [
        partial(compiled, revnet.ReversibleSequence(chunk, streams=streams, execution=execution))
        for chunk in chunks
    ]


def through(net: revnet.ReversibleSequence, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    y1, y2 = net.run(x1, x2)
    return y1, y2


def warm(
    shape: str, options: argparse.Namespace, streams: str, execution: str, setting: float
) -> None:
    """Compiles one part, and leaves what was compiled in the caches."""
    torch.set_num_threads(1)
    comparison = Comparison(shape, options)
    with compiling(setting):
        step(
            one_after_another(
                parts_of(comparison.pairs, options.part, streams, execution, setting)
            ),
            comparison.x,
        )


# Measurements


def step(run: Run, x: Tensor) -> None:
    run(x).backward(torch.full_like(x, 1e-2))


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
    found = [
        parameter.grad.double()
        for pair in pairs
        for branch in pair
        for parameter in branch.parameters()
    ]
    if expected is not None:
        arm.error = difference(found, expected)
    arm.peak = peak(arm.run, x)
    zero(pairs)
    return found


def peak(run: Run, x: Tensor) -> int:
    """Bytes at the peak of a step beside gradients that exist."""
    seed = torch.full_like(x, 1e-2)
    return revnet.measure_memory(lambda: run(x).backward(seed)).peak_bytes


def race(arms: list[Arm], x: Tensor, rounds: int, seconds: float) -> None:
    """Runs all arms in turn, `rounds` times or as long as there are seconds."""
    began = time.perf_counter()
    for turn in range(rounds + 1):
        for arm in arms:
            elapsed = timed(arm.run, x)
            if turn:  # the first round warms up
                arm.times.append(elapsed)
        if turn >= 3 and time.perf_counter() - began > seconds:
            break


def timed(run: Run, x: Tensor) -> float:
    if not x.is_cuda:
        before = time.perf_counter()
        step(run, x)
        return 1000 * (time.perf_counter() - before)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step(run, x)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


# The report


def mib(arm: Arm) -> str:
    size = arm.peak / MIB
    return f"{size:.0f}" if size >= 100 else f"{size:.3g}"


def table(parts: list[Part]) -> list[str]:
    streams = list(
        dict.fromkeys(name for part in parts for plans in part.plans.values() for name in plans)
    )
    columns = [f"{name}: peak MiB | {name}: plan / rival" for name in streams]
    lines = [
        f"| rival | peak MiB | time ms | noise | against stored | gradient error | "
        f"{' | '.join(columns)} |",
        "|---" * (6 + 2 * len(streams)) + "|",
    ]
    worst = 0.0
    for part in parts:
        for rival in part.rivals:
            cells = []
            for name in streams:
                ours = part.plans.get(rival.name, {}).get(name)
                if ours is None:
                    cells.append("– | no plan so small")
                    continue
                ratio, noise = ours.slower(rival)
                worst = max(worst, ratio)
                cells.append(f"{mib(ours)} | {ratio:.3f} ± {noise:.3f}")
            lines.append(
                f"| {rival.name} | {mib(rival)} | {rival.time:.2f} | {rival.noise:.1%} "
                f"| {rival.against(part.stored):.3f} | {rival.error:.1e} | {' | '.join(cells)} |"
            )
    lines += ["", f"At the peak of every rival, a plan takes at most {worst:.3f} of its time."]
    for part in parts:
        for name, arms in part.curve.items():
            lines += ["", *curve_table(name, arms, part.stored)]
    plans = [
        arm
        for part in parts
        for arm in part.arms()
        if arm not in part.rivals and arm is not part.stored
    ]
    rivals = [rival for part in parts for rival in part.rivals if not rival.host]
    if plans and rivals:
        smallest, rival = (min(arms, key=lambda arm: arm.peak) for arms in (plans, rivals))
        lines += [
            "",
            f"Smallest plan: {mib(smallest)} MiB ({smallest.name}). Smallest rival without host "
            f"memory: {mib(rival)} MiB ({rival.name}). Ratio {smallest.peak / rival.peak:.2f}.",
        ]
    return lines


def curve_table(streams: str, arms: list[Arm], stored: Arm) -> list[str]:
    lines = [
        f"| {streams} streams | peak MiB | time ms | noise | against stored | gradient error |",
        "|---" * 6 + "|",
    ]
    lines += [
        f"| {arm.name} | {mib(arm)} | {arm.time:.2f} | {arm.noise:.1%} | {arm.against(stored):.3f} "
        f"| {arm.error:.1e} |"
        for arm in arms
    ]
    if len(arms) < 2:
        return lines
    rises = [
        (*more.slower(less), less.name, more.name) for less, more in itertools.combinations(arms, 2)
    ]
    ratio, noise, less, more = max(rises, key=lambda rise: rise[0] - rise[1])
    verdict = "yes" if ratio - noise <= 1.01 else "no"
    return [
        *lines,
        "",
        f"Monotone within noise and 1 %: {verdict}; at worst {more} / {less} = {ratio:.3f} ± "
        f"{noise:.3f}.",
    ]


def plot(parts: list[Part], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    markers = itertools.cycle("osD^v<>P*X")
    for part in parts:
        for streams, arms in part.curve.items():
            points = [(arm.peak / MIB, arm.against(part.stored)) for arm in arms]
            axes.plot(*zip(*points, strict=True), marker=".", label=f"{streams} streams")
        for arm in part.rivals:
            point = arm.peak / MIB, arm.against(part.stored)
            axes.plot(*point, next(markers), linestyle="none", label=arm.name)
    axes.set(xscale="log", xlabel="peak memory, MiB", ylabel="time, stored = 1", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


class Comparison:
    """One shape: its network, its input, and how long to look at it."""

    def __init__(self, shape: str, options: argparse.Namespace) -> None:
        width, tokens, batch, blocks = map(int, shape.split("x"))
        blocks = options.blocks or blocks
        self.shape = shape
        dtype = getattr(torch, options.dtype)
        self.title = (
            f"width {width}, {tokens} tokens, batch {batch}, {blocks} blocks, {options.dtype}"
        )
        self.options = options
        self.pairs = branches(blocks, width, device=options.device, dtype=dtype)
        self.x = torch.randn(
            batch, tokens, width, device=options.device, dtype=dtype, requires_grad=True
        )
        self.x.grad = torch.zeros_like(self.x)
        zero(self.pairs)
        self.began = time.perf_counter()

    @cached_property
    def expected(self) -> list[Tensor]:
        """The gradients of the plain stored loop, in float64: too much memory for processes that
        only compile.
        """
        return self.examine(Arm("stored", loop(self.pairs)), None)

    def examine(self, arm: Arm, expected: list[Tensor] | None) -> list[Tensor]:
        return examine(arm, self.pairs, self.x, expected)

    def say(self, what: str) -> None:
        print(f"  {time.perf_counter() - self.began:6.1f} s: {what}", flush=True)

    def net(self, pairs: Pairs, streams: str) -> revnet.ReversibleSequence:
        return revnet.ReversibleSequence(pairs, streams=streams)

    def arm(self, name: str, run: Run) -> Arm:
        arm = Arm(name, run)
        self.examine(arm, self.expected)
        return arm

    def finish(self, part: Part) -> Part:
        race(part.arms(), self.x, self.options.rounds, self.options.seconds)
        return part

    def eager(self) -> Iterator[Part]:
        rivals = eager_rivals(self.pairs, self.options.device)
        for rival in rivals:
            self.examine(rival, self.expected)
        self.say("rivals measured")
        part = Part(rivals[0], rivals, {rival.name: {} for rival in rivals})
        for streams in self.options.streams:
            net = self.net(self.pairs, streams)
            found = plans_for(net, self.x, [*(rival.peak for rival in rivals), *CURVE])
            self.say(f"{streams} streams planned")
            for rival, plan in zip(rivals, found, strict=False):
                if plan is not None:
                    part.plans[rival.name][streams] = self.arm(
                        f"plan at {rival.name}", planned(net, plan)
                    )
            part.curve[streams] = [
                self.arm(f"plan {budget}", planned(net, plan))
                for budget, plan in zip(CURVE, found[len(rivals) :], strict=True)
                if plan is not None
            ]
        yield self.finish(part)

    def budgeted(self, setting: float) -> Arm:
        with compiling(setting):
            compiled = torch.compile(apart(block, setting))
            return self.arm(f"activation_memory_budget {setting}", loop(self.pairs, compiled))

    def graph(self) -> Iterator[Part]:
        import torch._dynamo.config

        torch._dynamo.config.recompile_limit = 64
        settings = self.options.settings
        if self.options.warm:
            one = argparse.Namespace(**{**vars(self.options), "blocks": self.options.part})
            kinds = [("invert", 1.0), *(("store", setting) for setting in settings)]
            ways = itertools.product(self.options.streams, kinds)
            with ProcessPoolExecutor(
                self.options.warm, multiprocessing.get_context("spawn")
            ) as pool:
                jobs = [
                    pool.submit(warm, self.shape, one, streams, *kind) for streams, kind in ways
                ]
                for job in jobs:
                    job.result()
            self.say(f"{len(jobs)} graphs compiled beforehand")
        rivals = [self.budgeted(setting) for setting in settings]
        self.say("rivals measured")
        part = Part(rivals[0], rivals, {rival.name: {} for rival in rivals})
        for streams in self.options.streams:
            inverted = parts_of(self.pairs, self.options.part, streams, "invert", 1.0)
            count = len(inverted)
            arms = [self.arm(f"none of {count} stored", one_after_another(inverted))]
            for setting in settings:
                stored = parts_of(self.pairs, self.options.part, streams, "store", setting)
                for last in range(1, count + 1):
                    mixture = one_after_another([*inverted[:-last], *stored[-last:]])
                    with compiling(setting):
                        arms.append(self.arm(f"{last} of {count} stored at {setting}", mixture))
                self.say(f"{streams} streams, {arms[-1].name}: {mib(arms[-1])} MiB")
            quick = {
                arm.name: statistics.median(timed(arm.run, self.x) for _ in range(5))
                for arm in arms
            }
            raced = {arm.name: arm for arm in (arms[0], arms[count])}
            for rival in rivals:
                small = [arm for arm in arms if arm.peak <= rival.peak]
                if small:
                    best = min(small, key=lambda arm: quick[arm.name])
                    part.plans[rival.name][streams] = raced[best.name] = best
            part.curve[streams] = sorted(raced.values(), key=lambda arm: arm.peak)
        yield self.finish(part)

    def compiled(self) -> Iterator[Part]:
        import torch._dynamo.config

        # Branches meet several modes of autograd, and all must stay compiled.
        torch._dynamo.config.recompile_limit = 64
        settings = self.options.settings
        rivals = [self.budgeted(setting) for setting in settings]
        self.say("rivals measured")
        part = Part(rivals[0], rivals, {rival.name: {} for rival in rivals})
        for streams in self.options.streams:
            found: dict[int, list[Choice]] = defaultdict(list)
            budgets = [rival.peak for rival in rivals]
            for setting in settings:
                net = self.net(compiled_pairs(self.pairs, setting), streams)
                with compiling(setting):
                    # The points of the curve are sizes of the first setting's.
                    for plan in plans_for(net, self.x, [*budgets, *(() if found else CURVE)]):
                        if plan is not None:
                            found[plan.budget].append((plan, setting, net))
                budgets = list({*budgets, *found})
                self.say(f"{streams} streams, branches compiled with {setting} planned")
            arms = {budget: self.fastest(found[budget]) for budget in sorted(found)}
            for rival in rivals:
                if rival.peak in arms:
                    part.plans[rival.name][streams] = arms[rival.peak]
            part.curve[streams] = list(arms.values())
        yield self.finish(part)

    def fastest(self, found: list[Choice]) -> Arm:
        """The plan predicted to be the fastest, among those for branches compiled with different
        settings.
        """
        plan, setting, net = min(found, key=lambda one: one[0].seconds)
        with compiling(setting):
            return self.arm(
                f"plan {plan.budget / MIB:.0f} MiB, branches with {setting}", planned(net, plan)
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, help="width x tokens x batch x blocks"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", nargs="+", default=["float"], help="float, fixed, or both")
    parser.add_argument("--only", choices=("eager", "compiled", "graph"), help="one kind of rivals")
    parser.add_argument(
        "--blocks", type=int, help="blocks of every shape, in place of those it names"
    )
    parser.add_argument("--part", type=int, default=6, help="blocks of each graph")
    parser.add_argument(
        "--settings",
        nargs="+",
        type=float,
        default=SETTINGS,
        help="activation memory budgets of compiled rivals",
    )
    parser.add_argument(
        "--warm", type=int, default=0, help="graphs compiled at a time, before they are measured"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="no further round after these, for each part"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    cuda = options.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    kinds = [options.only] if options.only else ["eager", "compiled", "graph"]
    stamp = f"{'-'.join(name.replace(',', '').split()).lower()}_{datetime.date.today()}"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"pareto_{'_'.join(kinds)}_{stamp}.md"
    report = [
        "# At the peak memory of every rival, is a plan for that budget at least as fast?",
        "",
        f"{name}, torch {torch.__version__}, {datetime.date.today()}: `python "
        f"{' '.join(sys.argv)}`",
        "",
        "Medians over rounds in which all ways run in turn; peaks are above weights, gradients and "
        "input. Noise is "
        'half the distance between the quartiles. "plan / rival" is the median of the ratios '
        "within "
        "a round: below 1 "
        "the plan is faster.",
    ]
    for shape in options.shapes:
        print(f"{shape} on {name}", flush=True)
        comparison = Comparison(shape, options)
        report += ["", f"## {comparison.title}"]
        for kind in kinds:
            parts: list[Part] = []
            lines: list[str] = []
            for part in getattr(comparison, kind)():
                parts.append(part)
                picture = f"pareto_{stamp}_{shape}_{kind}.png"
                lines = [
                    "",
                    f"### {kind}",
                    "",
                    *table(parts),
                    "",
                    f"![time against memory]({picture})",
                ]
                with contextlib.suppress(ImportError):
                    plot(parts, comparison.title, options.out / picture)
                path.write_text("\n".join([*report, *lines]) + "\n", encoding="utf-8")
            print("\n".join(lines), flush=True)
            report += lines
    print(f"written to {path}")


if __name__ == "__main__":
    main()
