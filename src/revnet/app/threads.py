"""How many CPU threads a training takes, and whether the cores are overloaded."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import torch

# From this share of the time on, waiting for a core is worth a line.
OVERLOADED = 0.4
# Seconds over which that is judged.
WINDOW = 10.0


def set_threads(wanted: int | None) -> int:
    """Set torch's threads to those that are `wanted`, or leave its own; return the number."""
    if wanted is not None:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


def seconds_without_core() -> float | None:
    """Return how long the main thread has been ready to run and waited, where that is known."""
    with suppress(OSError, ValueError, IndexError):
        # Linux: nanoseconds on a core, nanoseconds that it waited for one, and time slices.
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return None


class Watch:
    """Says once when other processes keep the cores from this one."""

    def __init__(self) -> None:
        self._said = False
        self._began, self._before = time.monotonic(), seconds_without_core()

    def advice(self) -> str | None:
        """Return a sentence when the last ten seconds were overloaded, once."""
        passed = time.monotonic() - self._began
        if self._said or passed < WINDOW:
            return None
        now = seconds_without_core()
        if now is None or self._before is None:
            return None
        share = (now - self._before) / passed
        self._began, self._before = time.monotonic(), now
        if share < OVERLOADED:
            return None
        self._said = True
        return (
            f"The cores are overloaded: this training waits for one {share:.0%} of the time. It "
            f"would be faster without the other processes."
        )
