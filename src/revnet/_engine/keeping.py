"""What a step keeps for its replay: its target, what it reads, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._execution import Execution
from .._kept import Hosted, Saved
from .._step import BoundStep, hands_on
from .._trees import tree_leaves
from .tape import Tape


def reads_alone(tape: Tape, executions: Sequence[Execution], index: int, step: BoundStep) -> bool:
    """Check whether to keep what a step reads, not its target with the bits that belong to it.

    Its replay then needs no walk. If steps below are to be undone, the streams between are saved,
    which costs more than one target: only where the next steps need no walk either.

    Args:
        tape: that of the call, before the step.
        executions: those of the program.
        index: of the step.
        step: the step, whose execution keeps the target.
    """
    if executions[index].on_host or not (step.coupling.scales and tape.arithmetic.exact):
        return False
    following = executions[index + 1 : index + 3]
    return not tape.follows_rebuilt() or all(
        each.keeps_target or not each.rebuilds for each in following
    )


def kept_target(
    tape: Tape, execution: Execution, step: BoundStep, encoded: Any, capturing: bool
) -> Saved | Hosted | None:
    """Keep the target before a step; return None where the step is undone.

    Args:
        tape: that of the call.
        execution: of the step.
        step: the step.
        encoded: how its target is held.
        capturing: whether a CUDA graph is captured, from which nothing goes to the host.
    """
    if not execution.keeps_target and step.coupling.translates and step.target not in step.source:
        # Most steps.
        return None
    on_host = execution.on_host and not capturing
    if on_host and all(leaf.is_cuda for leaf in tree_leaves(encoded)):
        return Hosted(encoded)
    exact = tape.arithmetic.exact
    rebuilt = not execution.keeps_target or (exact and hands_on(step.fn))
    if not rebuilt or step.target in step.source:
        return Saved(encoded)
    # What only adds to the target is undone in every arithmetic.
    if step.coupling.translates or tape.arithmetic.undoes(step.coupling):
        return None
    return Saved(encoded)
