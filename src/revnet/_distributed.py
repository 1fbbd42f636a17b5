"""What ranks must agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist

_shared: dict[int, torch.Generator] = {}


def shared_generator() -> torch.Generator | None:
    """A CPU generator whose draws are alike on every rank; None, the global one, in a single process.

    Its seed goes through the store of the process group once: the first rank to ask sets it. A collective per draw
    would wait for ranks that are elsewhere, as the stages of a pipeline are.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    group = dist.group.WORLD
    key = id(group)
    if key not in _shared:
        store = dist.distributed_c10d._get_default_store()
        seed = store.compare_set("revnet/layer_dropout", "", str(int(torch.randint(2**62, ()))))
        _shared.clear()
        _shared[key] = torch.Generator().manual_seed(int(seed))
    return _shared[key]
