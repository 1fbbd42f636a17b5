"""Plans: executions that fit a memory budget, with their predicted costs."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._errors import ReversibleError
from ._execution import resolve
from ._files import read_file, replace_file
from ._sizes import format_bytes


@dataclass(frozen=True, repr=False)
class Plan:
    """One execution per step, chosen for a memory budget by `revnet.plan`, with what it is predicted to cost.

    Attributes:
        executions: per step of the sequence, in order.
        names: per step, the block and branch.
        kept_bytes: per step, what stays of it on the device from its forward to its backward. A
            stream tensor that several steps keep counts for the first of them.
        peak_bytes: predicted peak of one forward and backward, above what was held before.
        seconds: predicted time of one forward and backward.
        stored_seconds: the same for stored execution.
        budget: bytes that were asked for.
        shape, dtype, device: of the input that the plan was made for.
        estimated: whether times follow from counts of floating-point operations, not from
            measurements.
    """

    executions: tuple[str, ...]
    names: tuple[str, ...]
    kept_bytes: tuple[int, ...]
    peak_bytes: int
    seconds: float
    stored_seconds: float
    budget: int
    shape: tuple[int, ...]
    dtype: str
    device: str
    estimated: bool = False

    @property
    def slowdown(self) -> float:
        """Predicted time relative to stored execution."""
        return self.seconds / self.stored_seconds if self.stored_seconds else 1.0

    def check_input(self, x: Tensor) -> None:
        """Raise unless `x` needs no more memory than the input that the plan was made for.

        Raises:
            ReversibleError: `x` is larger in some dimension, has another number of them, or a wider
                dtype.
        """
        wider = x.element_size() > getattr(torch, self.dtype).itemsize
        if (
            wider
            or x.dim() != len(self.shape)
            or any(n > limit for n, limit in zip(x.shape, self.shape, strict=True))
        ):
            raise ReversibleError(
                f"the input is {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}, larger than "
                f"{self.shape} {self.dtype}, for which the plan of {format_bytes(self.budget)} was "
                f"made. Make a plan with this input: net.execution = revnet.plan(net, x, budget)."
            )

    def for_steps(self, steps: int) -> tuple[str, ...]:
        """Return the executions, for a sequence of so many steps.

        Raises:
            ValueError: the plan was made for another number of steps.
        """
        if len(self.executions) != steps:
            raise ValueError(
                f"the plan was made for {len(self.executions)} steps, but this sequence has "
                f"{steps}: a plan fits one depth. Make one with revnet.plan(net, x, budget)."
            )
        return self.executions

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path` as JSON, entirely or not at all."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)
        with replace_file(Path(path)) as file:
            file.write(f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Return the plan that `save` wrote to `path`, which may come from anybody: it is only data.

        Raises:
            ValueError: the file holds something else.
            OSError: it cannot be read, or is not a file of at most 64 MiB.
        """
        content = read_file(Path(path), _LARGEST_FILE)
        try:
            found = json.loads(content.decode())
            if found.pop("format", None) != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            fields: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in found.items()
            }
            loaded = cls(**fields)
            loaded._check()
            return loaded
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)} is not a plan: {error}") from error

    def _check(self) -> None:
        """Raise unless all fields are of their types, lengths and ranges."""
        texts = *self.executions, *self.names, self.dtype, self.device
        counts = *self.kept_bytes, *self.shape, self.peak_bytes, self.budget
        times = self.seconds, self.stored_seconds
        lists = self.executions, self.names, self.kept_bytes, self.shape
        fields = (
            (lists, (tuple,)),
            (texts, (str,)),
            (counts, (int,)),
            (times, (int, float)),
            ((self.estimated,), (bool,)),
        )
        for values, types in fields:
            if not all(type(value) in types for value in values):
                raise ValueError("a field is of another type")
        if not all(0 <= number < math.inf for number in (*counts, *times)):
            raise ValueError("a number is negative, infinite or none")
        if not all(number < 2**63 for number in (*counts, *times)):
            raise ValueError("a number is 2^63 or more")
        if not len(resolve(self.executions, len(self.names))) == len(self.kept_bytes) > 0:
            raise ValueError("executions, names and kept_bytes differ in length, or are empty")
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype {self.dtype!r} is none of torch's floating-point types")

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.executions)} steps, {format_bytes(self.peak_bytes)} of "
            f"{format_bytes(self.budget)}, {self.slowdown:.3f} × stored)"
        )

    def __str__(self) -> str:
        """A table: the figures, then for each run of steps what is kept."""
        source = "estimated from FLOPs" if self.estimated else "measured"
        lines = [
            f"plan for {'×'.join(map(str, self.shape))} {self.dtype} on {self.device}: "
            f"{len(self.executions)} steps",
            f"budget          {format_bytes(self.budget):>12}",
            f"predicted peak  {format_bytes(self.peak_bytes):>12}",
            f"predicted time  {f'{1000 * self.seconds:.3g} ms':>12}   {self.slowdown:.3f} × stored "
            f"({source})",
        ]
        lines += ["", f"{'steps':<28}{'execution':<12}{'kept per step':>14}{'kept in all':>14}"]
        for steps, execution, kept in self._rows():
            each = "–" if len(set(kept)) > 1 else format_bytes(kept[0])
            lines.append(f"{steps:<28}{execution:<12}{each:>14}{format_bytes(sum(kept)):>14}")
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Runs of blocks that are executed alike, a row for each of their branches."""
        steps = list(zip(self.names, self.executions, self.kept_bytes, strict=True))
        blocks = [
            list(block) for _, block in groupby(steps, key=lambda step: _NUMBER.findall(step[0]))
        ]
        rows = []
        for _alike, run in groupby(
            blocks, key=lambda block: [(_NUMBER.sub("", name), how) for name, how, _ in block]
        ):
            for branch in zip(*run, strict=True):
                names, executions, kept = zip(*branch, strict=True)
                numbers = [
                    number for name in (names[0], names[-1]) for number in _NUMBER.findall(name)[:1]
                ]
                rows.append(
                    (_NUMBER.sub("–".join(dict.fromkeys(numbers)), names[0]), executions[0], kept)
                )
        return rows


_FORMAT = "revnet plan 1"
# A plan of a million steps takes about as much.
_LARGEST_FILE = 2**26
_NUMBER = re.compile(r"[0-9]+")
