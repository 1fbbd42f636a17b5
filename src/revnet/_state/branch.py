"""The modules of a step, and what belongs to them: the one visitor of a branch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .._couplings import Additive

# What torch, and wrappers around a module, keep in its `__dict__` for themselves.
MACHINERY = frozenset(nn.Module().__dict__) - {"training"}
MACHINERY |= {"_compiled_call_impl", "_hf_hook", "_old_forward", "_is_fsdp_managed_module"}


def modules_of(fn: nn.Module, coupling: nn.Module | None = None) -> list[nn.Module]:
    """Return every distinct module that a step may enter.

    They are those that the branch contains, where it is a step those of a method's own module, and
    those of the coupling.
    """
    found = [fn]
    owner = getattr(vars(fn).get("fn"), "__self__", None)
    if isinstance(owner, nn.Module) and owner is not fn:
        found.append(owner)
    # An additive coupling holds nothing.
    if coupling is not None and type(coupling) is not Additive:
        found.append(coupling)
    seen = set(found)
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are neither parameters, buffers nor torch's own."""
    own = module.__dict__
    return {name: own[name] for name in own.keys() - MACHINERY}


def parameters_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
    """Go through the parameters of one module: their owner, name and the parameter."""
    owner = module._parameters
    for name, parameter in owner.items():
        if parameter is not None:
            yield owner, name, parameter


def is_compiled(fn: nn.Module) -> bool:
    """Check whether a compiler has taken over a branch, or part of it.

    What stays of it until backward was the compiler's choice then. Nor could single results be
    kept: Dynamo compiles no function that it first meets under a dispatch mode, then or ever after.
    """
    return any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules
        for module in modules_of(fn)
    )
