"""Trees of tensors; the usual tree, one tensor, costs nothing extra."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tree_map(fn: Any, tree: Any, *rest: Any) -> Any:
    """Return `fn` of the tensors of equally structured trees."""
    if isinstance(tree, Tensor):
        return fn(tree, *rest)
    return pytree.tree_map(fn, tree, *rest)


def tree_unzip(fn: Any, tree: Any, *rest: Any) -> tuple[Any, ...]:
    """Return the trees of first, second … members of the tuples that `fn` gives for each tensor."""
    if isinstance(tree, Tensor):
        return tuple(fn(tree, *rest))
    leaves, spec = pytree.tree_flatten(tree)
    found = [fn(*leaves) for leaves in zip(leaves, *map(pytree.tree_leaves, rest), strict=True)]
    return tuple(pytree.tree_unflatten(list(members), spec) for members in zip(*found, strict=True))


def tree_leaves(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree."""
    if isinstance(tree, Tensor):
        return [tree]
    return pytree.tree_leaves(tree)


def branch_output(out: Any, target: Any) -> tuple[Any, Any]:
    """What a branch returned, as `(update, aux)`; aux is None where there is none.

    A pair is `(update, aux)` unless the target itself is one.
    """
    if not isinstance(out, tuple) or len(out) != 2:
        return out, None
    if not isinstance(target, Tensor) and pytree.tree_structure(out) == pytree.tree_structure(
        target
    ):
        return out, None
    return out
