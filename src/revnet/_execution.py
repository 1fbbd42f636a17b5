"""How each step is executed: what stays of it until backward."""

from __future__ import annotations

from collections.abc import Sequence

EXECUTIONS = ("store", "checkpoint", "invert")


def resolve(execution: str | Sequence[str], steps: int, allowed: Sequence[str] = EXECUTIONS) -> list[str]:
    """One execution per step.

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
        raise ValueError(f"execution names {len(names)} steps, but there are {steps}: two per block, f before g")
    return names
