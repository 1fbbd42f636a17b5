"""Memory, time and gradient error of every execution of one network, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from rich.box import SIMPLE
from rich.progress import track
from rich.table import Table
from torch import Tensor

from revnet._sizes import format_bytes
from revnet.app.case import Case
from revnet.app.display import make_console
from revnet.app.errors import UserError, check_least
from revnet.app.measure import executed, step_memory
from revnet.app.model import Transformer, bits_per_token
from revnet.app.plots import figure, save_figure
from revnet.app.terminal import visible_line
from revnet.app.writing import new_file

CAPTION = (
    "Activations: above weights, gradients and optimizer. Ratios to stored execution. Error: of "
    "the gradient, relative to float64."
)
EXECUTIONS = ("stored", "checkpointed", "planned", "reversible")


@dataclass
class Row:
    """One execution at one depth: bytes, seconds per step, relative error of the gradient."""

    execution: str
    depth: int
    kept: int
    peak: int
    seconds: float
    error: float


def measure_case(case: Case, budget: str, repeats: int) -> list[Row]:
    """Measure all executions, timed in turn so that a busy moment touches all of them."""
    model = case.network()
    prefix, tokens = case.example()

    def loss() -> Tensor:
        with case.precision():
            return bits_per_token(model, prefix, tokens)

    exact = Transformer(model.shape, execution="checkpoint").to(case.device)
    exact.load_state_dict(model.state_dict())
    exact.double()
    bits_per_token(exact, prefix, tokens).backward()
    oracle = _gradient(exact)
    del exact
    (planned,) = case.make_plans(model, [budget])
    executions = {
        "stored": "stored",
        "checkpointed": "checkpointed",
        "planned": planned,
        "reversible": "invert",
    }
    rows = {}
    for name, execution in executions.items():
        with executed(model, execution):
            report = step_memory(model, loss)
            model.zero_grad()
            loss().backward()
            error = float((_gradient(model) - oracle).norm() / oracle.norm())
            model.zero_grad()
        rows[name] = Row(name, case.shape.depth, report.saved_bytes, report.peak_bytes, 0.0, error)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, execution in executions.items():
            with executed(model, execution):
                times[name].append(_seconds(lambda: loss().backward(), case.device))
    for name, row in rows.items():
        row.seconds = statistics.median(times[name])
    return list(rows.values())


def _gradient(model: Transformer) -> Tensor:
    """Return all gradients as one vector, float64."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def compare(case: Case, budget: str, repeats: int, out: str | None) -> int:
    """Print the table of the full depth, and draw memory and time against depth.

    Args:
        case: The network at its full depth, and its batch.
        budget: What "planned" may take, as for `revnet.plan`.
        repeats: Timed steps of each execution, of which the median counts.
        out: A PNG, or a markdown file for the table beside its PNG.
    """
    console = make_console("cannot show the table, but go on and save it")
    path = Path(out or "compare.png")
    check_least("repeats", repeats, 1)
    if path.suffix not in (".md", ".png"):
        raise UserError(
            f"--out {path}: give a file that ends in .md, for the table and the plot, or in .png"
        )
    depths = sorted({max(1, case.shape.depth * quarters // 4) for quarters in (1, 2, 3, 4)})
    rows: list[Row] = []
    for depth in track(
        depths, "measuring", console=console, transient=True, disable=not console.is_interactive
    ):
        rows += measure_case(case.of_depth(depth), budget, repeats)
    full = [row for row in rows if row.depth == depths[-1]]
    console.print(_table(str(case), full))
    plot_path = path.with_suffix(".png")
    with new_file(plot_path) as file:
        _plot_depths(file, rows, str(case))
    if path.suffix == ".md":
        with new_file(path) as file:
            file.write(_markdown(str(case), full, plot_path.name).encode())
    console.print(
        visible_line(f"Saved {path if path == plot_path else f'{path} and {plot_path}'}"),
        soft_wrap=True,
        markup=False,
    )
    return 0


HEADINGS = ("execution", "kept", "peak", "ratio", "time", "ratio", "error")


def _cells(rows: list[Row]) -> list[tuple[str, ...]]:
    stored = rows[0]
    return [
        (
            row.execution,
            format_bytes(row.kept),
            format_bytes(row.peak),
            f"{row.peak / stored.peak:.2f}",
            f"{row.seconds * 1000:.1f} ms" if row.seconds < 1 else f"{row.seconds:.2f} s",
            f"{row.seconds / stored.seconds:.2f}",
            f"{row.error:.1e}",
        )
        for row in rows
    ]


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, caption=CAPTION, title_style="bold", box=SIMPLE)
    table.title_justify = table.caption_justify = "left"
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for cells in _cells(rows):
        table.add_row(*cells)
    return table


def _markdown(title: str, rows: list[Row], picture: str) -> str:
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *_cells(rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    note = (
        "Kept: activations that wait for the backward pass; peak: the most that forward and "
        f"backward take. Checkpointed: each block by "
        f"torch.utils.checkpoint. {CAPTION}"
    )
    return (
        f"{title}, torch {torch.__version__}\n\n{table}\n\n{note}\n\n"
        f"![Memory and time against depth]({picture})\n"
    )


def _plot_depths(file: BinaryIO, rows: list[Row], title: str) -> None:
    plot = figure(9.0, 3.8)
    memory, seconds = plot.subplots(1, 2)
    for name in EXECUTIONS:
        chosen = [row for row in rows if row.execution == name]
        depths = [row.depth for row in chosen]
        style = {"marker": "o", "markersize": 4, "label": name}
        memory.plot(depths, [row.peak / 2**20 for row in chosen], **style)
        seconds.plot(depths, [row.seconds * 1000 for row in chosen], **style)
    memory.set(xlabel="depth (blocks)", ylabel="peak activation memory (MiB)")
    seconds.set(xlabel="depth (blocks)", ylabel="time of a step (ms)")
    for axes in (memory, seconds):
        axes.set_ylim(bottom=0)
        axes.set_xticks(depths)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    plot.suptitle(title, fontsize=9)
    save_figure(plot, file)
