"""What FSDP2 exchanges between a call and its replay."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._torch import is_dtensor

# In these, float streams lose too much to rounding.
LOW_PRECISION = (torch.bfloat16, torch.float16)

# Until torch 2.13, FSDP2 does not cast the inputs and outputs of a module that is called between
# its pre- and its post-backward (fixed in pytorch #159359). That is where replays happen.
REPLAYS_UNCAST = torch.__version__ < torch.torch_version.TorchVersion("2.13")


def exchanged(recorded: Any, present: Any) -> bool:
    """Check whether FSDP2 put one of two parameters in the place of the other.

    It exchanges sharded for gathered ones between the calls. A sharded one is a DTensor; with
    tensor parallelism the gathered one is, too, but on fewer dimensions of the mesh.
    """
    if is_dtensor(recorded) and is_dtensor(present):
        return bool(
            recorded.device_mesh != present.device_mesh or recorded.placements != present.placements
        )
    return is_dtensor(recorded) or is_dtensor(present)


def sharded(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that FSDP2 shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (
        []
        if fsdp is None
        else [module for module in modules if isinstance(module, fsdp.FSDPModule)]
    )


def casts_to_low_precision(modules: Sequence[nn.Module]) -> bool:
    """Check whether FSDP2 casts inputs or outputs of a module to bfloat16 or float16."""
    policies = [
        module._get_fsdp_state()._mp_policy  # type: ignore[operator]
        for module in sharded(modules)
    ]
    dtypes = {policy.param_dtype for policy in policies if policy.cast_forward_inputs}
    return not dtypes.union(policy.output_dtype for policy in policies).isdisjoint(LOW_PRECISION)


@contextlib.contextmanager
def casts(modules: list[nn.Module]) -> Iterator[None]:
    """Apply the casts of the mixed-precision policies of these modules, sharded by FSDP2."""
    handles = []
    for module in modules:
        policy = module._get_fsdp_state()._mp_policy  # type: ignore[operator]
        if policy.cast_forward_inputs and policy.param_dtype is not None:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, dtype=policy.param_dtype: _cast((args, kwargs), dtype),
                    with_kwargs=True,
                )
            )
        if policy.output_dtype is not None:
            handles.append(
                module.register_forward_hook(
                    lambda _, args, out, dtype=policy.output_dtype: _cast(out, dtype)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)
