"""Show the progress of a training: a live line in a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from revnet.app.terminal import Output

PLAIN_SECONDS = 10


def make_console(given_up: str, quiet: bool = False) -> Console:
    """Return a console that writes to the standard output as long as it can.

    Args:
        given_up: What is said on the standard error when it no longer can.
        quiet: Write nothing.
    """
    # What looks like an emoji is a name. The annotation of Console wants a whole file.
    file = cast(Any, Output(sys.stdout, given_up))
    return Console(file=file, quiet=quiet, highlight=False, emoji=False)


class Display:
    """Progress of a run; use as a context.

    Args:
        steps: Steps in all.
        unit: What a token is, such as "image token".
        done: Steps that were taken before.
        quiet: Show nothing, as all ranks but the first do.
    """

    def __init__(self, steps: int, unit: str, done: int = 0, quiet: bool = False) -> None:
        self.console = make_console("cannot show progress any more, but go on and save", quiet)
        self.unit = unit
        self.steps = steps
        self._printed = 0.0
        self._held_out = ""
        self._began = time.monotonic(), done
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
        self._task = self._progress.add_task(
            "train", total=steps, completed=done, found="", start=False
        )

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

    def say(self, text: str, wrap: bool = False) -> None:
        """Print a line that stays; where it shall `wrap`, a terminal breaks it between words."""
        self.console.print(text, soft_wrap=not (wrap and self.console.is_terminal))

    def held_out(self, bits: float) -> None:
        """Take note of the loss of held-out examples."""
        self._held_out = f"{bits:.3f}"

    @contextmanager
    def working(self, on: str) -> Iterator[None]:
        """Show what takes a while after the last step."""
        if self.console.is_interactive:
            with self.console.status(f"{on} …"):
                yield
            return
        self.say(f"{on} …")
        yield

    def reach(self, step: int) -> None:
        """Move the bar to where an interrupted training ends."""
        self._progress.update(self._task, completed=step)

    def step(self, step: int, bits: float, rate: float, last: bool) -> None:
        """Show progress after `step` steps; in a pipe one line every ten seconds."""
        self._progress.start_task(self._task)
        held_out = f" ({self._held_out} held out)" if self._held_out else ""
        self._progress.update(
            self._task,
            completed=step,
            found=f"[bold]{bits:.3f}[/] bits/token{held_out} [dim]{rate:,.0f} tokens/s",
        )
        if not self.console.is_interactive and (
            last or time.monotonic() - self._printed >= PLAIN_SECONDS
        ):
            self._printed = time.monotonic()
            self.say(
                f"step {step}/{self.steps}  {bits:.3f} bits per {self.unit}{held_out}  "
                f"{rate:,.0f} tokens/s{self._time_left(step)}"
            )

    def _time_left(self, step: int) -> str:
        began, done = self._began
        if step <= done or step >= self.steps:
            return ""
        seconds = (time.monotonic() - began) / (step - done) * (self.steps - step)
        return f"  {timedelta(seconds=round(seconds))} left"
