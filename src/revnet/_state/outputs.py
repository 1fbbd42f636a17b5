"""Outputs of a submodule, such as the router of a mixture of experts, that replays repeat."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from .._torch import untraced
from .decisions import thread


def remember_outputs(module: nn.Module) -> Removable:
    """Let replays repeat what `module` decided and returned, as `remember` does, from outside.

    For routers of mixtures of experts whose code is not to be changed. Float streams are rebuilt
    with rounding errors, which may tip the choice between two experts. With this, what comes after
    `module` sees the very tensors that it returned in the forward pass; and inside of it, operators
    that make integers or booleans of floats (topk, argmax, comparisons) give what they gave. Give
    the smallest module that holds the choice, or that returns the scores for it. Kept are its
    outputs and these integers, per call. Without an effect outside of reversible steps and inside
    of compiled branches. Fixed streams need none of it.

    Args:
        module: a submodule of a branch, which returns tensors or containers of them.

    Returns:
        A handle whose `remove()` takes it away again. Not between forward and backward.

    Example:
        >>> gate = nn.Linear(8, 4)
        >>> handle = remember_outputs(gate)
        >>> handle.remove()
    """
    before = module.register_forward_pre_hook(_open, prepend=True)
    after = module.register_forward_hook(_close, always_call=True)
    return Removable(before, after)


class Removable:
    """What `remember_outputs` returns: removes its hooks by `remove()`, or at the end of a with."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove the hooks. A second call does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Removable:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _open(module: nn.Module, args: Any) -> None:
    active = thread.active
    if active.decisions and not torch.compiler.is_compiling():
        mode = _Decisions()
        mode.__enter__()
        active.modes = (*active.modes, (module, mode))


def _close(module: nn.Module, args: Any, out: Any) -> Any:
    # Called after an error, too, perhaps one that came before the mode.
    if torch.compiler.is_compiling():
        return None
    active = thread.active
    if not active.modes or active.modes[-1][0] is not module:
        return None
    mode = active.modes[-1][1]
    active.modes = active.modes[:-1]
    mode.__exit__(None, None, None)
    if out is not None and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out)):
        raise TypeError(
            f"{type(module).__name__} returned {type(out).__name__}, which holds no tensors that "
            f"remember_outputs can see: give it a module that returns a tensor, a tuple, list or "
            f"dict of them, or a class registered with torch.utils._pytree"
        )
    return pytree.tree_map_only(Tensor, partial(_repeated, strict=True), out)


class _Decisions(TorchDispatchMode):
    """Repeats what operators make of floating-point numbers that is none."""

    @untraced
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In a replay, too: it may move on a generator.
        out = func(*args, **kwargs)
        if func._schema.is_mutable or not any(
            map(_is_floating, pytree.tree_leaves((args, kwargs)))
        ):
            return out
        return pytree.tree_map_only(Tensor, _decided, out)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _decided(out: Tensor) -> Tensor:
    return out if out.is_floating_point() else _repeated(out, strict=False)


def _repeated(out: Tensor, strict: bool) -> Tensor:
    """Return an output of the call, or in a replay what it was in the call."""
    found = first = out.detach()
    for decisions in thread.active.decisions:
        found = decisions.pass_on(found, strict)
    # What depends on it saves tensors for a gradient where it did in the call.
    return out if found is first else found.requires_grad_(out.requires_grad)
