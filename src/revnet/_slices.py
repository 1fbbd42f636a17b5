"""Slices of programs: the same modules, under settings of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import nn

from ._state.structure import Memory
from ._streams.monitor import RangeMonitor

P = TypeVar("P", bound=nn.Module)


def part_of(program: Any, kind: type[P], steps: Sequence[int]) -> P:
    """Return a program of some steps of another one, still without its modules.

    It has the options of `program` and the executions of these steps, in settings of its own:
    what is set there later changes neither program nor slice. Hooks stay with `program`.

    Args:
        program: the whole.
        kind: class of the part. Its constructor does not run: a subclass may have another one.
        steps: indices of the steps of `program`.

    Raises:
        ValueError: no steps.
    """
    if not steps:
        raise ValueError(f"this slice of {len(program)} is empty: a program has at least one step")
    part: Any = kind.__new__(kind)
    nn.Module.__init__(part)
    own = vars(part)
    own.update({name: value for name, value in vars(program).items() if name not in own})
    part.training = program.training
    settings = program._settings
    executions = [settings.executions[step] for step in steps]
    execution = settings.execution
    if not isinstance(execution, str):
        execution = [execution.name for execution in executions]
    part._settings = replace(
        settings, executions=executions, execution=execution, warned=False, looked=False
    )
    part._count = len(steps)
    # They number the steps and the modules of one program.
    part._monitor, part._memory = RangeMonitor(), Memory()
    return cast(P, part)
