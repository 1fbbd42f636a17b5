"""What does each example keep for backward, and how long does its training step take?

    python benchmarks/every_example.py --out benchmarks/results/examples_toy_cpu.md
    python benchmarks/every_example.py --full --device cuda --steps 2 \
        --out benchmarks/results/examples_full_h200.md

The second line has the size of the papers. Each example runs in a process of its own, one after the
other; its row is printed and written when it ends. An example that fails, or takes longer than
`--limit` seconds, has a row that says so. A report that exists is gone on with: rows with figures
stay, and their examples do not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _race import opening

import revnet

FOLDER = Path(__file__).parents[1] / "examples"
# Those that the CPU cannot launch fast enough for a GPU come last.
SLOW = ("finetune", "equilibrium", "rev_gnn")
NAMES = [*sorted({path.stem for path in FOLDER.glob("*.py")} - {"common", *SLOW}), *SLOW]
MIB = 2**20
COLUMNS = (
    "example",
    "largest gradient difference",
    "kept, stored, MiB",
    "kept, inverted, MiB",
    "peak, stored, MiB",
    "peak, inverted, MiB",
    "time, stored, ms",
    "time, inverted, ms",
    "loss, first",
    "loss, last",
    "from float64",
    "s in all",
)
# Examples without this option train as long as they always do.
TRAINED = [name for name in NAMES if "steps=0" in (FOLDER / f"{name}.py").read_text("utf-8")]


def apart(function: Callable[..., Any], *args: Any, limit: float = 90.0) -> Any:
    """Return what a function returns in a process of its own, or the error that it ends with."""
    # The server that is forked from has imported torch, and has never started CUDA or a thread.
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return TimeoutError(f"no result within {limit:g} s")
        return receiver.recv()
    except EOFError:
        process.join()
        return RuntimeError(f"the process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _answer(
    sender: multiprocessing.connection.Connection, function: Callable[..., Any], args: Any
) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = function(*args)
    except Exception as error:
        # As text, because not every error can be sent.
        result = RuntimeError(f"{type(error).__name__}: {error}")
    sender.send(result)


def hardware(device: str) -> str:
    return torch.cuda.get_device_name(device)


def run(name: str, arguments: list[str], threads: int) -> dict[str, float]:
    """Run an example and return the figures that its `main` returns."""
    torch.set_num_threads(threads)
    sys.path.insert(0, str(FOLDER))
    print(f"\n{name} {shlex.join(arguments)}", flush=True)
    return importlib.import_module(name).main(arguments)


def row(name: str, found: dict[str, float] | Exception, seconds: float) -> str:
    if isinstance(found, Exception):
        message = " ".join(str(found).split()).replace("|", "/")[:200]
        cells = [message, *[""] * (len(COLUMNS) - 3)]
    else:
        sizes = ("stored_bytes", "inverted_bytes", "stored_peak_bytes", "inverted_peak_bytes")
        cells = [f"{found['error']:.1e}" if found["error"] else "0"]
        cells += [f"{found[key] / MIB:,.2f}" if key in found else "" for key in sizes]
        times = ("stored_ms", "inverted_ms")
        cells += [f"{found[key]:,.1f}" if key in found else "" for key in times]
        cells += [f"{found[key]:.3f}" if key in found else "" for key in ("first", "last")]
        cells += [f"{found['loop']:.1e}" if "loop" in found else ""]
    return f"| {' | '.join([name, *cells, f'{seconds:.1f}'])} |"


def head(options: argparse.Namespace) -> list[str]:
    size = "the size of the papers" if options.full else "toy size"
    steps = f"{options.steps} steps of training" if options.steps else "their own steps of training"
    return [
        *opening(
            f"What do the examples keep at {size}?",
            f"{options.hardware}; revnet {revnet.__version__}",
            f", {options.threads} thread{'s' * (options.threads > 1)}; after {steps}.",
        ),
        'One training step of each, forward and backward. "stored" is the same network with '
        '`execution="store"`; the difference is the largest relative one of a gradient to it. '
        "Kept for backward and peak are above the start of the step; a time is the least of two. "
        'The losses are the first one and the mean of the last five; "from float64" is the '
        "largest relative error of a gradient against a plain loop in float64.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]


def measured(report: Path | None) -> dict[str, str]:
    """Return the rows with figures of a report, by example; none if there is no report."""
    if report is None or not report.exists():
        return {}
    lines = report.read_text(encoding="utf-8").splitlines()
    if f"| {' | '.join(COLUMNS)} |" not in lines:
        raise SystemExit(f"{report} has other columns than {', '.join(COLUMNS)}")
    rows = {line.split(" | ")[0].lstrip("| "): line for line in lines if line.startswith("| ")}
    # The cell after the name is a number, or says what failed.
    number = re.compile(r"\| \w+ \| [\d.e+-]+ \|")
    return {name: row for name, row in rows.items() if number.match(row)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="the size of the papers")
    parser.add_argument("--steps", type=int, default=0, help="of training, instead of their own")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="EXAMPLE")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for each")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--hardware", help="as the report names it")
    parser.add_argument("--out", type=Path, help="write the report to this file")
    options = parser.parse_args()
    if options.hardware is None:
        cores = f"{os.cpu_count()} CPU cores"
        options.hardware = cores if options.device == "cpu" else apart(hardware, options.device)
    lines = head(options)
    known = measured(options.out)
    lines += known.values()
    print("\n".join(lines), flush=True)
    for name in options.only:
        if name in known:
            continue
        arguments = ["--device", options.device, *["--full"] * options.full]
        if options.steps and name in TRAINED:
            arguments += ["--steps", str(options.steps)]
        start = time.perf_counter()
        found = apart(run, name, arguments, options.threads, limit=options.limit)
        lines.append(row(name, found, time.perf_counter() - start))
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
