"""Parameters of a tiled step: their gradients are added up over the tiles in float32.

Autograd adds the gradients of the uses of a parameter in its own dtype. In bfloat16 the sum of 128
tiles is eight times further from the true one than the gradient of one call over all tokens. So
each tile reads an alias of its own, whose gradient goes, in float32, to a gate that they share. The
gate hands over one gradient for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ReversibleError
from .._state import fsdp
from .._state.branch import unaliased
from .._step import BoundStep
from .._torch import are_plain, is_forward_mode


class _Gate(torch.autograd.Function):
    """Return a tensor of no memory; its gradient, in float32, is that of the parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        ctx.set_materialize_grads(False)
        return parameter.new_empty((), dtype=torch.float32).expand(parameter.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        (grad,) = grads
        return None if grad is None else grad.to(ctx.dtype)


class _Alias(torch.autograd.Function):
    """Return a view of the parameter, whose gradient goes to the gate.

    As a view it counts as the parameter itself (rule 5).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, parameter: tuple[Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        return parameter[0].view_as(parameter[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (grad,) = grads
        return None if grad is None else grad.to(torch.float32), None


class Gates:
    """Those of the parameters of one step.

    Args:
        fn: the branch.
        device: the type of device of the streams.
        name: of the step, for errors.

    Raises:
        ReversibleError: FSDP2 shards the branch, or a module in it, which would gather its weights
            for every tile.
    """

    def __init__(self, fn: Any, device: str, name: str) -> None:
        modules = list(fn.modules()) if isinstance(fn, nn.Module) else []
        if fsdp.sharded(modules):
            raise ReversibleError(
                f"{name}: fully_shard was called on this branch or on a module in it, so that each "
                f"tile would gather its weights. Call fully_shard on the block or on the sequence, "
                f"which gather once, or leave out tile"
            )
        low = torch.is_autocast_enabled(device) if device != "meta" else False
        # For each place of a parameter its dict, its name, the parameter and its gate.
        self.places: list[tuple[dict[str, Any], str, nn.Parameter, Tensor]] = []
        if not torch.is_grad_enabled() or is_forward_mode():
            return
        gates: dict[nn.Parameter, Tensor] = {}
        for module in modules:
            for key, present in module._parameters.items():
                # Another thread may run a tile of the same branch.
                parameter = unaliased(present)
                if parameter is None or not _is_gated(parameter, low):
                    continue
                if parameter not in gates:
                    gates[parameter] = _Gate.apply(parameter)
                own: Any = module._parameters
                self.places.append((own, key, parameter, gates[parameter]))

    def call(self, step: BoundStep, sources: list[Any]) -> Any:
        """Return what the branch of a step returns."""
        with self.open():
            return step.fn(*sources, **step.kwargs)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Let the branch read aliases of its parameters inside."""
        aliases: dict[int, Tensor] = {}
        for own, key, parameter, gate in self.places:
            if id(parameter) not in aliases:
                aliases[id(parameter)] = _Alias.apply(gate, (parameter,))
            own[key] = aliases[id(parameter)]
        try:
            yield
        finally:
            for own, key, parameter, _ in self.places:
                if own.get(key) is aliases[id(parameter)]:
                    own[key] = parameter


def _is_gated(parameter: nn.Parameter, autocast: bool) -> bool:
    """Check whether gradients of this parameter would be added up in low precision."""
    return (
        parameter.requires_grad
        and are_plain((parameter,))
        and (parameter.dtype in fsdp.LOW_PRECISION or (autocast and parameter.is_floating_point()))
    )
