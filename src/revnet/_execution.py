"""How each step is executed: what stays of it until backward, and how its target comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ExecutionName = Literal["store", "select", "checkpoint", "offload", "invert"]


@dataclass(frozen=True)
class Execution:
    """One way to execute a step.

    Attributes:
        name: what users call it.
        rebuilds: whether backward evaluates the branch again, so that its activations are freed.
        keeps_results: keep the results of matrix products and attention, and replay the rest.
        keeps_target: keep the target stream instead of undoing the step, or what the step reads.
        on_host: keep that target in pinned host memory.
        prefetch: how many steps ahead of backward a target starts on its way from the host.
    """

    name: str
    rebuilds: bool = True
    keeps_results: bool = False
    keeps_target: bool = False
    on_host: bool = False
    prefetch: int = 0


STORE = Execution("store", rebuilds=False)
INVERT = Execution("invert")
OFFLOAD = Execution("offload", keeps_target=True, on_host=True, prefetch=2)

BY_NAME = {
    execution.name: execution
    for execution in (
        STORE,
        Execution("select", keeps_results=True),
        Execution("checkpoint", keeps_target=True),
        OFFLOAD,
        INVERT,
    )
}
EXECUTIONS = tuple(BY_NAME)


def resolve(
    execution: str | Sequence[str], steps: int, allowed: Sequence[str] = EXECUTIONS
) -> list[Execution]:
    """Return one execution per step.

    Args:
        execution: the name of one for all steps, or one name per step.
        steps: number of steps.
        allowed: the names that may be given.

    Raises:
        ValueError: a name is unknown here, or the number of names is not the number of steps.
    """
    names = [execution] * steps if isinstance(execution, str) else list(execution)
    for name in names:
        if name not in allowed:
            raise ValueError(f"execution {name!r} is not one of {', '.join(map(repr, allowed))}")
    if len(names) != steps:
        raise ValueError(
            f"execution names {len(names)} steps, but there are {steps}: two per block, f before g"
        )
    return [BY_NAME[name] for name in names]
