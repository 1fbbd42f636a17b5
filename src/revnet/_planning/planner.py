"""From a memory budget to the fastest plan.

Planning has three stages: measure, solve, verify. `costs` measures what one step of each kind costs
under each execution, and makes of it a `Chain`: numbers alone. `solver` finds the fastest
executions whose peak is within the budget by these numbers. Then the whole sequence runs once as
proposed: the bytes by which its peak differs from the prediction are added to the chain, which is
solved again. The plan is the fastest of those that were run and fit.
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
from .._execution import BY_NAME, STORE
from .._plan import Plan
from .._program import Program
from .._sizes import format_bytes, free_bytes, parse_bytes
from .._tile import Tile
from .costs import Measurement
from .solver import Chain, Solution, minimum, simulate, solve
from .stand_ins import stand_ins

Budget = int | str | None


@overload
def plan(
    net: Program, x: Any, budget: Budget = None, *, tile_sizes: Sequence[int] = (), **kwargs: Any
) -> Plan: ...


@overload
def plan(
    net: Program,
    x: Any,
    budget: Sequence[int | str],
    *,
    tile_sizes: Sequence[int] = (),
    **kwargs: Any,
) -> list[Plan]: ...


def plan(
    net: Any, x: Any, budget: Any = None, *, tile_sizes: Sequence[int] = (), **kwargs: Any
) -> Any:
    """Return the fastest plan for `net` whose peak memory stays within a budget.

    Runs steps of `net` on `x`, on their device, under each execution, and measures bytes and
    seconds; then chooses one execution per step. Parameters, gradients, buffers, training flags and
    the states of the generators stay as they are. Planning takes the time of a few steps of each
    kind (steps of the same shape are measured once) and of one pass over the whole sequence to
    check the result.

    With fake tensors, or parameters on the meta device, nothing is allocated: bytes follow from the
    sizes of tensors, and times from the number of floating-point operations. Such a plan says that
    it is estimated.

    In a process group every rank calls this, and gets the same plan, for the largest costs among
    the ranks.

    Args:
        net: a sequence.
        x: its input, of the largest size that the plan is for: a tensor, or for `Reversible` the
            tuple of its streams.
        budget: bytes for activations: the peak of one forward and backward above parameters, their
            gradients, the optimizer's state and `x`, whether these gradients exist yet or not. A
            number; text such as "8GiB"; "minimum", the smallest peak that any plan has; "stored",
            the peak of stored execution; "25%", a quarter of the way from the one to the other; or
            None, what is free on the device when all gradients exist. A sequence of budgets is
            measured once and gives one plan each.
        tile_sizes: tokens in a tile to choose among, for steps that run in tiles: each is measured
            as a sequence of its own. Setting the plan sets its size.
        **kwargs: the keywords of the forward pass.

    Returns:
        A plan, to be set by `net.execution = plan`.

    Raises:
        ReversibleError: no plan is within the budget; the message says the smallest possible peak.
        RuntimeError: `torch.inference_mode` is active, which allows no training step.
        TypeError: `net` is not a revnet sequence.
        ValueError: the budget is not a size, or no step runs in tiles of `tile_sizes`.

    Example:
        >>> net = revnet.ReversibleSequence([(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)])
        >>> net.execution = revnet.plan(net, torch.randn(2, 8), "stored")
    """
    _check(net, tile_sizes)
    many = isinstance(budget, Sequence) and not isinstance(budget, str)
    budgets = [_parse_budget(one) for one in (budget if many else [budget])]
    with torch.enable_grad(), stand_ins(net, x, kwargs) as replaced:
        planners = [_Planner(Measurement(replaced, size)) for size in tile_sizes or (0,)]
        plans = planners[0].plans(budgets) if len(planners) == 1 else _best(planners, budgets)
    return plans if many else plans[0]


def _check(net: Any, tile_sizes: Sequence[int]) -> None:
    """Raise unless a plan can be made of this network with these sizes of tiles."""
    if not isinstance(net, Program):
        raise TypeError(
            f"net is {type(net).__name__}, but a plan is for a revnet sequence: give the sequence "
            f"inside the model, such as model.layers"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "revnet.plan was called under torch.inference_mode, but it runs training steps, which "
            "inference_mode forbids: call it outside"
        )
    if tile_sizes and not net._tiling:
        raise ValueError(
            "tile_sizes are given, but no step of this sequence runs in tiles: say which do, by "
            "tile={'g': 4096} or revnet.Step(..., tile=4096)"
        )
    for size in tile_sizes:
        Tile(size)


def _best(planners: Sequence[_Planner], budgets: Sequence[int | float | None]) -> list[Plan]:
    """Return for each budget the fastest plan of all tile sizes."""
    shares = [budget for budget in budgets if isinstance(budget, float)]
    least = min(planner.least for planner in planners) if shares else 0
    most = max(planner.most for planner in planners) if shares else 0
    plans = []
    for budget in budgets:
        found: list[Plan] = []
        failures: list[tuple[int, ReversibleError]] = []
        for planner in planners:
            size = planner.size(budget)
            if isinstance(budget, float):
                size = round(least + budget * (most - least))
            planner.fit(size)
            try:
                found.append(planner.fastest(size))
            except ReversibleError as error:
                failures.append((planner.least, error))
        if not found:
            raise min(failures, key=lambda failure: failure[0])[1]
        plans.append(min(found, key=lambda plan: (plan.seconds, plan.peak_bytes)))
    # One stored execution for all sizes, so that slowdowns compare.
    stored = min(planner.stored.time for planner in planners) / 1e9
    return [replace(plan, stored_seconds=stored) for plan in plans]


def _parse_budget(budget: Budget) -> int | float | None:
    """Return bytes, a share of the way from the minimum to stored execution, or None."""
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


# How many plans are run in search of the plan for one budget.
_RUNS = 5


class _Planner:
    """Lets the solver propose plans, and runs each to see its peak."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement
        chains = _gather(measurement.chain())
        self.chain = chains[0]
        if any((c.steps, c.sizes) != (self.chain.steps, self.chain.sizes) for c in chains):
            raise ReversibleError(
                "the ranks of the process group plan for different sequences or inputs"
            )
        # The plans that were run, with the peak of the run.
        self.seen: dict[tuple[str, ...], Solution] = {}

    def plans(self, budgets: Sequence[int | float | None]) -> list[Plan]:
        """Return one plan per budget."""
        sizes = [self.size(budget) for budget in budgets]
        for size in sizes:
            self.fit(size)
        return [self.fastest(size) for size in sizes]

    def size(self, budget: int | float | None) -> int:
        """Return a budget in bytes."""
        if budget is None:
            free = free_bytes(self.measurement.x.device) - self.measurement.replaced.missing
            return int(max(0, min(_gather(free))))
        if isinstance(budget, int):
            return budget
        return round(self.least + budget * (self.most - self.least))

    @cached_property
    def most(self) -> int:
        """Return the peak of stored execution."""
        return max(self.run(self.stored.executions).peak, self.least)

    @cached_property
    def least(self) -> int:
        """Return the smallest peak that any plan has.

        What is run for it follows from bytes alone: times differ from call to call, and the peak
        that an error names must be there in the next call.
        """
        known, self.seen = self.seen, {}
        # Where branches keep little, stored execution takes less than is predicted of it.
        self.run(self.stored.executions)
        # Predictions are right to the size of the streams only, so what keeps least is run besides.
        undone = [
            [name for name in self.chain.kinds[kind] if not BY_NAME[name].on_host][-1]
            for kind, _ in self.chain.steps
        ]
        self.run(undone)
        self.run([*undone[:-1], STORE.name])
        self.fit(None, timed=False)
        # A run can take less than was predicted, and so can similar plans.
        self.fit(min(solution.peak for solution in self.seen.values()), timed=False)
        least = min(solution.peak for solution in self.seen.values())
        self.seen = known | self.seen
        return least

    @cached_property
    def stored(self) -> Solution:
        """Return stored execution."""
        return simulate(self.chain, [STORE.name] * len(self.chain.steps))

    def fit(self, size: int | None, timed: bool = True) -> None:
        """Run the fastest plan within `size` bytes or, without a size, that of the smallest peak.

        The bytes by which a run differs from the prediction are added to the chain, which is solved
        again. Unless `timed`, an execution takes the longer, the less it keeps, whatever was
        measured.
        """
        chain = self.chain if timed else _untimed(self.chain)
        for _ in range(_RUNS):
            limit = minimum(chain) if size is None else size
            solution = solve(chain, limit)
            if solution is None:
                return
            off = self.run(solution.executions).peak - solution.peak
            if off == 0 or -0.01 * limit <= off <= limit - solution.peak:
                return
            if off > 0 and _uses_host(solution.executions):
                # A copy holds its tensor the longer, the further the host runs ahead, so that no
                # budget can be promised.
                self.chain, chain = _without_host(self.chain), _without_host(chain)
            else:
                chain = replace(chain, overhead=chain.overhead + off)

    def run(self, executions: Sequence[str]) -> Solution:
        """Return what these executions come to, with the largest peak in runs, on all ranks."""
        key = tuple(executions)
        if key not in self.seen:
            solution = simulate(self.chain, key)
            if self.measurement.mode is None:
                runs = 3 if _uses_host(key) else 1
                peaks = [self.measurement.peak(key) for _ in range(runs)]
                solution = solution._replace(peak=max(_gather(max(peaks))))
            self.seen[key] = solution
        return self.seen[key]

    def fastest(self, size: int) -> Plan:
        """Return the fastest plan that was run and is within `size` bytes.

        Raises:
            ReversibleError: there is none.
        """
        if all(solution.peak > size for solution in self.seen.values()) and self.least > size:
            raise ReversibleError(
                f"no plan is within {format_bytes(size)} ({size} bytes): the smallest peak of this "
                f"sequence, for this input, is {format_bytes(self.least)} ({self.least} bytes). "
                f"Give at least that, or a smaller input."
            )
        # The search for the smallest peak may have run more plans.
        fitting = [solution for solution in self.seen.values() if solution.peak <= size]
        solution = min(fitting, key=lambda solution: (solution.time, solution.peak))
        measurement = self.measurement
        return Plan(
            executions=solution.executions,
            names=tuple(step.name for step in measurement.steps),
            kept_bytes=solution.kept,
            peak_bytes=solution.peak,
            seconds=solution.time / 1e9,
            stored_seconds=self.stored.time / 1e9,
            budget=size,
            shape=tuple(measurement.x.shape),
            dtype=_name(measurement.x.dtype),
            device=_gather(measurement.replaced.device)[0],
            estimated=measurement.mode is not None,
            streams=tuple((tuple(leaf.shape), _name(leaf.dtype)) for leaf in measurement.streams),
            tile=measurement.tile,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _untimed(chain: Chain) -> Chain:
    """Return the chain with times that follow from the order of executions alone."""
    order = list(BY_NAME)
    kinds = [
        {name: cost._replace(time=order.index(name)) for name, cost in kind.items()}
        for kind in chain.kinds
    ]
    return replace(chain, kinds=tuple(kinds))


def _without_host(chain: Chain) -> Chain:
    """Return the chain without the executions that keep a tensor on the host."""
    kinds = [
        {name: cost for name, cost in kind.items() if not BY_NAME[name].on_host}
        for kind in chain.kinds
    ]
    return replace(chain, kinds=tuple(kinds))


def _uses_host(executions: Sequence[str]) -> bool:
    """Check whether any step keeps a tensor on the host."""
    return any(BY_NAME[name].on_host for name in executions)


def _gather(value: Any) -> list[Any]:
    """Return `value` of every rank, or of this process alone where there is no process group."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
