"""Decisions of a branch, such as the routes of a mixture of experts, that its replays repeat."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .._errors import ReversibleError


class _Active:
    """The calls and replays under way in one thread, outermost first."""

    __slots__ = ("decisions", "modes")

    def __init__(self) -> None:
        self.decisions: tuple[Decisions, ...] = ()
        # Of `remember_outputs`: the modules under way, each with its mode.
        self.modes: tuple[tuple[Any, Any], ...] = ()


class _Thread(threading.local):
    def __init__(self) -> None:
        # Looked up once where several of its attributes are needed.
        self.active = _Active()


thread = _Thread()


class Decisions:
    """What one call of a step decided, and how far a replay has read it.

    Attributes:
        tensors: the decisions in their order.
        place: the number of the next decision in a replay, None while the call runs.
        name: what errors call the step.
    """

    __slots__ = ("tensors", "place", "name", "active", "modes")

    def __init__(self, name: str) -> None:
        self.tensors: list[Tensor] = []
        self.place: int | None = None
        self.name = name

    def __enter__(self) -> None:
        """Let `remember` keep what it is given, or in a replay return what was kept."""
        self.active = active = thread.active
        active.decisions = (*active.decisions, self)
        self.modes = len(active.modes)

    def __exit__(self, *exception: object) -> None:
        active = self.active
        active.decisions = active.decisions[:-1]
        # An interrupt runs no hooks.
        while len(active.modes) > self.modes:
            mode = active.modes[-1][1]
            active.modes = active.modes[:-1]
            mode.__exit__(None, None, None)

    def pass_on(self, decision: Tensor, strict: bool = True) -> Tensor:
        """Keep a decision, or return the one that was kept.

        Args:
            decision: what the call decided, or a replay.
            strict: raise where a replay has decided on another shape.
        """
        if self.place is None:
            # A copy: the branch may go on to write to its tensor.
            self.tensors.append(_copied(decision))
            return decision
        if self.place == len(self.tensors):
            raise self._error(decision)
        kept = self.tensors[self.place]
        if kept.dtype is not decision.dtype or (strict and kept.shape != decision.shape):
            raise self._error(decision)
        self.place += 1
        return _copied(kept)

    def _error(self, decision: Tensor) -> ReversibleError:
        return ReversibleError(
            f"{self.name}: decision {self.place}, {tuple(decision.shape)}, was not made in the "
            "forward pass. A branch calls revnet.remember, and modules under "
            "revnet.remember_outputs, as often and with the same shapes each time."
        )


def _copied(x: Tensor) -> Tensor:
    """Return a copy with the strides of x."""
    if x.is_contiguous():
        return x.clone()
    # An expanded dimension has stride 0 and cannot be written to: copy one slice, expand that.
    sizes = [1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True)]
    part = x[tuple([slice(0, size) for size in sizes])]
    return x.new_empty_strided(sizes, x.stride()).copy_(part).expand(x.shape)


class _Replays(threading.local):
    """How many replays run in this thread, one inside the other."""

    depth = 0


replays = _Replays()


def replaying() -> bool:
    """Return whether the caller runs inside a replay, that is, a recomputation in backward.

    A replay finds the modules as the call found them and leaves no trace in them. What is to count
    evaluations, or to record activations once, keeps its state outside of the modules of the branch
    and asks.

    Example:
        >>> calls = {"forward": 0, "replay": 0}
        >>> def count():
        ...     calls["replay" if replaying() else "forward"] += 1
    """
    return replays.depth > 0


def remember(decision: Tensor) -> Tensor:
    """Return `decision`; in a replay, what it was in the forward pass.

    Float streams are rebuilt with rounding errors, which may tip a comparison: a token is then
    routed to another expert in the replay, and its gradient is wrong. Remembered, the route is that
    of the forward pass, at the cost of the tensor's memory per step. Fixed streams need no
    remembering. Not seen inside a branch that was compiled.

    Args:
        decision: integers or booleans, say, any shape; a tensor without gradient.

    Raises:
        TypeError: the tensor requires a gradient.

    Example:
        >>> def route(scores):
        ...     expert = remember(scores.argmax(-1, keepdim=True))
        ...     return scores.softmax(-1).gather(-1, expert), expert
    """
    if decision.requires_grad:
        raise TypeError(
            "remember takes a decision, which has no gradient: indices or a mask. Gather by it "
            "afterwards."
        )
    if not torch.compiler.is_compiling():
        for decisions in thread.active.decisions:
            decision = decisions.pass_on(decision)
    return decision
