"""From a memory budget to the fastest plan.

A plan comes about in three moves. `_rehearsal` measures what one step of each kind costs under each
execution: a `Chain`, numbers alone. `_solver` finds the fastest executions whose peak, by these
numbers, is within the budget. Then the whole sequence runs once as proposed: what its peak is more
or less than was predicted is added to the chain, and the rest solved again. The plan is the fastest
of those that were run and fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, overload

import torch
import torch.distributed as dist

from .._errors import ReversibleError
from .._plan import Plan
from .._program import Program
from .._sizes import format_bytes, free_bytes, parse_bytes
from .costs import Rehearsal, rehearsing
from .solver import Solution, minimum, simulate, solve

Budget = int | str | None


@overload
def plan(net: Program, x: Any, budget: Budget = None, **kwargs: Any) -> Plan: ...


@overload
def plan(net: Program, x: Any, budget: Sequence[int | str], **kwargs: Any) -> list[Plan]: ...


def plan(net: Any, x: Any, budget: Any = None, **kwargs: Any) -> Any:
    """The fastest plan for `net` whose peak memory stays within a budget.

    Runs steps of `net` on `x`, where they are, under each execution, and measures bytes and
    seconds; then chooses one execution per step. Parameters, gradients, buffers, training flags and
    the states of the generators stay as they are. Costs the time of a few steps of each kind (steps
    of the same shape are measured once) and of one pass over the whole sequence to check the
    result.

    With fake tensors, or parameters on the meta device, nothing is allocated: bytes follow from the
    sizes of tensors and times from their number of floating-point operations, which the plan says.

    In a process group every rank calls this, and gets the same plan, for the largest costs among
    the ranks.

    Args:
        net: a sequence.
        x: its input, of the largest size that the plan is for: a tensor, or for `Reversible` the
            tuple of its streams.
        budget: bytes at the peak of one forward and backward, above what is held before
            (parameters, gradients that exist, `x`): a number; text such as "8GiB"; "minimum", the
            smallest peak that any plan has; "stored", that of stored execution; "25%", that share
            of the way from the one to the other; or None, what the device has free now. A sequence
            of budgets is measured once and gives one plan each.
        **kwargs: the keywords of the forward pass.

    Returns:
        A plan: `net.execution = plan` switches to it.

    Raises:
        ReversibleError: no plan is within the budget; the message says the smallest one possible.
        RuntimeError: under `torch.inference_mode`, which allows no training step.
        ValueError: a budget that is no size.

    Example:
        >>> net = revnet.ReversibleSequence([(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)])
        >>> net.execution = revnet.plan(net, torch.randn(2, 8), "stored")
    """
    if not isinstance(net, Program):
        raise TypeError(f"net is {type(net).__name__}, but a plan is for a revnet sequence")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "revnet.plan runs training steps, which torch.inference_mode forbids: call it outside"
        )
    many = isinstance(budget, Sequence) and not isinstance(budget, str)
    budgets = [_read(one) for one in (budget if many else [budget])]
    with torch.enable_grad(), rehearsing(net, x, kwargs) as rehearsal:
        plans = _Planner(rehearsal).plans(budgets)
    return plans if many else plans[0]


def _read(budget: Budget) -> int | float | None:
    """A number of bytes, a share of the way from the minimum to stored, or None."""
    if budget in ("minimum", "stored"):
        return float(budget == "stored")
    if isinstance(budget, str) and budget.endswith("%"):
        try:
            share = float(budget[:-1]) / 100
        except ValueError:
            share = math.nan
        if not math.isfinite(share):
            raise ValueError(f"{budget!r} is not a share: write it as '25%'")
        return share
    return None if budget is None else parse_bytes(budget)


# Runs in search of the plan for one budget.
_RUNS = 5


class _Planner:
    """The model of memory proposes plans, and a run of each shows its peak."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal
        chains = _gather(rehearsal.chain())
        self.chain = chains[0]
        if any(
            (chain.steps, chain.sizes) != (self.chain.steps, self.chain.sizes) for chain in chains
        ):
            raise ReversibleError(
                "the ranks of the process group plan for different sequences or inputs"
            )
        # What ran, with the peak of the run.
        self.seen: dict[tuple[str, ...], Solution] = {}

    def plans(self, budgets: Sequence[int | float | None]) -> list[Plan]:
        sizes = [self.size(budget) for budget in budgets]
        for size in sizes:
            self.fit(size)
        return [self.fastest(size) for size in sizes]

    def size(self, budget: int | float | None) -> int:
        """A budget in bytes."""
        if budget is None:
            return int(min(_gather(free_bytes(self.rehearsal.x.device))))
        if isinstance(budget, int):
            return budget
        return round(
            self.least + budget * (max(self.run(self.stored).peak, self.least) - self.least)
        )

    @cached_property
    def least(self) -> int:
        """The smallest peak that any plan has."""
        self.fit(None)
        # A run can take less than the model said, and so can its neighbours.
        self.fit(min(solution.peak for solution in self.seen.values()))
        return min(solution.peak for solution in self.seen.values())

    @cached_property
    def stored(self) -> Solution:
        return simulate(self.chain, ["store"] * len(self.chain.steps))

    def fit(self, size: int | None) -> None:
        """Find the fastest plan within `size` bytes or, without a size, the one with the smallest peak.

        What a run takes more or less than the model said is added to the model, and the rest solved
        again.
        """
        chain = self.chain
        for _ in range(_RUNS):
            limit = minimum(chain) if size is None else size
            solution = solve(chain, limit)
            if solution is None:
                return
            off = self.run(solution).peak - solution.peak
            if off == 0 or -0.01 * limit <= off <= limit - solution.peak:
                return
            if off > 0 and "offload" in solution.executions:
                # How long a copy holds its tensor depends on how far the host runs ahead: no budget
                # can be promised.
                kinds = [
                    {name: cost for name, cost in kind.items() if name != "offload"}
                    for kind in chain.kinds
                ]
                self.chain = replace(self.chain, kinds=tuple(kinds))
                chain = replace(chain, kinds=tuple(kinds))
            else:
                chain = replace(chain, overhead=chain.overhead + off)

    def run(self, solution: Solution) -> Solution:
        """The solution with the largest peak that it has in runs, on all ranks."""
        executions = solution.executions
        if executions not in self.seen:
            peak = simulate(self.chain, executions).peak
            if self.rehearsal.mode is None:
                runs = 3 if "offload" in executions else 1
                peak = max(_gather(max(self.rehearsal.peak(executions) for _ in range(runs))))
            self.seen[executions] = solution._replace(peak=peak)
        return self.seen[executions]

    def fastest(self, size: int) -> Plan:
        if all(solution.peak > size for solution in self.seen.values()) and self.least > size:
            raise ReversibleError(
                f"no plan is within {format_bytes(size)} ({size} bytes): the smallest peak of this "
                f"sequence, for this input, is {format_bytes(self.least)} ({self.least} bytes). "
                f"Give at least that, or a smaller input."
            )
        # The search for the smallest peak may have run more plans.
        fitting = [solution for solution in self.seen.values() if solution.peak <= size]
        solution = min(fitting, key=lambda solution: (solution.time, solution.peak))
        rehearsal = self.rehearsal
        return Plan(
            executions=solution.executions,
            names=tuple(part.name for part in rehearsal.parts),
            kept_bytes=solution.kept,
            peak_bytes=solution.peak,
            seconds=solution.time / 1e9,
            stored_seconds=self.stored.time / 1e9,
            budget=size,
            shape=tuple(rehearsal.x.shape),
            dtype=str(rehearsal.x.dtype).removeprefix("torch."),
            device=_gather(rehearsal.label)[0],
            estimated=rehearsal.mode is not None,
        )


def _gather(value: Any) -> list[Any]:
    """`value` of every rank; alone where there is no process group."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
