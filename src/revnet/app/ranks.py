"""The processes that torchrun starts: how they find each other, agree, and notice a loss."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from revnet.app.config import TrainConfig
from revnet.app.errors import MachineError, UserError
from revnet.app.run import Run

T = TypeVar("T")


def are_started() -> bool:
    """Return whether this process is one of several, by what torchrun sets."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


@contextmanager
def joined(given: dict[str, Any], resumed: str | None) -> Iterator[int]:
    """Join a process group; yield the number of times that torchrun has started the ranks."""
    config = TrainConfig(**given)
    timeout = timedelta(seconds=config.rank_timeout)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    attempt = count_attempts(store, rank, world, timeout)
    device = config.device
    if resumed is not None and "device" not in given:
        device = Run.open(resumed).read_config()[0].device
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # torchrun keeps its store through restarts, and with it the addresses of ranks that are gone.
    store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    # A branch that ends in a linear layer returns a view; couplings work out of place, so no hook
    # is lost.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    try:
        yield attempt
    finally:
        # Only where nothing went wrong: destroying waits for the other ranks.
        if sys.exc_info()[0] is None:
            dist.barrier()
            dist.destroy_process_group()


def count_attempts(store: Store, rank: int, world: int, timeout: timedelta) -> int:
    """Return the number of this start of all ranks, on which they agree.

    TORCHELASTIC_RESTART_COUNT is each host's own: a host whose ranks are stopped because others
    failed counts nothing.
    """
    end, known = time.monotonic() + timeout.total_seconds(), 0
    if rank == 0:
        known = store.add("attempt", 1)
    while time.monotonic() < end:
        current = store.add("attempt", 0)
        if rank and current != known:
            # It may be an earlier one, which the first rank has yet to close by counting on.
            known = current
            store.add(f"arrived-{current}", 1)
        arrived = store.add(f"arrived-{known}", 0)
        if rank == 0 and arrived == world - 1:
            store.set(f"complete-{known}", "")
            return known
        # Those of an earlier start that was complete are one too many now.
        if rank and arrived == world - 1 and store.check([f"complete-{known}"]):
            return known
        time.sleep(0.02)
    raise dist.DistStoreError(f"timed out waiting for {world} ranks to start")


def from_first(fn: Callable[[], T]) -> T:
    """Call `fn` on the first rank, and return what it returns on all ranks.

    What ends the command in one line is raised on all ranks, too.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = fn()
        except (UserError, MachineError) as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def is_lost(error: RuntimeError) -> bool:
    """Return whether an error says that another rank has gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        sign in text
        for sign in ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out")
    )
