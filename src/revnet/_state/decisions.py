"""Decisions of a branch, such as the routes of a mixture of experts, that its replays repeat."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .._errors import ReversibleError


class _Active(threading.local):
    """The calls and replays under way in this thread, outermost first."""

    tapes: tuple[Decisions, ...] = ()


_active = _Active()


class Decisions:
    """What one call of a branch decided, and how far a replay has read it."""

    __slots__ = ("tensors", "place", "name")

    def __init__(self, name: str) -> None:
        self.tensors: list[Tensor] = []
        self.place: int | None = None
        self.name = name

    def __enter__(self) -> None:
        """Inside, `remember` keeps what it is given, or after `rewound` returns what was kept."""
        _active.tapes = (*_active.tapes, self)

    def __exit__(self, *exception: object) -> None:
        _active.tapes = _active.tapes[:-1]
        self.place = None

    def rewound(self) -> Decisions:
        """This, to be read from the start."""
        self.place = 0
        return self

    def pass_on(self, decision: Tensor) -> Tensor:
        if self.place is None:
            # A copy: the branch may go on to write to its tensor.
            self.tensors.append(decision.clone())
            return decision
        if self.place == len(self.tensors) or self.tensors[self.place].shape != decision.shape:
            raise ReversibleError(
                f"{self.name}: decision {self.place}, {tuple(decision.shape)}, was not made in the "
                f"forward pass. A branch calls revnet.remember as often and with the same shapes "
                f"each time."
            )
        self.place += 1
        return self.tensors[self.place - 1].clone()


def remember(decision: Tensor) -> Tensor:
    """`decision`; in a replay, what it was in the forward pass.

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
        for tape in _active.tapes:
            decision = tape.pass_on(decision)
    return decision
