"""Plans: executions that fit a memory budget, with their predicted costs."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import le
from pathlib import Path
from typing import Any

import torch

from ._errors import ReversibleError
from ._execution import resolve
from ._files import read_file, replace_file
from ._sizes import format_bytes
from ._trees import tree_leaves


@dataclass(frozen=True, repr=False)
class Plan:
    """One execution per step, chosen by `revnet.plan` for a memory budget, with predicted costs.

    Attributes:
        executions: per step of the sequence, in order.
        names: per step, the block and branch.
        kept_bytes: per step, the bytes on the device that it keeps from its forward to its
            backward. A stream tensor that several steps keep counts for the first of them.
        peak_bytes: predicted peak of activations in one forward and backward: above parameters,
            their gradients, the optimizer's state and the input.
        seconds: predicted time of one forward and backward.
        stored_seconds: the same for stored execution, in the fastest of the tiles to choose among.
        budget: bytes that were asked for, for the same.
        shape, dtype, device: of the input that the plan was made for, or of its first tensor.
        estimated: whether times follow from counts of floating-point operations, not from
            measurements.
        streams: shape and dtype of every tensor of the streams that the plan was made for. Where
            empty, all are like the input.
        tile: tokens in a tile of each tiled step, 0 where the plan did not choose that.
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
    streams: tuple[tuple[tuple[int, ...], str], ...] = ()
    tile: int = 0

    @property
    def slowdown(self) -> float:
        """Return the predicted time relative to stored execution."""
        return self.seconds / self.stored_seconds if self.stored_seconds else 1.0

    def check_input(self, *streams: Any) -> None:
        """Raise if the input needs more memory than the input that the plan was made for.

        Args:
            streams: the input of the sequence, or all streams: tensors or trees of tensors.

        Raises:
            ReversibleError: a tensor is larger in some dimension, has another number of dimensions
                or a wider dtype, or there are more tensors.
        """
        leaves = [leaf for stream in streams for leaf in tree_leaves(stream)]
        known = [(self.shape, self.dtype)]
        if len(leaves) > 1:
            known = list(self.streams) or known * len(leaves)
        if len(leaves) > len(known):
            raise self._too_large(f"the streams are {len(leaves)} tensors, more than {len(known)}")
        for i, (leaf, (shape, dtype)) in enumerate(zip(leaves, known, strict=False)):
            fits = leaf.dim() == len(shape) and all(map(le, leaf.shape, shape))
            if not fits or leaf.element_size() > getattr(torch, dtype).itemsize:
                name = "the input" if len(leaves) == 1 else f"tensor {i} of the streams"
                raise self._too_large(
                    f"{name} is {tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}, "
                    f"larger than {shape} {dtype}"
                )

    def _too_large(self, problem: str) -> ReversibleError:
        return ReversibleError(
            f"{problem}, for which the plan of {format_bytes(self.budget)} was made. Make a plan "
            f"with this input: net.execution = revnet.plan(net, x, budget)."
        )

    def for_steps(self, steps: int) -> tuple[str, ...]:
        """Return the executions for a sequence of this many steps.

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
        """Return the plan that `save` wrote to `path`. It is read as data, whoever wrote it.

        Raises:
            ValueError: the file holds something else.
            OSError: it cannot be read, or is not a file of at most 64 MiB.
        """
        content = read_file(Path(path), _LARGEST_FILE)
        try:
            fields = json.loads(content.decode())
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
            if fields.pop("format", None) != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            loaded = cls(**{name: _as_tuples(value) for name, value in fields.items()})
            loaded._check()
            return loaded
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)} is not a plan: {error}") from error

    def _check(self) -> None:
        """Raise unless all fields have their types and agree with each other."""
        _check_entries(str, executions=self.executions, names=self.names)
        _check_entries(str, dtype=(self.dtype,), device=(self.device,))
        _check_entries(bool, estimated=(self.estimated,))
        _check_counts(kept_bytes=self.kept_bytes, shape=self.shape)
        _check_counts(peak_bytes=(self.peak_bytes,), budget=(self.budget,), tile=(self.tile,))
        _check_counts(float, seconds=(self.seconds,), stored_seconds=(self.stored_seconds,))
        dtypes = [self.dtype]
        for shape, dtype in self.streams:
            _check_counts(streams=shape)
            _check_entries(str, streams=(dtype,))
            dtypes.append(dtype)
        for dtype in dtypes:
            found = getattr(torch, dtype, None)
            if not isinstance(found, torch.dtype) or not found.is_floating_point:
                raise ValueError(f"`dtype` must be a floating-point dtype of torch, got {dtype!r}")
        steps = len(resolve(self.executions, len(self.names)))
        if steps == 0 or steps != len(self.kept_bytes):
            raise ValueError(
                f"`executions`, `names` and `kept_bytes` must have the same length, at least 1, "
                f"got {steps}, {len(self.names)} and {len(self.kept_bytes)}"
            )

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.executions)} steps, {format_bytes(self.peak_bytes)} of "
            f"{format_bytes(self.budget)}, {self.slowdown:.3f} × stored)"
        )

    def __str__(self) -> str:
        """Return a table: the figures, then for each run of like steps the bytes kept."""
        source = "estimated from FLOPs" if self.estimated else "measured"
        lines = [
            f"plan for {'×'.join(map(str, self.shape))} {self.dtype} on {self.device}: "
            f"{len(self.executions)} steps",
            f"budget          {format_bytes(self.budget):>12}   activations above weights, "
            f"gradients, optimizer",
            f"predicted peak  {format_bytes(self.peak_bytes):>12}",
            f"predicted time  {f'{1000 * self.seconds:.3g} ms':>12}   {self.slowdown:.3f} × stored "
            f"({source})",
        ]
        if self.tile:
            lines.append(f"tiles           {self.tile:>12}   tokens")
        lines += ["", f"{'steps':<28}{'execution':<12}{'kept per step':>14}{'kept in all':>14}"]
        for steps, execution, kept in self._rows():
            each = "–" if len(set(kept)) > 1 else format_bytes(kept[0])
            lines.append(f"{steps:<28}{execution:<12}{each:>14}{format_bytes(sum(kept)):>14}")
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Group consecutive blocks that are executed alike: one row for each of their branches."""
        steps = list(zip(self.names, self.executions, self.kept_bytes, strict=True))
        blocks = [
            list(block) for _, block in groupby(steps, key=lambda step: _NUMBER.findall(step[0]))
        ]
        rows = []
        for _, run in groupby(blocks, key=_without_numbers):
            for branch in zip(*run, strict=True):
                names, executions, kept = zip(*branch, strict=True)
                ends = [_NUMBER.findall(name)[:1] for name in (names[0], names[-1])]
                numbers = dict.fromkeys(itertools.chain(*ends))
                rows.append((_NUMBER.sub("–".join(numbers), names[0]), executions[0], kept))
        return rows


_FORMAT = "revnet plan 1"
# A plan of a million steps takes about as much.
_LARGEST_FILE = 2**26
_NUMBER = re.compile(r"[0-9]+")


def _without_numbers(block: list[tuple[str, str, int]]) -> list[tuple[str, str]]:
    """Return the names and executions of a block's steps, without the block's number."""
    return [(_NUMBER.sub("", name), execution) for name, execution, _ in block]


def _as_tuples(value: Any) -> Any:
    """Return a value of JSON with tuples in place of lists."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _check_entries(kind: type, **fields: Any) -> None:
    """Raise unless each field is a tuple whose entries are of one type."""
    for name, values in fields.items():
        if type(values) is not tuple:
            raise ValueError(f"`{name}` must be a list, got {values!r}")
        for value in values:
            # A bool is an int to isinstance.
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"`{name}` must be of type {kind.__name__}, got {value!r}")


def _check_counts(kind: type = int, **fields: Any) -> None:
    """Raise unless each field is a tuple of numbers that are finite and non-negative."""
    _check_entries(kind, **fields)
    for name, values in fields.items():
        for value in values:
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be finite and non-negative, got {value}")
            if value >= 2**63:
                raise ValueError(f"`{name}` must be below 2^63")
