"""What ranks must agree on."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

# By the process group that agreed on it. A group destroyed and made anew may get the address of the
# old one.
_shared: weakref.WeakKeyDictionary[dist.ProcessGroup, torch.Generator] = weakref.WeakKeyDictionary()


def shared_generator() -> torch.Generator | None:
    """A CPU generator whose draws are alike on every rank; None, the global one, in a single process.

    Its seed is the one that the first rank to ask was given by `torch.manual_seed`; it goes through
    the store of the process group, once. A collective per draw would wait for ranks that are
    elsewhere, as the stages of a pipeline are.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    group = dist.group.WORLD
    assert group is not None
    if group not in _shared:
        store = dist.distributed_c10d._get_default_store()
        seed = store.compare_set("revnet/layer_dropout", "", str(torch.initial_seed()))
        _shared[group] = torch.Generator().manual_seed(int(seed))
    return _shared[group]
