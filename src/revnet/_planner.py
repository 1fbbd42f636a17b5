"""From a memory budget to the fastest plan: rehearse each kind of step under each execution, then solve."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import torch
import torch.distributed as dist

from ._errors import ReversibleError
from ._execution import Plan, format_bytes, parse_bytes
from ._program import Program
from ._rehearsal import Rehearsal
from ._solver import Chain, minimum, simulate, solve

Budget = int | str | None


@overload
def plan(net: Program, x: Any, budget: Budget = None, **kwargs: Any) -> Plan: ...


@overload
def plan(net: Program, x: Any, budget: Sequence[int | str], **kwargs: Any) -> list[Plan]: ...


def plan(net: Any, x: Any, budget: Any = None, **kwargs: Any) -> Any:
    """The fastest plan for `net` whose peak memory stays within a budget.

    Runs steps of `net` on `x`, where they are, under each execution, and measures bytes and seconds; then chooses one
    execution per step. Parameters, gradients, buffers, training flags and the states of the generators stay as they
    are. Costs the time of a few steps of each kind (steps of the same shape are measured once) and of one pass over the
    whole sequence to check the result.

    With fake tensors, or parameters on the meta device, nothing is allocated: bytes follow from the sizes of tensors
    and times from their number of floating-point operations, which the plan says.

    In a process group every rank calls this, and gets the same plan, for the largest costs among the ranks.

    Args:
        net: a sequence.
        x: its input, of the largest size that the plan is for: a tensor, or for `Reversible` the tuple of its streams.
        budget: bytes at the peak of one forward and backward, above what is held before (parameters, gradients that
            exist, `x`): a number; text such as "8GiB"; "minimum", the smallest peak that any plan has; "stored", that
            of stored execution; "25%", that share of the way from the one to the other; or None, what the device has
            free now. A sequence of budgets is measured once and gives one plan each.
        **kwargs: the keywords of the forward pass.

    Returns:
        A plan: `net.execution = plan` switches to it.

    Raises:
        ReversibleError: no plan is within the budget; the message says the smallest one possible.
        ValueError: a budget that is no size.

    Example:
        >>> net = revnet.ReversibleSequence([(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)])
        >>> net.execution = revnet.plan(net, torch.randn(2, 8), "stored")
    """
    if not isinstance(net, Program):
        raise TypeError(f"net is {type(net).__name__}, but a plan is for a revnet sequence")
    many = isinstance(budget, Sequence) and not isinstance(budget, str)
    budgets = [_read(one) for one in (budget if many else [budget])]
    with torch.enable_grad(), Rehearsal(net, x, kwargs) as rehearsal:
        chain = _largest_costs(rehearsal.chain())
        plans = [_plan(rehearsal, chain, one) for one in budgets]
    return plans if many else plans[0]


def _read(budget: Budget) -> int | float | str | None:
    """A number of bytes, a share of the way from the minimum to stored, or None."""
    if budget is None:
        return None
    if isinstance(budget, str):
        if budget == "minimum":
            return 0.0
        if budget == "stored":
            return 1.0
        if budget.endswith("%"):
            try:
                return float(budget[:-1]) / 100
            except ValueError:
                raise ValueError(f"{budget!r} is not a share: write it as '25%'") from None
    return parse_bytes(budget)


def _plan(rehearsal: Rehearsal, chain: Chain, budget: Any) -> Plan:
    least = minimum(chain)
    stored = simulate(chain, ["store"] * len(chain.steps))
    # What a run shows beyond the model is set aside, and the rest solved again.
    for _ in range(5):
        if budget is None:
            size = _largest(free_bytes(rehearsal.device))
        elif isinstance(budget, float):
            size = round(least + budget * (max(stored.peak, least) - least))
        else:
            size = budget
        solution = solve(chain, size)
        if solution is None:
            raise ReversibleError(
                f"no plan is within {format_bytes(size)} ({size} bytes): the smallest peak of this sequence, for this "
                f"input, is {format_bytes(least)} ({least} bytes). Give at least that, or a smaller input."
            )
        excess = 0
        if not rehearsal.estimated:
            runs = 3 if "offload" in solution.executions else 1
            excess = _largest(max(rehearsal.excess(solution, chain) for _ in range(runs)))
        if excess <= 0 or solution.peak + excess <= size:
            break
        if "offload" in solution.executions:
            # How long a copy holds its tensor depends on how far the host runs ahead: no budget can be promised.
            kinds = tuple({name: cost for name, cost in kind.items() if name != "offload"} for kind in chain.kinds)
            chain = replace(chain, kinds=kinds, _moves={})
        else:
            chain = replace(chain, overhead=chain.overhead + excess)
        least, stored = minimum(chain), simulate(chain, ["store"] * len(chain.steps))
    else:
        raise ReversibleError(
            f"the memory of this sequence differs from one run to the next by {format_bytes(excess)}: no plan can "
            "promise a budget. Look for caches that grow in its branches."
        )
    x = rehearsal.x
    made = Plan(
        executions=solution.executions,
        names=tuple(site.name for site in rehearsal.sites),
        kept_bytes=solution.kept,
        peak_bytes=solution.peak + max(0, excess),
        seconds=solution.time / 1e9,
        stored_seconds=stored.time / 1e9,
        budget=size,
        shape=tuple(x.shape),
        dtype=str(x.dtype).removeprefix("torch."),
        device=rehearsal.label,
        estimated=rehearsal.estimated,
        gap=solution.gap,
    )
    return _of_first_rank(made)


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now; on the CPU, of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gather(value: Any) -> list[Any]:
    """`value` of every rank; alone where there is no process group."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _largest(value: int) -> int:
    return int(max(_gather(value)))


def _of_first_rank(made: Plan) -> Plan:
    first: Plan = _gather(made)[0]
    return first


def _largest_costs(chain: Chain) -> Chain:
    """The chain with the largest cost of each step among the ranks."""
    chains = _gather(replace(chain, _moves={}))
    if len(chains) == 1:
        return chain
    first = chains[0]
    if any(
        (c.steps, c.sizes, [set(kind) for kind in c.kinds]) != (first.steps, first.sizes, [set(k) for k in first.kinds])
        for c in chains
    ):
        raise ReversibleError("the ranks of the process group plan for different sequences or inputs")
    kinds = tuple(
        {
            name: replace(
                cost,
                **{
                    field: max(getattr(c.kinds[i][name], field) for c in chains)
                    for field in ("own", "forward", "backward", "time")
                },
            )
            for name, cost in kind.items()
        }
        for i, kind in enumerate(first.kinds)
    )
    gradients = tuple(max(column) for column in zip(*(c.gradients for c in chains), strict=True))
    largest: Chain = replace(first, kinds=kinds, gradients=gradients, _moves={})
    return largest
