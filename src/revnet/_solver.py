"""The fastest executions of a chain of steps whose peak stays within a budget.

Every constraint has one form: what the steps before step k keep, plus what step k needs at its worst moment, fits. So a
search from the first step to the last only has to remember the bytes kept so far, the time so far, and which of the
present stream tensors are kept already: a stream tensor that several steps keep exists once. Of two ways to reach the
same state, one that neither keeps less nor is faster is dropped; with a lower bound of the time still to come, from the
Lagrangian dual of the budget, so is one that cannot beat a plan known already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily


@dataclass(frozen=True)
class Cost:
    """What one step costs under one execution.

    A stream has one part (the tensor) or two (the value that branches read, and how it is held); parts are numbered
    over all streams.

    Attributes:
        own: bytes kept until backward, without parts of streams.
        keeps: parts of the streams before the step that it keeps.
        keeps_result: parts of the target after the step that it keeps.
        forward: peak bytes in the forward pass above the streams before the step.
        backward: peak bytes in the backward pass of a call of this one step, everything that it keeps, the streams it
            walks from, and its gradients included.
        time: nanoseconds of forward and backward.
    """

    own: int
    keeps: tuple[int, ...]
    keeps_result: tuple[int, ...]
    forward: int
    backward: int
    time: int


@dataclass(frozen=True)
class Chain:
    """A sequence as the solver sees it.

    Attributes:
        sizes: bytes of each part of the streams.
        streams: per stream, its parts; the last is what it is held as.
        given: parts that the caller holds anyway before the first step: the input.
        kinds: per kind of step, the cost under each execution.
        steps: per step, its kind and the stream it updates.
        gradients: per step, bytes of parameter gradients that no later step has made.
        result: bytes of the result, which the caller holds through backward.
        ending: bytes that it takes to make the result from the streams.
        credit: bytes by which the gradients of the streams are fewer at the last step.
        handed: whether the caller gets the streams themselves, and so holds the last value of each.
        prefetch: stream tensors that offloaded steps have on the device ahead of their use.
        overhead: bytes seen in a run beyond what the model says.
    """

    sizes: tuple[int, ...]
    streams: tuple[tuple[int, ...], ...]
    given: tuple[int, ...]
    kinds: tuple[Mapping[str, Cost], ...]
    steps: tuple[tuple[int, int], ...]
    gradients: tuple[int, ...]
    result: int
    ending: int
    credit: int = 0
    handed: bool = False
    prefetch: int = 2
    overhead: int = 0
    _moves: dict[tuple[int, int, bool, int, _State], list[_Move]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def made_above(self) -> list[int]:
        """Per step, bytes that are there in its backward whatever the plan: the result, and gradients made before."""
        made, total = [], self.result
        for k in range(len(self.steps) - 1, -1, -1):
            if self.ends[k][0]:
                total += self.sizes[self.streams[self.steps[k][1]][0]]
            made.append(total)
            total += self.gradients[k]
        made[0] -= self.credit
        return made[::-1]

    @cached_property
    def ends(self) -> list[tuple[bool, int]]:
        """Per step: whether the caller holds the target after it, and bytes of other streams that it holds by then.

        The walk through a step has those too.
        """
        if not self.handed:
            return [(False, 0)] * len(self.steps)
        last = {target: k for k, (_, target) in enumerate(self.steps)}
        found, held = [], 0
        for k, (_, target) in enumerate(self.steps):
            found.append((last[target] == k, held))
            if last[target] == k and len(self.streams[target]) == 1:
                held += self.sizes[self.streams[target][0]]
        return found

    def size(self, parts: Sequence[int], kept: int = 0) -> int:
        """Bytes of `parts` that are not among the `kept` (a bit mask)."""
        return sum(self.sizes[part] for part in parts if not kept >> part & 1)


class _State(NamedTuple):
    """What matters of the steps so far for those to come."""

    kept: int  # bit mask of the parts that steps so far keep
    walked: bool  # the last step was not stored: backward walks through it
    later: bool  # of stored steps between others: the state that the walk above them reached is alive
    tail: bool  # only stored steps follow
    hosted: bool  # some step is offloaded


# The kind of a step, its target, what the caller holds of it and besides, and the state before it.
_Key = tuple[int, int, bool, int, _State]


class _Move(NamedTuple):
    execution: str
    state: _State
    kept: int  # bytes
    time: int  # nanoseconds
    forward: int  # bytes, at worst, above what the steps before keep
    backward: int


class Solution(NamedTuple):
    """Executions and what they come to: bytes kept per step, peak bytes, nanoseconds, bound of what is lost."""

    executions: tuple[str, ...]
    kept: tuple[int, ...]
    peak: int
    time: int
    gap: float


def _begin(chain: Chain, hosted: bool) -> _State:
    return _State(sum(1 << part for part in chain.given), False, False, False, hosted)


def _may_end(state: _State) -> bool:
    return state.walked or state.tail or not state.later


def _end(chain: Chain, state: _State) -> int:
    """Bytes at the end of the forward pass above what is kept: the streams, and the result."""
    return chain.size(range(len(chain.sizes)), state.kept) + chain.ending


def _moves(chain: Chain, k: int, state: _State) -> list[_Move]:
    """What step k may be, from `state`."""
    kind, target = chain.steps[k]
    key = kind, target, *chain.ends[k], state
    if key not in chain._moves:
        chain._moves[key] = [
            _move(chain, *key[1:], execution, cost, later)
            for execution, cost in chain.kinds[kind].items()
            for later in ((False, True) if execution == "store" and state.walked else (state.later,))
            if not (state.tail and execution != "store") and (state.hosted or execution != "offload")
        ]
    return chain._moves[key]


def _move(
    chain: Chain,
    target: int,
    handed: bool,
    besides: int,
    state: _State,
    execution: str,
    cost: Cost,
    later: bool,
) -> _Move:
    parts = range(len(chain.sizes))
    kept, marked = state.kept, 0
    stored = execution == "store"
    if stored and state.walked:
        # The streams are kept where a stored run begins, for the walk below it to start from.
        held = [stream[-1] for stream in chain.streams]
        marked = chain.size(held, kept)
        kept |= sum(1 << part for part in held)
    forward = marked + chain.size(parts, kept) + cost.forward
    # A part that is kept already is not there twice.
    backward = marked + cost.backward - (chain.size(cost.keeps) - chain.size(cost.keeps, kept))
    if stored and later:
        backward += sum(chain.sizes)
    if not stored:
        target_parts = chain.streams[target]
        if len(target_parts) > 1:
            backward += chain.sizes[target_parts[0]]  # the value that the walk above has read
        backward -= besides
        if state.hosted:
            backward += chain.prefetch * chain.sizes[target_parts[-1]]
    own = cost.own + chain.size(cost.keeps, kept) + chain.size(cost.keeps_result)
    kept |= sum(1 << part for part in cost.keeps)
    kept &= ~sum(1 << part for part in chain.streams[target])
    kept |= sum(1 << part for part in cost.keeps_result)
    if handed and not kept >> chain.streams[target][0] & 1:
        own += chain.sizes[chain.streams[target][0]]
        kept |= 1 << chain.streams[target][0]
    tail = state.tail or (stored and state.walked and not later)
    after = _State(kept, not stored, later if stored else True, tail, state.hosted)
    return _Move(execution, after, marked + own, cost.time, forward, backward)


def simulate(chain: Chain, executions: Sequence[str]) -> Solution:
    """What `executions` come to."""
    state = _begin(chain, "offload" in executions)
    last = max((k for k, execution in enumerate(executions) if execution != "store"), default=-1)
    made = chain.made_above()
    kept = peak = time = 0
    per_step = []
    for k, execution in enumerate(executions):
        later = k < last if execution == "store" and state.walked else state.later
        move = next(
            move
            for move in _moves(chain, k, state)
            if move.execution == execution and (execution != "store" or move.state.later == later)
        )
        peak = max(peak, kept + move.forward, kept + move.backward + made[k])
        kept += move.kept
        time += move.time
        per_step.append(move.kept)
        state = move.state
    peak = max(peak, kept + _end(chain, state))
    return Solution(tuple(executions), tuple(per_step), peak + chain.overhead, time, 0.0)


class _Layer(NamedTuple):
    """All moves of one step from all states that can be reached."""

    moves: list[_Move]
    owner: Tensor  # per move, the state it starts from
    after: Tensor  # the state it leads to
    kept: Tensor
    time: Tensor
    need: Tensor  # the larger of forward and backward, with what is there whatever the plan
    states: list[_State]  # after the step


def _layers(chain: Chain) -> tuple[list[_State], list[_Layer]]:
    executions = {execution for kind in chain.kinds for execution in kind}
    first = [_begin(chain, hosted) for hosted in ((False, True) if "offload" in executions else (False,))]
    made = chain.made_above()
    states, layers = first, []
    for k in range(len(chain.steps)):
        found = [(owner, move) for owner, state in enumerate(states) for move in _moves(chain, k, state)]
        if k == len(chain.steps) - 1:
            found = [(owner, move) for owner, move in found if _may_end(move.state)]
        index: dict[_State, int] = {}
        after = [index.setdefault(move.state, len(index)) for _, move in found]
        need = [max(move.forward, move.backward + made[k]) for _, move in found]
        if k == len(chain.steps) - 1:
            need = [max(most, move.kept + _end(chain, move.state)) for most, (_, move) in zip(need, found, strict=True)]
        layers.append(
            _Layer(
                [move for _, move in found],
                torch.tensor([owner for owner, _ in found]),
                torch.tensor(after),
                torch.tensor([move.kept for _, move in found]),
                torch.tensor([move.time for _, move in found]),
                torch.tensor(need),
                list(index),
            )
        )
        states = list(index)
    return first, layers


def _prices(chain: Chain) -> Tensor:
    """Prices of a byte in nanoseconds at which one execution takes over from another."""
    prices = {0.0}
    for kind in chain.kinds:
        for a in kind.values():
            for b in kind.values():
                for shared in (0, 1):
                    more = a.own - b.own + shared * (chain.size(a.keeps) - chain.size(b.keeps))
                    if more > 0 and b.time > a.time:
                        prices.add((b.time - a.time) / more)
    ordered = sorted(prices)
    stride = max(1, len(ordered) // 48)
    return torch.tensor(ordered[::stride], dtype=torch.float64)


def _bounds(first: int, layers: list[_Layer], prices: Tensor) -> list[Tensor]:
    """Per step and state before it, the least of time plus price × bytes still to come: (states, prices)."""
    bounds: list[Tensor] = []
    below: Tensor | None = None
    for k in range(len(layers) - 1, -1, -1):
        layer = layers[k]
        priced = layer.need.maximum(layer.kept) if below is None else layer.kept
        values = layer.time[:, None] + priced[:, None] * prices
        if below is not None:
            values = values + below[layer.after]
        count = len(layers[k - 1].states) if k else first
        owner = layer.owner[:, None].expand_as(values)
        below = torch.full((count, len(prices)), torch.inf, dtype=torch.float64).scatter_reduce(
            0, owner, values, "amin"
        )
        bounds.append(below)
    return bounds[::-1]


@contextlib.contextmanager
def _real() -> Iterator[None]:
    """Tensors of the solver are real, on the CPU, wherever those of the sequence are."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        yield


@_real()
def solve(chain: Chain, budget: int, effort: int = 1_000_000) -> Solution | None:
    """The fastest plan whose peak is within `budget` bytes, or None if there is none.

    Args:
        chain: what to plan.
        budget: bytes.
        effort: labels that may be held over all steps. With more than that a plan is still found, and how far it can be
            from the fastest one is returned as its `gap`.
    """
    budget -= chain.overhead
    first, layers = _layers(chain)
    prices = _prices(chain)
    bounds = _bounds(len(first), layers, prices)
    best: tuple[int, list[int]] | None = None
    for width in (32, max(256, effort // len(layers))):
        found, complete = _search(first, layers, bounds, prices, budget, width, best[0] if best else None)
        best = found or best
        if complete:
            break
    if best is None:
        fallback = _least(first, layers, budget)
        if fallback is None:
            return None
        best, complete = fallback, False
    time, path = best
    executions = [layer.moves[move].execution for layer, move in zip(layers, path, strict=True)]
    solution = simulate(chain, executions)
    if complete:
        return solution
    root = (bounds[0] - prices * budget).amax(1).min().item()
    return solution._replace(gap=max(0.0, 1 - root / time))


def _search(
    first: list[_State],
    layers: list[_Layer],
    bounds: list[Tensor],
    prices: Tensor,
    budget: int,
    width: int,
    known: int | None,
) -> tuple[tuple[int, list[int]] | None, bool]:
    """The fastest path faster than `known`, as its time and one move per step; and whether no path was left out."""
    state = torch.arange(len(first))
    kept = torch.zeros(len(first), dtype=torch.int64)
    time = torch.zeros(len(first), dtype=torch.int64)
    complete = True
    history: list[tuple[Tensor, Tensor]] = []
    for k, layer in enumerate(layers):
        # Every label takes every move of its state.
        order = torch.argsort(state, stable=True)
        count = len(layers[k - 1].states) if k else len(first)
        counts = torch.bincount(state, minlength=count)
        starts = counts.cumsum(0) - counts
        each = counts[layer.owner]
        move = torch.repeat_interleave(torch.arange(len(layer.moves)), each)
        offset = torch.arange(len(move)) - torch.repeat_interleave(each.cumsum(0) - each, each)
        label = order[starts[layer.owner][move] + offset]
        fits = kept[label] + layer.need[move] <= budget
        move, label = move[fits], label[fits]
        state, new_kept, new_time = layer.after[move], kept[label] + layer.kept[move], time[label] + layer.time[move]
        # Of labels in one state, keep those faster than all that keep no more.
        order = torch.argsort(new_time, stable=True)
        order = order[torch.argsort(new_kept[order], stable=True)]
        order = order[torch.argsort(state[order], stable=True)]
        state, new_kept, new_time, move, label = (x[order] for x in (state, new_kept, new_time, move, label))
        if len(state) == 0:
            return None, complete
        span = int(new_time.max()) + 1
        shifted = new_time - state * span
        faster = torch.ones(len(state), dtype=torch.bool)
        faster[1:] = shifted[1:] < shifted.cummin(0).values[:-1]
        state, new_kept, new_time, move, label = (x[faster] for x in (state, new_kept, new_time, move, label))
        kept, time = new_kept, new_time
        if k + 1 < len(layers):
            ahead = (bounds[k + 1][state] - prices * (budget - kept)[:, None]).amax(1)
            total = time + ahead
            if known is not None:
                # Half a nanosecond less than `known` cannot be: times are whole.
                hopeful = total < known - 0.5
                state, kept, time, move, label, total = (x[hopeful] for x in (state, kept, time, move, label, total))
                if len(state) == 0:
                    return None, complete
            if len(state) > width:
                complete = False
                # The label that keeps least goes on in any case: it can be the only one that fits.
                chosen = torch.topk(total, width - 1, largest=False).indices
                chosen = torch.unique(torch.cat((chosen, kept.argmin()[None])))
                state, kept, time, move, label = (x[chosen] for x in (state, kept, time, move, label))
        history.append((move, label))
    best = int(time.argmin())
    fastest = int(time[best])
    if known is not None and fastest >= known:
        return None, complete
    path = []
    for move, label in reversed(history):
        path.append(int(move[best]))
        best = int(label[best])
    return (fastest, path[::-1]), complete


def _least(first: list[_State], layers: list[_Layer], budget: int) -> tuple[int, list[int]] | None:
    """A plan that fits, if there is one: from each state on, the fewest bytes kept are the best to go on with."""
    reached: dict[int, tuple[int, int, tuple[int, ...] | None]] = dict.fromkeys(range(len(first)), (0, 0, None))
    history: list[dict[int, tuple[int, int, int, int]]] = []
    for layer in layers:
        after: dict[int, tuple[int, int, int, int]] = {}
        columns = zip(
            layer.owner.tolist(),
            layer.after.tolist(),
            layer.kept.tolist(),
            layer.need.tolist(),
            layer.moves,
            strict=True,
        )
        for number, (owner, to, more, need, move) in enumerate(columns):
            if owner not in reached:
                continue
            kept, time, _ = reached[owner]
            if kept + need > budget:
                continue
            label = kept + more, time + move.time, number, owner
            if to not in after or label[:2] < after[to][:2]:
                after[to] = label
        if not after:
            return None
        history.append(after)
        reached = {to: (label[0], label[1], None) for to, label in after.items()}
    state = min(reached, key=lambda to: reached[to][1])
    time, path = reached[state][1], []
    for after in reversed(history):
        _, _, number, state = after[state]
        path.append(number)
    return time, path[::-1]


@_real()
def minimum(chain: Chain) -> int:
    """The smallest peak that any plan has, in bytes."""
    first, layers = _layers(chain)
    names = [tuple(kind) for kind in chain.kinds]
    low, high = (
        0,
        min(
            simulate(chain, [_first(names[kind], execution) for kind, _ in chain.steps]).peak
            for execution in ("store", "invert", "checkpoint")
        ),
    )
    while low < high:
        found = _least(first, layers, (low + high) // 2 - chain.overhead)
        if found is None:
            low = (low + high) // 2 + 1
        else:
            executions = [layer.moves[move].execution for layer, move in zip(layers, found[1], strict=True)]
            high = simulate(chain, executions).peak
    return high


def _first(names: Sequence[str], execution: str) -> str:
    return execution if execution in names else names[0]
