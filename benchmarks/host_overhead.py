"""What does the engine cost where kernels are small, eager and as a CUDA graph?

python benchmarks/host_overhead.py --out benchmarks/results/host_overhead_h100.md
python benchmarks/host_overhead.py --device cpu

Another checkout of the library runs the same rows in turn, step by step, in a process of its own:

python benchmarks/host_overhead.py --device cpu --old ../revnet-before --rounds 60

Where the machine is too noisy for a per cent, `--instructions` counts what the processor executes
in one step of old and new: every run gives the same number. It takes minutes, under valgrind.

python benchmarks/host_overhead.py --device cpu --old ../revnet-before --instructions
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _models import branches
from _race import BLOCK, EAGER, FIXED, FLOAT, STORED, Row, Target, main, make_arm, timed
from torch import Tensor

ROWS = (
    Row(
        "small-eager", 256, 256, 8, 48, arms=EAGER,
        targets=(Target(FLOAT, 2.0, STORED), Target(FIXED, 2.0, STORED)),
    ),
    Row(
        "small-captured", 256, 256, 8, 48, "captured",
        targets=(
            Target(FLOAT, 1.22, STORED),
            Target(FLOAT, 1 / 12, "small-eager/float"),
            Target(FIXED, 1.22, STORED),
        ),
    ),
    Row("small-autocast", 256, 256, 8, 48, autocast=True, arms=EAGER),
    Row(
        "cpu-64", 64, 64, 4, 24, device="cpu", arms=EAGER,
        targets=(Target(FLOAT, 1.42, STORED), Target(FLOAT, 0.9, BLOCK)),
    ),
    # Next to nothing but the host's time.
    Row("cpu-64-one-token", 64, 1, 1, 24, device="cpu", arms=EAGER),
    Row("cpu-64-autocast", 64, 64, 4, 24, device="cpu", autocast=True, arms=EAGER),
)  # fmt: skip
# With --old alone: time_vs_depth.py has these rows with all arms.
WIDE = (
    Row("eager-1024", 1024, 1024, 8, 24), Row("autocast-1024", 1024, 1024, 8, 24, autocast=True)
)  # fmt: skip
COMPARABLE = ROWS + WIDE
COMPARED = (STORED, FLOAT, FIXED)
HERE = Path(__file__).resolve().parents[1]
# Of which instructions are counted.
STEPS = 3


class Network:
    """The arms of a row that are compared, ready to run."""

    def __init__(self, row: Row) -> None:
        self.row = row
        pairs = branches(row.blocks, row.width, device=row.device, dtype=row.weights)
        shape = row.batch, row.tokens, row.width
        options: Any = {"device": row.device, "dtype": row.weights}
        self.x = torch.randn(shape, requires_grad=True, **options)
        pull = torch.randn(shape, **options)
        self.arms = {name: make_arm(name, row, pairs, self.x, pull) for name in COMPARED}
        for arm in self.arms.values():
            for _ in range(3):
                arm.step()

    def calls(self, name: str) -> float:
        """Returns how many Python functions one step of the forward pass calls."""
        net, x = self.arms[name].net, self.x

        def forward() -> Tensor:
            return net(x)

        return count_calls(forward) / (2 * self.row.blocks)


def count_calls(run: Callable[[], Any]) -> int:
    """Returns how many Python functions are called."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def calls_per_step() -> list[str]:
    """Returns lines that say how many Python calls a step of the forward pass takes."""
    network = Network(next(row for row in ROWS if row.name == "cpu-64-one-token"))
    counts = [f"{network.calls(name):.1f} {name}" for name in COMPARED]
    return ["", f"Python calls per step of the forward pass: {', '.join(counts)}."]


def serve(name: str) -> None:
    """Runs one step for each line read, which names the arm, and writes its seconds."""
    row = next(row for row in COMPARABLE if row.name == name)
    network = Network(row)
    print(json.dumps({name: network.calls(name) for name in COMPARED}), flush=True)
    for line in sys.stdin:
        print(timed(network.arms[line.strip()].step, row.device), flush=True)


class Child:
    """A process in which one checkout of the library runs a row."""

    def __init__(self, checkout: Path, row: Row, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", row.name, "--threads", str(threads)],
            env=os.environ | {"PYTHONPATH": str(checkout / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> dict[str, float]:
        """Wait until it is ready; return its Python calls per step of the forward pass, by arm."""
        calls: dict[str, float] = json.loads(self._read())
        return calls

    def time(self, arm: str) -> float:
        assert self.process.stdin is not None
        print(arm, file=self.process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a child process ended with code {self.process.wait()}")
        return line

    def end(self) -> None:
        self.process.communicate()


def count(name: str, arm: str) -> None:
    """Run three steps, instructions counted by the valgrind that this process runs in."""
    step = Network(next(row for row in ROWS if row.name == name)).arms[arm].step
    step()
    # Its runs fall into some steps and not into others.
    gc.collect()
    gc.disable()
    pid = str(os.getpid())
    subprocess.run(["callgrind_control", "-i", "on", pid], check=True)
    for _ in range(STEPS):
        step()
    subprocess.run(["callgrind_control", "-i", "off", pid], check=True)
    sys.stdout.flush()
    # Without the end of the interpreter, which takes minutes there.
    os._exit(0)


def instructions(checkout: Path, row: Row, arm: str) -> float:
    """Return how many instructions one step of a row executes with a checkout of the library."""
    with tempfile.TemporaryDirectory() as folder:
        counting = subprocess.run(
            ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=out",
             sys.executable, Path(__file__).resolve(), "--count", row.name, arm],
            env=os.environ | {"PYTHONPATH": str(checkout / "src"), "PYTHONHASHSEED": "0"},
            cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, check=True,
        )  # fmt: skip
    (collected,) = [line for line in counting.stderr.splitlines() if "Collected" in line]
    return int(collected.split(":")[1]) / STEPS


def compare_instructions(old: Path, rows: list[Row]) -> list[str]:
    """Return a table of the instructions of one step with both checkouts."""
    lines = ["| row | arm | old, million instructions | new | new ÷ old |", "|---|---|---|---|---|"]
    for row in rows:
        for arm in COMPARED:
            counts = [instructions(place, row, arm) / 1e6 for place in (old, HERE)]
            lines.append(
                f"| {row.name} | {arm} | {counts[0]:.2f} | {counts[1]:.2f} | "
                f"{counts[1] / counts[0]:.4f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def compare(old: Path, rows: list[Row], rounds: int, threads: int, restarts: int = 1) -> list[str]:
    """Returns a table of the times of this checkout and another one, which run in turn.

    A process keeps the luck that it has with its place in memory: several pairs even that out.
    """
    lines = [
        "| row | arm | old, ms | new, ms | new ÷ old | old ÷ stored | new ÷ stored | "
        "old, Python calls per forward step | new |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        places = {"old": old, "new": HERE}
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(restarts):
            children = {name: Child(place, row, threads) for name, place in places.items()}
            calls = {name: child.start() for name, child in children.items()}
            for turn in range(rounds):
                for arm in COMPARED:
                    # Each goes first in every second round.
                    for name in ("old", "new") if turn % 2 else ("new", "old"):
                        times.setdefault((name, arm), []).append(children[name].time(arm))
            for child in children.values():
                child.end()
        for arm in COMPARED:
            medians = [1e3 * statistics.median(times[name, arm]) for name in ("old", "new")]
            ratios = [
                ratio(times["new", arm], times["old", arm]),
                ratio(times["old", arm], times["old", STORED]),
                ratio(times["new", arm], times["new", STORED]),
            ]
            cells = [f"{median:.4g}" for median in medians]
            cells += [f"{value:.3f}" for value in ratios] + [
                f"{calls[name][arm]:.1f}" for name in places
            ]
            lines.append(f"| {row.name} | {arm} | {' | '.join(cells)} |")
    return lines


def ratio(times: list[float], base: list[float]) -> float:
    """Returns the median of the ratios within rounds."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def start() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--old", type=Path, help="another checkout, to compare with")
    parser.add_argument("--serve", choices=[row.name for row in COMPARABLE], help=argparse.SUPPRESS)
    parser.add_argument("--count", nargs=2, help=argparse.SUPPRESS)
    given, _ = parser.parse_known_args()
    if given.old is None and given.serve is None and given.count is None:
        main("Host overhead of the engine", ROWS, calls_per_step)
        return
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in COMPARABLE])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--instructions", action="store_true", help="count, do not time")
    parser.add_argument("--restarts", type=int, default=1, help="of both processes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.serve is not None:
        serve(given.serve)
        return
    if given.count is not None:
        torch.set_num_threads(1)
        count(*given.count)
    rows = [row for row in COMPARABLE if row.device == given.device and row.mode == "eager"]
    rows = [row for row in rows if not given.rows or row.name in given.rows]
    old = given.old.resolve()
    if given.instructions:
        lines = compare_instructions(old, rows)
    else:
        lines = compare(old, rows, given.rounds, given.threads, given.restarts)
    print("\n".join(lines))


if __name__ == "__main__":
    start()
