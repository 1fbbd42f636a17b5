"""Stand-ins for the parameters, buffers and inputs of a sequence that is being measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from .._execution import STORE
from .._memory import all_tensors_in, storages_of
from .._program import Program
from .._sequential import BlockSequence
from .._state.branch import attributes_of
from .._state.contents import contents_kept
from .._state.random import RandomState, devices_of
from .._trees import tree_leaves


@dataclass
class StandIns:
    """A sequence whose parameters, buffers and inputs are replaced until `with` ends.

    Attributes:
        net, inputs, kwargs: the sequence, what it is given, and its keywords.
        mode: the mode under which nothing is allocated, or None where tensors are real.
        device: the device of the real input, as text.
        filled: the parameters that have a gradient, whose memory is not the plan's.
        missing: bytes of those gradients that do not exist yet.
        writable: the buffers and attributes that branches may write to: the dict that holds each,
            its name, and a tensor that stays as it is.
    """

    net: Program
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: FakeTensorMode | None
    device: str
    filled: set[Tensor] = field(default_factory=set)
    missing: int = 0
    writable: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)

    def renew(self) -> None:
        """Give buffers and attributes their first values again, in new tensors.

        An engine knows which tensors were written to. A batch norm that has seen one input often
        writes the same averages again, which the engine takes for no write: it would keep less.
        """
        copies: dict[Tensor, Tensor] = {}
        for owner, name, tensor in self.writable:
            if tensor not in copies:
                copies[tensor] = tensor.clone()
            owner[name] = copies[tensor]


@contextlib.contextmanager
def stand_ins(net: Program, x: Any, kwargs: dict[str, Any]) -> Iterator[StandIns]:
    """Replace the tensors and the randomness of `net`; restore them afterwards."""
    given = (x if isinstance(x, tuple) else (x,)), kwargs
    tensors = [*net.parameters(), *all_tensors_in(given)]
    mode = next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    if mode is None and any(tensor.is_meta for tensor in tensors):
        mode = FakeTensorMode()
    with contextlib.ExitStack() as stack:
        if mode is None:
            stack.enter_context(RandomState(devices_of(tensors)).restored())
        else:
            # The engine has a real tensor of its own, without elements that matter.
            _set(stack, mode, "allow_non_fake_inputs", True)
            stack.enter_context(mode)
            # Generators have no state to compare under this mode.
            options = replace(net._settings.options, preserve_rng_state=False)
            _set(stack, net._settings, "options", options)
        device = str(tree_leaves(given[0][0])[0].device)
        inputs, kwargs = pytree.tree_map_only(Tensor, lambda tensor: _alias(tensor, mode), given)
        replaced = StandIns(net, inputs, kwargs, mode, device)
        _replace_tensors(stack, replaced)
        yield replaced


def _set(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until `stack` closes."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _replace_tensors(stack: contextlib.ExitStack, replaced: StandIns) -> None:
    """Replace parameters, buffers and tensor attributes until `stack` closes."""
    net, mode = replaced.net, replaced.mode
    fresh = [p for p in net.parameters() if p.requires_grad and p.grad is None]
    replaced.missing = sum(storage.nbytes() for storage in storages_of(fresh))
    made: dict[Tensor, Tensor] = {}
    attributes_now = [attributes_of(module)[0].values() for module in net.modules()]
    stack.callback(contents_kept(value for values in attributes_now for value in values))
    for module in net.modules():
        # As in replays, tensor attributes count among the buffers, unless they need a gradient.
        # Nor are they replaced under a mode: a fake operation writes to no real tensor.
        attributes = [
            name
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and mode is None and not value.requires_grad
        ]
        owners: list[tuple[dict[str, Any], list[str]]] = [
            (vars(module), attributes),
            (module._parameters, list(module._parameters)),
            (module._buffers, list(module._buffers)),
        ]
        for owner, names in owners:
            stack.callback(_put_back, owner, dict(owner))
            for name in names:
                tensor = owner[name]
                if tensor is None:
                    continue
                if tensor not in made:
                    made[tensor] = _stand_in(stack, tensor, mode)
                owner[name] = made[tensor]
                if not isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                    replaced.writable.append((owner, name, made[tensor]))
    replaced.renew()
    replaced.filled = {tensor for tensor in made.values() if tensor.requires_grad}
    # A plan in force may be for a smaller input.
    _set(stack, net, "execution", STORE.name)
    if net._tiling:
        _set(stack, net, "_tiling", net._tiling)
    if isinstance(net, BlockSequence):
        # A plan is for the call in which no block is dropped.
        net.layer_dropout = 0.0


def _put_back(owner: dict[str, Any], before: dict[str, Any]) -> None:
    """Undo also what branches have set meanwhile, such as a loss, which would hold a graph."""
    owner.clear()
    owner.update(before)


def _stand_in(stack: contextlib.ExitStack, tensor: Tensor, mode: FakeTensorMode | None) -> Tensor:
    """Return what takes the place of a parameter or a buffer."""
    if hasattr(tensor, "placements"):
        # Sharded parameters belong to their group; only their gradient is put aside.
        _set(stack, tensor, "grad", None)
        return tensor
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(_alias(tensor, mode), tensor.requires_grad)
    return _alias(tensor, mode)


def _alias(tensor: Tensor, mode: FakeTensorMode | None) -> Tensor:
    """Return a tensor of the same values that has no past and a gradient of its own."""
    if mode is None or isinstance(tensor, FakeTensor):
        alias = tensor.detach()
    else:
        device = "cpu" if tensor.is_meta else tensor.device
        alias = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        )
    return alias.requires_grad_(tensor.requires_grad)
