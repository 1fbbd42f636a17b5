"""The fastest executions of a chain of steps whose peak stays within a budget.

Every constraint has one form: the bytes that the steps before step k keep, plus the bytes that step
k needs at its worst moment, must fit. So the steps from k to the end are described by two numbers:
the bytes that they need above what the steps before them keep, and their time. A search from the
last step to the first drops every choice that another one beats in both numbers. What is left at
the first step is the whole curve of time against peak, from which every budget is answered: with
more memory a plan is never slower.

Which choices a step has depends on the steps before it: on the stream tensors that they keep
already (a tensor that several steps keep exists once) and on whether they are stored. These
situations are few, and the search goes through all of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .._execution import BY_NAME, Execution

# Choices that a search may follow, over all steps.
_EFFORT = 100_000


class Cost(NamedTuple):
    """What one step costs under one execution.

    A stream has two parts, the value that branches read and the rest of its encoding: bits 2i and
    2i + 1 of a mask stand for those of stream i.

    Attributes:
        own: bytes kept until backward, without parts of streams.
        keeps: mask of the parts of the streams before the step that it keeps.
        forward: bytes at the worst moment of the forward pass of a call of this one step, its
            streams included.
        peak: the same of the backward pass, the gradients of its streams included, beside the
            gradients of parameters.
        time: nanoseconds of forward and backward.
    """

    own: int
    keeps: int
    forward: int
    peak: int
    time: int


@dataclass(frozen=True)
class Chain:
    """A sequence as the solver sees it.

    Attributes:
        sizes: bytes of each part of the streams.
        given: mask of the parts that the caller holds anyway before the first step: the input.
        kinds: per kind of step, the cost under each execution, by its name.
        steps: per step, its kind and the stream it updates.
        overhead: bytes seen beside these in a run: the result, and what the model leaves out.
        end: bytes while the result is made of the streams after the last step, these included.
    """

    sizes: tuple[int, ...]
    given: int
    kinds: tuple[Mapping[str, Cost], ...]
    steps: tuple[tuple[int, int], ...]
    overhead: int = 0
    end: int = 0

    def size(self, parts: int) -> int:
        """Return the bytes of the parts in a mask."""
        return sum(size for part, size in enumerate(self.sizes) if parts >> part & 1)

    def parts(self, *streams: int) -> int:
        """Return the mask of all parts of these streams."""
        return sum(3 << 2 * stream for stream in streams)


# Which part of a plan a step belongs to. Backward walks through the steps that are not stored, down
# from the state that is kept where a run of stored steps begins, or from the end.
_FIRST = 0  # Stored, like all steps before it.
_WALKED = 1  # Not stored.
_BETWEEN = 2  # Stored between steps that are not: the state that the walk above reached is alive.
_LAST = 3  # Stored, like all steps after it.


class _Situation(NamedTuple):
    """What the steps before a step decide about its choices."""

    kept: int  # The mask of the parts of streams that they keep.
    place: int


class _Choice(NamedTuple):
    """One way to execute a step."""

    execution: str
    after: _Situation
    kept: int  # Bytes.
    need: int  # Bytes at the worst moment, above what the steps before keep.
    time: int  # Nanoseconds.


class Solution(NamedTuple):
    """Executions and what they come to: bytes kept per step, peak bytes, nanoseconds."""

    executions: tuple[str, ...]
    kept: tuple[int, ...]
    peak: int
    time: int


def _choices(chain: Chain, step: tuple[int, int], before: _Situation) -> Iterator[_Choice]:
    """Go through the ways to execute a step."""
    kind, target = step
    for name, cost in chain.kinds[kind].items():
        execution = BY_NAME[name]
        if execution.rebuilds:
            places = [] if before.place == _LAST else [_WALKED]
        else:
            places = [_BETWEEN, _LAST] if before.place == _WALKED else [before.place]
        for place in places:
            yield _choice(chain, target, before, execution, cost, place)


def _choice(
    chain: Chain, target: int, before: _Situation, execution: Execution, cost: Cost, place: int
) -> _Choice:
    """Return what an execution costs after these steps; the laws of all executions are here."""
    everything = chain.parts(*range(len(chain.sizes) // 2))
    kept, saved = before.kept, 0
    # In the forward pass all streams are there, whoever keeps them.
    forward = cost.forward - chain.size(kept)
    if not execution.rebuilds and before.place == _WALKED:
        # The streams are kept where a stored run begins, for the walk below it to start from.
        saved = chain.size(everything & ~kept)
        kept = everything
    # What is kept already is not there twice.
    need = saved + cost.peak - chain.size(cost.keeps & kept)
    if place == _BETWEEN:
        need += chain.size(everything)
    if execution.on_host:
        # The target is back on the device while backward is in one of the steps above, whichever
        # that is.
        need = max(cost.peak for kind in chain.kinds for cost in kind.values())
        need += execution.prefetch * chain.size(chain.parts(target))
    need = max(need, forward)
    more = saved + cost.own + chain.size(cost.keeps & ~kept)
    after = _Situation((kept | cost.keeps) & ~chain.parts(target), place)
    return _Choice(execution.name, after, more, need, cost.time)


def _end(chain: Chain, after: _Situation) -> int:
    """Return the bytes while the result is made, above what the steps keep."""
    return chain.end - chain.size(after.kept)


def simulate(chain: Chain, executions: Sequence[str]) -> Solution:
    """Return what `executions` come to."""
    rebuilt = [k for k, name in enumerate(executions) if BY_NAME[name].rebuilds]
    last = max(rebuilt, default=-1)
    situation = _Situation(chain.given, _FIRST)
    kept: list[int] = []
    peak = total = 0
    for k, (step, execution) in enumerate(zip(chain.steps, executions, strict=True)):
        impossible = _LAST if k < last else _BETWEEN
        choice = next(
            choice
            for choice in _choices(chain, step, situation)
            if choice.execution == execution and choice.after.place != impossible
        )
        peak = max(peak, sum(kept) + choice.need + chain.overhead)
        total += choice.time
        kept.append(choice.kept)
        situation = choice.after
    peak = max(peak, sum(kept) + _end(chain, situation) + chain.overhead)
    return Solution(tuple(executions), tuple(kept), peak, total)


def solve(chain: Chain, budget: int) -> Solution | None:
    """Return the fastest plan whose peak is within `budget` bytes, or None if there is none.

    With more than `_EFFORT` choices to follow, over all steps, some are left out: the plan fits,
    and is a little slower than the fastest.
    """
    return _search(chain, budget, max(64, _EFFORT // len(chain.steps)))


def minimum(chain: Chain) -> int:
    """Return the smallest peak that any plan has, in bytes."""
    smallest = _search(chain, None, 256)
    assert smallest is not None
    return smallest.peak


@dataclass(frozen=True)
class _Curve:
    """The choices for all steps from one step on of which none beats another.

    Attributes:
        need: bytes above what the steps before keep, rising.
        time: nanoseconds, falling.
        choices: of the first of these steps.
        chosen: per point of the curve, which of the choices it takes.
        rest: per point, its place on the curve of the steps that follow.
    """

    need: Tensor
    time: Tensor
    choices: list[_Choice]
    chosen: Tensor
    rest: Tensor


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Make the solver's tensors real and on the CPU, wherever those of the sequence are."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        yield


@_on_cpu()
def _search(chain: Chain, budget: int | None, width: int) -> Solution | None:
    """Return the fastest plan within a budget or, without one, the plan with the smallest peak."""
    start = _Situation(chain.given, _FIRST)
    choices = cache(lambda step, situation: list(_choices(chain, step, situation)))
    reached = [{start}]
    for step in chain.steps:
        reached.append({choice.after for before in reached[-1] for choice in choices(step, before)})
    none = torch.tensor([0])
    curves = {
        situation: _Curve(
            torch.tensor([_end(chain, situation) + chain.overhead]), none, [], none, none
        )
        for situation in reached.pop()
        if situation.place != _BETWEEN
    }
    prices = _prices(chain)
    history = []
    for step, situations in reversed(list(zip(chain.steps, reached, strict=True))):
        found = {}
        for situation in situations:
            possible = [choice for choice in choices(step, situation) if choice.after in curves]
            if possible:
                found[situation] = _curve(possible, curves, chain.overhead, prices, width)
        curves = found
        history.append(curves)
    curve, point = curves[start], 0
    if budget is not None:
        point = int(torch.searchsorted(curve.need, budget, right=True)) - 1
    if point < 0:
        return None
    executions = []
    situation = start
    for curves in reversed(history):
        curve = curves[situation]
        choice = curve.choices[int(curve.chosen[point])]
        executions.append(choice.execution)
        situation, point = choice.after, int(curve.rest[point])
    return simulate(chain, executions)


def _curve(
    choices: list[_Choice],
    curves: Mapping[_Situation, _Curve],
    overhead: int,
    prices: Tensor,
    width: int,
) -> _Curve:
    """Return the curve from a step on, of at most about `width` points."""
    rests = [curves[choice.after] for choice in choices]
    pairs = list(zip(choices, rests, strict=True))
    need = torch.cat([(c.kept + rest.need).clamp(min=c.need + overhead) for c, rest in pairs])
    time = torch.cat([c.time + rest.time for c, rest in pairs])
    lengths = torch.tensor([len(rest.need) for rest in rests])
    chosen = torch.repeat_interleave(lengths)
    places = torch.cat([torch.arange(len(rest.need)) for rest in rests])
    order = time.argsort(stable=True)
    order = order[need[order].argsort(stable=True)]
    ordered = time[order]
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = ordered[1:] < ordered.cummin(0).values[:-1]
    order = order[better]
    if len(order) > width:
        order = order[_spread(need[order], time[order], prices, width)]
    return _Curve(need[order], time[order], choices, chosen[order], places[order])


def _spread(need: Tensor, time: Tensor, prices: Tensor, width: int) -> Tensor:
    """Return at most `width` points of a curve: of each stretch that which costs least.

    Bytes are counted at the price of all prices that suits the point best. The first point is one
    of them: it can be the only one that fits.
    """
    cost = time[:, None] + prices * need[:, None]
    loss = (cost - cost.amin(0)).amin(1)
    share = (need - need[0]).double() / float(need[-1] - need[0] + 1)
    stretch = (width * share.sqrt()).long()
    loss[0] = -1.0
    order = loss.argsort(stable=True)
    order = order[stretch[order].argsort(stable=True)]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = stretch[order].diff() != 0
    return order[first]


def _prices(chain: Chain) -> Tensor:
    """Return the nanoseconds for a byte at which one execution of a step replaces another."""
    prices = {0.0}
    for kind in chain.kinds:
        for a, b in itertools.permutations(kind.values(), 2):
            more = a.own + chain.size(a.keeps) - b.own - chain.size(b.keeps)
            if more > 0 and b.time > a.time:
                prices.add((b.time - a.time) / more)
    return torch.tensor(sorted(prices), dtype=torch.float64)
