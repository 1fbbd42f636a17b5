"""How the blocks of a sequence use a coupling: as steps, and with which streams they start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._compiled.function import active
from ._couplings import ADDITIVE, Coupling
from ._program import BoundSteps
from ._source import receiving, rule_of
from ._step import SOURCE, BoundStep
from ._tile import Tile
from ._torch import is_forward_mode
from ._trees import tree_map, tree_unzip


def steps_per_block(coupling: Coupling | None) -> int:
    """Return how many steps a block is: with a velocity, each branch is followed by a drift."""
    return 2 if coupling is None or coupling.drift is None else 4


def residual_steps(
    branches: Iterable[nn.Module],
    keywords: Iterable[Mapping[str, Any]],
    first: int = 0,
    name: str = "",
    updates: tuple[int, int] = (0, 1),
    coupling: Coupling | None = None,
    begins: bool = False,
    tiles: Mapping[str, Tile] = {},
) -> BoundSteps:
    """Return the steps of a block.

    Each branch updates one stream and reads the other or, with a rule that has a velocity, updates
    the velocity (stream 0), which is then added to the state (stream 1).

    Args:
        branches: f and g.
        keywords: those of f and of g.
        first: number of the first step.
        name: what errors call the block.
        updates: the stream that each branch updates.
        coupling: the rule, additive by default.
        begins: whether the first step begins at rest.
        tiles: by letter, how many tokens a branch reads at a time.
    """
    rule = ADDITIVE if coupling is None else coupling
    a, b = updates
    drift = None if coupling is None else coupling.drift
    places = (a, b), (b, a)
    if drift is not None:
        places = (a, b), (a, b)
    steps: list[tuple[int, BoundStep]] = []
    for letter, branch, (target, source), given in zip(
        "fg", branches, places, keywords, strict=True
    ):
        number = first + len(steps)
        now = rule.first if begins and not steps else rule
        fn, combine = (branch, now) if now is ADDITIVE else (receiving(branch, now), rule_of(now))
        step = BoundStep(
            f"{name}branch {letter}",
            fn,
            combine,
            target,
            (source,),
            dict(given),
            tiles.get(letter),
        )
        steps.append((number, step))
        if drift is not None:
            moved = BoundStep(f"{name}drift after {letter}", SOURCE, drift, source, (target,), {})
            steps.append((number + 1, moved))
    return steps


def step_name(step: int, per_block: int, block: str) -> str:
    """Return what errors call a step of a sequence."""
    number, place = divmod(step, per_block)
    letter = "fg"[2 * place // per_block]
    what = "drift after" if 2 * place % per_block else "branch"
    return f"{block} {number}, {what} {letter}"


def starting_streams(split: Any, dim: int, coupling: Coupling | None, x: Any) -> tuple[Any, Any]:
    """Return the two streams that a sequence starts with.

    Args:
        split: `"copy"`, `"chunk"`, or a function that returns them.
        dim: dimension that `"chunk"` halves.
        coupling: the rule; with one that has a velocity, `"copy"` starts at rest.
        x: a tensor, or a tree of tensors.
    """
    if callable(split):
        streams = split(x)
        if not isinstance(streams, tuple | list) or len(streams) != 2:
            raise TypeError(
                f"split returned {type(streams).__name__}, but a sequence has two streams: return "
                f"a pair"
            )
        return streams[0], streams[1]
    if split == "copy":
        still = coupling is not None and coupling.drift is not None
        return (tree_map(torch.zeros_like, x), x) if still else (x, x)

    def halves(leaf: Tensor) -> tuple[Tensor, Tensor]:
        size = leaf.shape[dim]
        if size % 2:
            raise ValueError(f"split='chunk' halves dimension {dim} of x, whose size {size} is odd")
        a, b = leaf.chunk(2, dim)
        return a, b

    first, second = tree_unzip(halves, x)
    return first, second


def merged_streams(merge: Any, dim: int, coupling: Coupling | None, y1: Any, y2: Any) -> Any:
    """Return what a sequence makes of the streams after its last block.

    Args:
        merge: `"mean"`, `"sum"`, `"concat"`, or a function of both.
        dim: dimension of `"concat"`.
        coupling: the rule; with one that starts at rest, `"mean"` is the latest state, `y2`.
        y1: stream 0.
        y2: stream 1.
    """
    if callable(merge):
        return merge(y1, y2)
    if merge == "concat":
        return tree_map(lambda a, b: _concatenated(a, b, dim), y1, y2)
    if merge == "sum":
        return tree_map(torch.add, y1, y2)
    if coupling is not None and coupling.starts_at_rest:
        return y2
    # The overload with a number keeps no tensor for backward; `/ 2` would keep one.
    return tree_map(lambda a, b: torch.ops.aten.div.Scalar(a + b, 2), y1, y2)


def _concatenated(a: Tensor, b: Tensor, dim: int) -> Tensor:
    if active() or is_forward_mode():
        return torch.cat((a, b), dim)
    y: Tensor = _Concatenate.apply(a, b, dim)
    return y


class _Concatenate(torch.autograd.Function):
    """Concatenate; the gradients of the parts are tensors of their own.

    Those of `torch.cat` are views, each of which holds the gradient of both.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.sizes = dim, (a.shape[dim], b.shape[dim])
        return torch.cat((a, b), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = grad.split(ctx.sizes, ctx.dim)
        return a.clone(), b.clone(), None
