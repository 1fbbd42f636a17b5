"""Memory, time and gradient error of every execution of one network, on this machine."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import revnet
from revnet.app.config import TrainConfig, heads_of, width_of
from revnet.app.device import find_device
from revnet.app.display import size
from revnet.app.errors import UserError
from revnet.app.measure import executed, step_memory
from revnet.app.model import Shape, Transformer, bits_per_token
from revnet.app.plots import figure, save_figure
from revnet.app.run import Run, replacing

EXECUTIONS = ("stored", "checkpointed", "planned", "reversible")
VOCAB = 256


@dataclass
class Case:
    """What is compared: sizes, and where they run.

    Args:
        shape: The network at its full depth; a text network of byte tokens unless it is that of a run.
        batch: Examples per step.
        device, dtype: As for `revnet train`.
        budget: What "planned" may take, as for `revnet.plan`.
        repeats: Timed steps, of which the median counts.
    """

    shape: Shape
    batch: int
    device: torch.device
    dtype: str
    streams: str
    budget: str
    repeats: int


@dataclass
class Row:
    """One execution at one depth: bytes, seconds per step, and the relative error of the gradient."""

    execution: str
    depth: int
    kept: int
    peak: int
    seconds: float
    error: float


def case_of(
    run: str | None, depth: int, width: int | None, tokens: int, batch: int | None, device: str, **more: Any
) -> Case:
    """The sizes of a run, or those that are given."""
    if run is not None:
        config = Run.open(run).read_json("config.json")
        return Case(Shape(**config["shape"]), batch or config["batch"], find_device(device), **more)
    config = TrainConfig(depth=depth, width=width or width_of(depth))
    shape = Shape(depth, config.width, heads_of(config.width), 2, 1, VOCAB, tokens, 1)
    return Case(shape, batch or 4, find_device(device), **more)


def measure(case: Case, depth: int) -> list[Row]:
    """All executions at one depth, timed in turn so that a busy moment touches all of them."""
    torch.manual_seed(0)
    shape = replace(case.shape, depth=depth, dropout=0.0)
    model = Transformer(shape, streams=case.streams).to(case.device)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    prefix = torch.ones(case.batch, shape.prefix_length, dtype=torch.int64, device=case.device)
    tokens = torch.randint(shape.vocab, (case.batch, shape.length), device=case.device)

    def loss(network: Transformer = model) -> Tensor:
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            return bits_per_token(network, prefix, tokens)

    exact = copy.deepcopy(model).double()
    exact.layers.execution = "checkpoint"
    bits_per_token(exact, prefix, tokens).backward()
    oracle = _gradient(exact)
    del exact
    x, keywords = model.embed(prefix, tokens[:, :-1])
    with torch.autocast(case.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
        planned = revnet.plan(model.layers, x.detach(), case.budget, **keywords)
    executions = {"stored": "stored", "checkpointed": "checkpointed", "planned": planned, "reversible": "invert"}
    rows = {}
    for name, execution in executions.items():
        with executed(model, execution):
            report = step_memory(model, loss)
            model.zero_grad()
            loss().backward()
            error = float((_gradient(model) - oracle).norm() / oracle.norm())
            model.zero_grad()
        rows[name] = Row(name, depth, report.saved_bytes, report.peak_bytes, 0.0, error)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(case.repeats):
        for name, execution in executions.items():
            with executed(model, execution):
                times[name].append(_seconds(lambda: loss().backward(), case.device))
    for name, row in rows.items():
        row.seconds = statistics.median(times[name])
    return list(rows.values())


def _gradient(model: Transformer) -> Tensor:
    """All gradients as one vector, float64."""
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


def compare(case: Case, out: str | None) -> int:
    """Prints the table of the full depth, and draws memory and time against depth."""
    console = Console(highlight=False)
    path = Path(out or "compare.png")
    if path.suffix not in (".md", ".png"):
        raise UserError(f"--out {path}: give a file that ends in .md, for the table and the plot, or in .png")
    depths = sorted({max(1, case.shape.depth * quarters // 4) for quarters in (1, 2, 3, 4)})
    rows: list[Row] = []
    for depth in track(depths, "measuring", console=console, transient=True, disable=not console.is_terminal):
        rows += measure(case, depth)
    full = [row for row in rows if row.depth == depths[-1]]
    shape = case.shape
    title = (
        f"depth {shape.depth}, width {shape.width}, {shape.prefix_length - 1 + shape.length} tokens, "
        f"batch {case.batch}, {case.dtype}, {_machine(case.device)}"
    )
    console.print(_table(title, full))
    plot_path = path.with_suffix(".png")
    _plot(plot_path, rows, title)
    if path.suffix == ".md":
        with replacing(path) as file:
            file.write(_markdown(title, full, plot_path.name).encode())
    console.print(f"Saved {path if path == plot_path else f'{path} and {plot_path}'}", soft_wrap=True)
    return 0


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.machine()}"


HEADINGS = ("execution", "kept", "peak", "/ stored", "time", "/ stored", "error")


def _cells(rows: list[Row]) -> list[tuple[str, ...]]:
    stored = rows[0]
    return [
        (
            row.execution,
            size(row.kept),
            size(row.peak),
            f"{row.peak / stored.peak:.2f}",
            f"{row.seconds * 1000:,.1f} ms",
            f"{row.seconds / stored.seconds:.2f}",
            f"{row.error:.1e}",
        )
        for row in rows
    ]


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for cells in _cells(rows):
        table.add_row(*cells)
    return table


def _markdown(title: str, rows: list[Row], picture: str) -> str:
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *_cells(rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    note = (
        "Kept: activations that wait for the backward pass; peak: the most that forward and backward take beyond "
        "parameters and gradients. Checkpointed: each block by torch.utils.checkpoint. Error: of the gradient, "
        "relative to the same network in float64."
    )
    return f"{title}, torch {torch.__version__}\n\n{table}\n\n{note}\n\n![Memory and time against depth]({picture})\n"


def _plot(path: Path, rows: list[Row], title: str) -> None:
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
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    plot.suptitle(title, fontsize=9)
    save_figure(plot, path)
