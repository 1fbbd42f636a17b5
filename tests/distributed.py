"""Real processes for the distributed tests: gloo ranks on this machine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank_main(
    rank: int, fn: Callable[..., None], world_size: int, store: str, args: tuple[Any, ...]
) -> None:
    warnings.simplefilter("error")
    # FSDP2 would take an accelerator where there is one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        fn(rank, world_size, *args)
        # A rank that leaves early would break the others' last collective.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def start_ranks(fn: Callable[..., None], world_size: int, *args: Any) -> Any:
    """Starts `fn(rank, *args)` in fresh processes, forked off a server: importing torch outlasts
    most tests.
    """
    multiprocessing.set_forkserver_preload(
        ["torch.distributed.fsdp", "torch.testing", "revnet.testing"]
    )
    return mp.start_processes(fn, args, world_size, join=False, start_method="forkserver")


def run_ranks(fn: Callable[..., None], world_size: int, *args: Any, timeout: float = 120.0) -> None:
    """Runs `fn(rank, world_size, *args)` in `world_size` fresh gloo processes, and returns when all
    have.

    Args:
        fn: a function at module level (it is pickled by name).
        world_size: number of processes.
        *args: further arguments, picklable.
        timeout: seconds until the ranks are ended and the test fails.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; carries that rank's traceback.
        TimeoutError: the ranks did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        context = start_ranks(_rank_main, world_size, fn, world_size, store, args)
        end = time.monotonic() + timeout
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{fn.__name__} did not end on {world_size} ranks within {timeout:.0f} s"
                    )
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
