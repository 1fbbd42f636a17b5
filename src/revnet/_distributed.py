"""A generator that draws alike on every rank."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

# By process group. A group that is made after another one was destroyed may get its address, so the
# references are weak.
_shared: weakref.WeakKeyDictionary[dist.ProcessGroup, torch.Generator] = weakref.WeakKeyDictionary()


def shared_generator() -> torch.Generator | None:
    """Return a CPU generator that draws alike on every rank, or None in a single process.

    Its seed is that of `torch.manual_seed` on the first rank that asks. It goes through the store
    of the process group, once. A collective per draw would wait for ranks that do not draw, such as
    other stages of a pipeline.
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
