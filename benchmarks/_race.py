"""Ways to train one network, checked against each other and then timed in turn, and how a report
begins and ends; shared by the benchmarks.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _models import branches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnet

MIB = 2**20
STORED, BLOCK, BRANCH, FLOAT, FIXED = (
    "stored",
    "checkpoint per block",
    "checkpoint per branch",
    "float",
    "fixed",
)
ALL = (STORED, BLOCK, BRANCH, FLOAT, FIXED)
# The shortest loop in Python that rebuilds the streams, with a backward call for each branch.
HAND = "by hand"
# The same on autograd's own graph: what no engine can undercut that composes with all of torch.
HOOKS = "hooks alone"
EAGER = (*ALL, HAND, HOOKS)


@dataclass(frozen=True)
class Target:
    """`arm` at most `limit` times `base`; `base` may name an arm of another row, as in
    `row/arm`.
    """

    arm: str
    limit: float
    base: str
    quantity: str = "time"


@dataclass(frozen=True)
class Row:
    """One shape, executed in one mode by several arms."""

    name: str
    width: int
    tokens: int
    batch: int
    blocks: int
    mode: str = "eager"
    device: str = "cuda"
    autocast: bool = False
    arms: tuple[str, ...] = ALL
    targets: tuple[Target, ...] = ()
    # None where a step is too long to repeat: the one that is compared is the one that is timed.
    rounds: int | None = 15
    # Of the gradients, relative; float streams at a thousand layers of bfloat16 drift by more than
    # the usual.
    allowed: float = 0.1

    @property
    def weights(self) -> torch.dtype:
        return torch.float32 if self.autocast or self.device == "cpu" else torch.bfloat16

    def describe(self) -> str:
        precision = (
            "fp32 weights, bf16 autocast"
            if self.autocast
            else str(self.weights).removeprefix("torch.")
        )
        return (
            f"{self.device}, {self.mode}, d={self.width}, {self.tokens} tokens, batch "
            f"{self.batch}, {self.blocks} blocks, {precision}"
        )


class Loop(nn.Module):
    """The two-stream network as a plain loop, stored or under torch's checkpointing."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]], arm: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        self.arm = arm

    def forward(self, x: Tensor) -> Tensor:
        x1 = x2 = x
        for f, g in self.blocks:
            if self.arm == BLOCK:
                x1, x2 = checkpoint(_block, f, g, x1, x2, use_reentrant=False)
            elif self.arm == BRANCH:
                x1 = x1 + checkpoint(f, x2, use_reentrant=False).to(x1.dtype)
                x2 = x2 + checkpoint(g, x1, use_reentrant=False).to(x2.dtype)
            else:
                x1, x2 = _block(f, g, x1, x2)
        return (x1 + x2) / 2


def _block(f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    y1 = x1 + f(x2).to(x1.dtype)
    return y1, x2 + g(y1).to(x2.dtype)


class Hand(nn.Module):
    """The two-stream network trained by a loop that rebuilds the streams, and checks nothing.

    A call is a whole training step, so that it cannot be part of a model.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor, pull: Tensor) -> None:
        """Add to all gradients, for the gradient of the merged streams."""
        with torch.no_grad():
            y1 = y2 = x
            for f, g in self.blocks:
                y1 = y1 + f(y2)
                y2 = y2 + g(y1)
            # The stored loop merges them, too.
            (y1 + y2) / 2
            grad1 = grad2 = pull / 2
            for f, g in reversed(self.blocks):
                y2, grad1 = _undone(g, y1, y2, grad1, grad2)
                y1, grad2 = _undone(f, y2, y1, grad2, grad1)
            grad = grad1 + grad2
            x.grad = grad if x.grad is None else x.grad.add_(grad)


def _undone(
    branch: nn.Module, source: Tensor, target: Tensor, of_source: Tensor, of_target: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the target before a step, and the gradient of its source."""
    source = source.detach().requires_grad_()
    with torch.enable_grad():
        out = branch(source)
    torch.autograd.backward(out, of_target)
    return target - out, of_source + source.grad


class Hooks(nn.Module):
    """The two-stream network on an ordinary graph, whose hooks rebuild what steps saved.

    They check nothing, and reckon with a single backward call that visits every step in order.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        streams, state = [x, x], []
        autocast = torch.is_autocast_enabled(x.device.type)
        for pair in self.blocks:
            for target, branch in enumerate(pair):
                hooks = _Hooks(branch, target, state, autocast)
                with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
                    streams[target] = streams[target] + branch(streams[1 - target])
        state += [stream.detach() for stream in streams]
        return (streams[0] + streams[1]) / 2


class _Hooks:
    """Those of one step, on the streams as the steps above it left them."""

    __slots__ = ("branch", "target", "state", "autocast", "saved", "found")

    def __init__(self, branch: nn.Module, target: int, state: list[Tensor], autocast: bool) -> None:
        self.branch, self.target, self.state, self.autocast = branch, target, state, autocast
        self.saved = 0
        self.found: dict[int, Tensor] | None = None

    def pack(self, tensor: Tensor) -> Tensor | int:
        self.saved += 1
        return tensor if tensor.is_leaf and tensor.requires_grad else self.saved

    def unpack(self, packed: Tensor | int) -> Tensor:
        if not isinstance(packed, int):
            return packed
        if self.found is None:
            self.found = self._replay()
        return self.found.pop(packed)

    def _replay(self) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        count = 0

        def collect(tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            # Not the tensor itself: of an output it would close a cycle with its own node.
            found[count] = kept = tensor.detach()
            return kept

        state, target = self.state, self.target
        source = state[1 - target].detach().requires_grad_()
        kind = source.device.type
        precision = torch.autocast(kind, torch.bfloat16) if self.autocast else _NOTHING
        hooks = torch.autograd.graph.saved_tensors_hooks(collect, _same)
        with torch.enable_grad(), precision, hooks:
            out = self.branch(source)
        state[target] = state[target] - out.detach()
        return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


_NOTHING = contextlib.nullcontext()


@dataclass
class Arm:
    """One way to run a row's network, and what was found about it."""

    name: str
    net: nn.Module
    step: Callable[[], None]
    error: float | None = None
    peak: int | None = None
    times: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def time(self) -> float:
        return statistics.median(self.times)


def race(row: Row, rounds: int | None = None) -> list[Arm]:
    """Checks the arms' gradients against the first arm that runs, then times them in turn."""
    torch._dynamo.reset()
    pairs = branches(row.blocks, row.width, device=row.device, dtype=row.weights)
    x = torch.randn(
        row.batch, row.tokens, row.width, device=row.device, dtype=row.weights, requires_grad=True
    )
    pull = torch.randn_like(x)
    arms = [make_arm(name, row, pairs, x, pull) for name in row.arms]
    parameters = [p for pair in pairs for branch in pair for p in branch.parameters()]
    expected: list[Tensor] | None = None
    for arm in arms:
        try:
            found = _examine(arm, row, parameters, x, pull)
        except torch.OutOfMemoryError:
            arm.failure = "out of memory"
            for p in (*parameters, x):
                p.grad = None
            torch.cuda.empty_cache()
            continue
        if expected is None:
            expected = found
        arm.error = difference(found, expected)
        allowed = row.allowed if row.weights is torch.bfloat16 or row.autocast else 1e-3
        if not arm.error <= allowed:
            raise SystemExit(
                f"{row.name}, {arm.name}: gradients off by {arm.error:.2e}, so its time says "
                f"nothing"
            )
        del found
    del expected
    running = [arm for arm in arms if not arm.failure]
    for _ in range(0 if row.rounds is None else rounds or row.rounds):
        for arm in running:
            arm.times.append(timed(arm.step, row.device))
    for p in (*parameters, x):
        p.grad = None
    return arms


def make_arm(name: str, row: Row, pairs: Any, x: Tensor, pull: Tensor) -> Arm:
    if name == HAND:
        net: nn.Module = Hand(pairs)
    elif name == HOOKS:
        net = Hooks(pairs)
    elif name in (FLOAT, FIXED):
        net = revnet.ReversibleSequence(pairs, streams=name)
    else:
        net = Loop(pairs, name)
    net = net.to(row.device)
    run = torch.compile(net, fullgraph=True) if row.mode == "fullgraph" else net

    def step() -> None:
        with torch.autocast(row.device, torch.bfloat16) if row.autocast else _NOTHING:
            if name == HAND:
                run(x, pull)
                return
            y = run(x)
        y.backward(pull)

    return Arm(name, net, step)


def _examine(arm: Arm, row: Row, parameters: list[Tensor], x: Tensor, pull: Tensor) -> list[Tensor]:
    """The gradients of one step of the arm; measures its peak, and captures it where the row says
    so.
    """
    leaves = [*parameters, x]
    for p in leaves:
        p.grad = None
    if row.rounds is None:
        for p in leaves:
            p.grad = torch.zeros_like(p)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm.times.append(timed(arm.step, row.device))
        arm.peak = torch.cuda.max_memory_allocated() - before
        return [p.grad for p in leaves]
    arm.step()
    if row.mode == "captured":
        arm.step = _captured(arm.step, leaves)
        for p in leaves:
            p.grad.zero_()
        arm.step()
        return [p.grad.clone() for p in leaves]
    found = [p.grad.clone() for p in leaves]
    # Gradients stay allocated, so that a peak above what is held now is one of activations.
    if row.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm.step()
        torch.cuda.synchronize()
        arm.peak = torch.cuda.max_memory_allocated() - before
    else:
        arm.peak = revnet.measure_memory(arm.step).peak_bytes
    return found


def _captured(step: Callable[[], None], leaves: list[Tensor]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # A replay adds to the gradients of the capture, wherever `.grad` points by then.
    gradients = [p.grad for p in leaves]

    def replay(_gradients: list[Tensor | None] = gradients) -> None:
        graph.replay()

    return replay


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    off = sum(
        float((a.double() - b.double()).square().sum())
        for a, b in zip(found, expected, strict=True)
    )
    size = sum(float(b.double().square().sum()) for b in expected)
    return (off / size) ** 0.5


def timed(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(rows: list[tuple[Row, list[Arm]]]) -> list[str]:
    """One line per arm: time, ratios, peak, error, and each target that concerns it with the
    outcome.
    """
    known = {f"{row.name}/{arm.name}": arm for row, arms in rows for arm in arms}
    lines = [
        "| row | arm | ms | × stored | × checkpoint per block | peak, MiB | gradient error | "
        "target | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, arms in rows:
        for arm in arms:
            if arm.failure:
                lines.append(f"| {row.name} | {arm.name} | {arm.failure} | | | | | | |")
                continue
            ratios = [_ratio(arm, known.get(f"{row.name}/{base}")) for base in (STORED, BLOCK)]
            verdicts = [
                _verdict(target, arm, row, known)
                for target in row.targets
                if target.arm == arm.name
            ]
            lines.append(
                f"| {row.name} | {arm.name} | {1e3 * arm.time:.4g} | {_text(ratios[0])} | "
                f"{_text(ratios[1])} | {'' if arm.peak is None else f'{arm.peak / MIB:.4g}'} | "
                f"{arm.error:.1e} | {'; '.join(target for target, _ in verdicts)} | "
                f"{'; '.join(found for _, found in verdicts)} |"
            )
    return lines


def _ratio(arm: Arm, base: Arm | None, quantity: str = "time") -> float | None:
    if base is None or base.failure or arm.failure:
        return None
    if quantity == "peak":
        return None if arm.peak is None or not base.peak else arm.peak / base.peak
    if len(arm.times) != len(base.times):
        return arm.time / base.time
    # Rounds are interleaved: a ratio within a round does not see the machine change speed between
    # rounds.
    return statistics.median(a / b for a, b in zip(arm.times, base.times, strict=True))


def _verdict(target: Target, arm: Arm, row: Row, known: dict[str, Arm]) -> tuple[str, str]:
    if target.base == "bytes":
        assert arm.peak is not None
        return (
            f"peak ≤ {target.limit / MIB:.0f} MiB",
            "met" if arm.peak <= target.limit else "missed",
        )
    base = known.get(target.base if "/" in target.base else f"{row.name}/{target.base}")
    found = _ratio(arm, base, target.quantity)
    what = "" if target.quantity == "time" else f"{target.quantity} "
    name = f"{what}≤ {target.limit:.3g} × {target.base}"
    if found is None:
        return name, "not compared"
    return name, f"{'met' if found <= target.limit else 'missed'} ({found:.3f})"


def _text(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def main(question: str, rows: Sequence[Row], footer: Callable[[], list[str]] | None = None) -> None:
    """Runs the rows that the command line asks for; prints their table, and a footer."""
    names = [row.name for row in rows]
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", choices=names, help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--rounds", type=int, help="timed rounds per row, instead of the row's own number"
    )
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--out", type=Path, help="a file for the report")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("high")
    chosen = [row for row in rows if row.name in given.rows] if given.rows else rows
    results = []
    for row in chosen:
        if row.device != given.device:
            continue
        start = time.perf_counter()
        results.append((row, race(row, given.rounds)))
        print(
            f"{row.name}: {row.describe()} ({time.perf_counter() - start:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
        if row.device == "cuda":
            torch.cuda.empty_cache()
    table = report(results) + (footer() if footer is not None else [])
    publish(_document(question, results, table), given.out)


def _document(question: str, results: list[tuple[Row, list[Arm]]], table: list[str]) -> list[str]:
    hardware = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return [
        *opening(question, hardware, f", {torch.get_num_threads()} CPU threads."),
        "One forward and backward pass. Arms share their weights and run in turn, once a round; "
        "times are medians, ratios medians of the ratios within rounds. The peak is that of "
        "activations: above weights, gradients and input. The gradient error is the relative "
        "distance of all gradients from those of the row's first arm.",
        "",
        *[f"- {row.name}: {row.describe()}, {len(arms[-1].times)} rounds" for row, arms in results],
        "",
        *table,
    ]


def opening(question: str, hardware: str, more: str = ".") -> list[str]:
    """Return how a report begins: its question, command, day, hardware and versions."""
    return [
        f"# {question}",
        "",
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        f"{datetime.date.today()}; {hardware}; torch {torch.__version__}, Python "
        f"{platform.python_version()}{more}",
        "",
    ]


def publish(lines: Sequence[str], out: Path | None) -> None:
    """Print a report, and write it if there is a file for it."""
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
