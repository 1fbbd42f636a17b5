"""What a training run shows: a live line in a terminal, plain lines in a pipe, and the closing tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from revnet.app.terminal import Output

if TYPE_CHECKING:
    from revnet.app.report import MemoryRow

PLAIN_SECONDS = 10


class Display:
    """Progress of a run; use as a context.

    Args:
        steps: Steps in all.
        unit: What a token is, such as "image token".
        quiet: Show nothing, as all ranks but the first do.
    """

    def __init__(self, steps: int, unit: str, quiet: bool = False) -> None:
        output = Output(sys.stdout, "cannot show progress any more, but go on and save")
        # Text that looks like markup or an emoji is a name; rich types the file as a whole IO.
        self.console = Console(file=cast(Any, output), quiet=quiet, highlight=False, emoji=False)
        self.unit = unit
        self.steps = steps
        self._printed = 0.0
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[found]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
            refresh_per_second=4,
            disable=not self.console.is_interactive,
        )
        self._task = self._progress.add_task("train", total=steps, found="", start=False)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True)

    def step(self, step: int, bits: float, rate: float, last: bool) -> None:
        """Progress after `step` steps; in a pipe one line every ten seconds."""
        self._progress.start_task(self._task)
        self._progress.update(
            self._task,
            completed=step,
            found=f"[bold]{bits:.3f}[/] bits/token [dim]{rate:,.0f} tokens/s",
        )
        if not self.console.is_interactive and (
            last or time.monotonic() - self._printed >= PLAIN_SECONDS
        ):
            self._printed = time.monotonic()
            self.say(
                f"step {step}/{self.steps}  {bits:.3f} bits per {self.unit}  {rate:,.0f} tokens/s"
            )


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """Activation memory of each execution, the run's own last."""
    table = Table(
        title="Activation memory of one training step",
        title_justify="left",
        title_style="bold",
        box=SIMPLE,
    )
    table.add_column("execution")
    for name in ("kept for backward", "peak", "peak / stored"):
        table.add_column(name, justify="right")
    stored = next(row.peak for row in rows if row.name == "stored")
    for row in rows:
        about = "about " if row.estimated else ""
        name = f"[bold]{row.name}[/] (this run)" if row is rows[-1] else row.name
        table.add_row(
            name, about + size(row.kept), about + size(row.peak), f"{row.peak / stored:.2f}"
        )
    return table


def size(count: float) -> str:
    """Bytes as text, such as 12.3 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
