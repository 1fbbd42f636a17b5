"""Rules by which a branch's output updates a stream, each with its inverse."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Coupling(nn.Module):
    """How a step updates its target stream with the output of its branch, and how that is undone.

    A rule of the form `target + increment(out)` overrides `increment` alone: it is exact in fixed streams. Any other
    rule overrides `combine` and `invert`, with `invert(combine(target, out), out) == target`.

    `target` is the stream, a tensor or a tree of tensors; `out` is what the branch returned. A rule raises `TypeError` or
    `ValueError` where they do not fit; the message goes on from "block 3, branch f".
    """

    def increment(self, out: Any) -> Any:
        """What is added to the target: the structure, shapes and device of the target, any floating dtype."""
        raise NotImplementedError(f"{type(self).__name__} defines neither `increment` nor `combine` and `invert`")

    def combine(self, target: Any, out: Any) -> Any:
        """The target after the step."""
        return tree_map(_add, target, fitting(target, self.increment(out)))

    def invert(self, target: Any, out: Any) -> Any:
        """The target before the step, from the target after it."""
        return tree_map(_subtract, target, self.increment(out))

    @property
    def translates(self) -> bool:
        """Whether the rule adds to the target something that does not depend on it."""
        return type(self).combine is Coupling.combine and type(self).invert is Coupling.invert


class Additive(Coupling):
    """`y = x + f`, undone by `x = y - f`.

    Reference: Dinh et al. 2014, arXiv:1410.8516; Gomez et al. 2017, arXiv:1707.04585.
    """

    def increment(self, out: Any) -> Any:
        return out


def _add(target: Tensor, increment: Tensor) -> Tensor:
    # A stream keeps its dtype: without the cast, adding a wider output would promote it.
    return target + increment.to(target.dtype)


def _subtract(target: Tensor, increment: Tensor) -> Tensor:
    return target - increment.to(target.dtype)


def tree_map(fn: Any, tree: Any, *rest: Any) -> Any:
    """`fn` over the tensors of equally structured trees; the usual tree, one tensor, costs nothing extra."""
    if isinstance(tree, Tensor):
        return fn(tree, *rest)
    return pytree.tree_map(fn, tree, *rest)


def tree_unzip(fn: Any, tree: Any, *rest: Any) -> tuple[Any, Any]:
    """The two trees of the pairs that `fn` gives for each tensor of `tree`."""
    if isinstance(tree, Tensor):
        first, second = fn(tree, *rest)
        return first, second
    leaves, spec = pytree.tree_flatten(tree)
    pairs = [fn(*leaves) for leaves in zip(leaves, *map(pytree.tree_leaves, rest), strict=True)]
    return pytree.tree_unflatten([a for a, _ in pairs], spec), pytree.tree_unflatten([b for _, b in pairs], spec)


def tree_leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree."""
    if isinstance(tree, Tensor):
        return [tree]
    return pytree.tree_leaves(tree)


def fitting(target: Any, out: Any) -> Any:
    """`out`, after a check that each of its tensors can be added to its counterpart in `target`."""
    if isinstance(target, Tensor):
        return _fitting(target, out)
    if pytree.tree_structure(target) != pytree.tree_structure(out):
        raise ValueError(
            f"returned {_describe(out)}, but its target stream is {_describe(target)}; "
            "a branch returns a tree of the same structure"
        )
    return pytree.tree_map(_fitting, target, out)


def _fitting(target: Tensor, out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"returned {type(out).__name__}, but its target stream is {_describe(target)}")
    if out.shape != target.shape or out.device != target.device:
        raise ValueError(
            f"returned {_describe(out)}, but its target stream is {_describe(target)}; "
            "a branch returns a tensor of the same shape on the same device"
        )
    if not out.dtype.is_floating_point:
        raise TypeError(f"returned {_describe(out)}, but a stream of {target.dtype} takes floating-point outputs")
    return out


def _describe(tree: Any) -> str:
    if isinstance(tree, Tensor):
        return f"a tensor {tuple(tree.shape)} of {tree.dtype} on {tree.device}"
    return str(pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, tree))
