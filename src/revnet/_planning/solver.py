"""The fastest executions of a chain of steps whose peak stays within a budget.

Every constraint has one form: what the steps before step k keep, plus what step k needs at its
worst moment, fits. So a search from the first step to the last only has to remember the bytes kept
so far, the time so far, and which of the present stream tensors are kept already: a tensor that
several steps keep exists once. Of two ways to reach the same state, one that neither keeps less nor
is faster is dropped.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .._execution import OFFLOAD

# Ways that a search may follow, over all steps.
_EFFORT = 100_000


class Cost(NamedTuple):
    """What one step costs under one execution.

    A stream has two parts, the value that branches read and what else it is held as: bits 2i and 2i
    + 1 of a mask stand for those of stream i.

    Attributes:
        own: bytes kept until backward, without parts of streams.
        keeps: mask of the parts of the streams before the step that it keeps.
        peak: bytes at the worst moment of a call of this one step, its streams and their gradients
            included.
        time: nanoseconds of forward and backward.
    """

    own: int
    keeps: int
    peak: int
    time: int


@dataclass(frozen=True)
class Chain:
    """A sequence as the solver sees it.

    Attributes:
        sizes: bytes of each part of the streams.
        given: mask of the parts that the caller holds anyway before the first step: the input.
        kinds: per kind of step, the cost under each execution.
        steps: per step, its kind and the stream it updates.
        gradients: per step, bytes of parameter gradients that no later step has made.
        overhead: bytes seen beside these in a run: the result, and what the model leaves out.
    """

    sizes: tuple[int, ...]
    given: int
    kinds: tuple[Mapping[str, Cost], ...]
    steps: tuple[tuple[int, int], ...]
    gradients: tuple[int, ...]
    overhead: int = 0

    def size(self, parts: int) -> int:
        """Bytes of the parts in a mask."""
        return sum(size for part, size in enumerate(self.sizes) if parts >> part & 1)

    def streams(self, *numbers: int) -> int:
        """The mask of all parts of these streams."""
        return sum(3 << 2 * number for number in numbers)

    def made(self) -> list[int]:
        """Per step, bytes that are there in its backward whatever the plan."""
        above = [self.overhead]
        for gradients in self.gradients[:0:-1]:
            above.append(above[-1] + gradients)
        return above[::-1]


# Which part of a plan a step belongs to. Backward walks through the steps that are not stored, down
# from the state that is kept where a run of stored steps begins, or from the end.
_FIRST = 0  # stored, like all before it
_WALKED = 1  # not stored
_BETWEEN = (
    2  # stored, between steps that are not: the state that the walk above has reached is alive
)
_LAST = 3  # stored, like all after it


class _State(NamedTuple):
    """What matters of the steps so far for those to come."""

    kept: int  # mask of the parts that steps so far keep
    place: int


class _Move(NamedTuple):
    execution: str
    state: _State
    kept: int  # bytes
    need: int  # bytes, at worst, above what the steps before keep
    time: int  # nanoseconds


class Solution(NamedTuple):
    """Executions and what they come to: bytes kept per step, peak bytes, nanoseconds."""

    executions: tuple[str, ...]
    kept: tuple[int, ...]
    peak: int
    time: int


def _moves(chain: Chain, step: tuple[int, int], state: _State) -> Iterator[_Move]:
    """What a step may be, from `state`."""
    kind, target = step
    for execution, cost in chain.kinds[kind].items():
        if execution != "store":
            places = [] if state.place == _LAST else [_WALKED]
        else:
            places = [_BETWEEN, _LAST] if state.place == _WALKED else [state.place]
        for place in places:
            yield _move(chain, target, state, execution, cost, place)


def _move(
    chain: Chain, target: int, state: _State, execution: str, cost: Cost, place: int
) -> _Move:
    everything = chain.streams(*range(len(chain.sizes) // 2))
    kept, marked = state.kept, 0
    if execution == "store" and state.place == _WALKED:
        # The streams are kept where a stored run begins, for the walk below it to start from.
        marked = chain.size(everything & ~kept)
        kept = everything
    # What is kept already is not there twice.
    need = marked + cost.peak - chain.size(cost.keeps & kept)
    if place == _BETWEEN:
        need += chain.size(everything)
    if execution == "offload":
        # It is back while backward is in one of the steps above, whichever that is.
        need = max(cost.peak for kind in chain.kinds for cost in kind.values())
        need += OFFLOAD.prefetch * chain.size(chain.streams(target))
    more = marked + cost.own + chain.size(cost.keeps & ~kept)
    after = _State((kept | cost.keeps) & ~chain.streams(target), place)
    return _Move(execution, after, more, need, cost.time)


def simulate(chain: Chain, executions: Sequence[str]) -> Solution:
    """What `executions` come to."""
    last = max((k for k, execution in enumerate(executions) if execution != "store"), default=-1)
    state = _State(chain.given, _FIRST)
    moves: list[_Move] = []
    peak = 0
    for k, (step, execution, made) in enumerate(
        zip(chain.steps, executions, chain.made(), strict=True)
    ):
        impossible = _LAST if k < last else _BETWEEN
        move = next(
            m
            for m in _moves(chain, step, state)
            if m.execution == execution and m.state.place != impossible
        )
        peak = max(peak, sum(move.kept for move in moves) + move.need + made)
        moves.append(move)
        state = move.state
    return Solution(
        tuple(executions),
        tuple(move.kept for move in moves),
        peak,
        sum(move.time for move in moves),
    )


def _prices(chain: Chain) -> Tensor:
    """Nanoseconds for a byte at which one execution of a step takes over from another."""
    prices = {0.0}
    for kind in chain.kinds:
        for a, b in itertools.permutations(kind.values(), 2):
            more = a.own + chain.size(a.keeps) - b.own - chain.size(b.keeps)
            if more > 0 and b.time > a.time:
                prices.add((b.time - a.time) / more)
    return torch.tensor(sorted(prices), dtype=torch.float64)


@contextlib.contextmanager
def _real() -> Iterator[None]:
    """Tensors of the solver are real, on the CPU, wherever those of the sequence are."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        yield


def solve(chain: Chain, budget: int) -> Solution | None:
    """The fastest plan whose peak is within `budget` bytes, or None if there is none.

    Where there are more than `_EFFORT` ways to follow, over all steps, those are followed that some
    price of a byte makes cheapest: the plan fits, and is slower than the fastest by about a step's
    time at most.
    """
    return _search(chain, budget, max(64, _EFFORT // len(chain.steps)))


def minimum(chain: Chain) -> int:
    """The smallest peak that any plan has, in bytes."""
    found = _search(chain, None, 256)
    assert found is not None
    return found.peak


# Ways to reach one state: bytes kept, rising, and time so far, falling (without a budget, the peak
# so far).
_Front = tuple[Tensor, Tensor]
# For each way to reach one state: which of these, the state before and the execution, it came by,
# and the way to there.
_Past = tuple[list[tuple[_State, str]], Tensor, Tensor]


@_real()
def _search(chain: Chain, budget: int | None, width: int) -> Solution | None:
    """The plan that takes the least time within a budget or, without one, whose peak is smallest."""
    zero = torch.zeros(1, dtype=torch.int64)
    fronts = {_State(chain.given, _FIRST): (zero, zero)}
    history: list[dict[_State, _Past]] = []
    prices = _prices(chain)
    moves = cache(lambda step, state: list(_moves(chain, step, state)))
    for step, made in zip(chain.steps, chain.made(), strict=True):
        ways: defaultdict[_State, list[tuple[_State, str, Tensor, Tensor]]] = defaultdict(list)
        for state, (kept, value) in fronts.items():
            for move in moves(step, state):
                need = move.need + made
                if budget is None:
                    worth = value.maximum(kept + need)
                else:
                    worth = (
                        value[: int(torch.searchsorted(kept, budget - need, right=True))]
                        + move.time
                    )
                if len(worth):
                    ways[move.state].append(
                        (state, move.execution, kept[: len(worth)] + move.kept, worth)
                    )
        found = {state: _best(some, prices, width) for state, some in ways.items()}
        fronts = {state: front for state, (front, _) in found.items()}
        history.append({state: past for state, (_, past) in found.items()})
    ends = [state for state in fronts if state.place != _BETWEEN]
    if not ends:
        return None
    state, way = min(ends, key=lambda state: int(fronts[state][1][-1])), -1
    executions = []
    for pasts in reversed(history):
        sources, source, label = pasts[state]
        (state, execution), way = sources[int(source[way])], int(label[way])
        executions.append(execution)
    return simulate(chain, executions[::-1])


def _best(
    ways: list[tuple[_State, str, Tensor, Tensor]], prices: Tensor, width: int
) -> tuple[_Front, _Past]:
    """Those ways to a state of which no other keeps less and is faster, `width` of them or fewer."""
    kept, value = (
        torch.cat(column) for column in ([way[2] for way in ways], [way[3] for way in ways])
    )
    source = torch.repeat_interleave(torch.tensor([len(way[2]) for way in ways]))
    label = torch.cat([torch.arange(len(way[2])) for way in ways])
    order = value.argsort(stable=True)
    order = order[kept[order].argsort(stable=True)]
    ordered = value[order]
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = ordered[1:] < ordered.cummin(0).values[:-1]
    order = order[better]
    if len(order) > width:
        # The way that keeps least goes on in any case: it can be the only one that fits.
        off = value[order, None] + prices * kept[order, None]
        near = (off - off.amin(0)).amin(1).topk(width, largest=False).indices
        order = order[torch.cat((near, torch.zeros(1, dtype=torch.int64))).unique()]
    return (kept[order], value[order]), ([way[:2] for way in ways], source[order], label[order])
