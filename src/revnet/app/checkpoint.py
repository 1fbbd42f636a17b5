"""Checkpoints of a run on several ranks: written beside the training, whole or not at all, for any number of ranks."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.utils import _pytree as pytree

from revnet.app.errors import UserError
from revnet.app.run import writing

KEPT = 2


class Checkpoints:
    """The folder `checkpoints` of a run, with one folder per saved step.

    A checkpoint is written to a hidden folder, which gets its name when every rank has written its part.

    Args:
        path: The folder.
        group: A process group of its own, on the CPU: writing must not wait for the training's collectives.
    """

    def __init__(self, path: Path, group: dist.ProcessGroup) -> None:
        self.path = path
        self._group = group
        self._first = dist.get_rank() == 0
        self._writing: Future[Any] | None = None
        self._step = 0
        if self._first:
            for partial in path.glob(".step-*"):
                shutil.rmtree(partial, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps that can be resumed from, in order."""
        return sorted(int(folder.name.removeprefix("step-")) for folder in self.path.glob("step-*"))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Starts to write the state, after the one before is written; returns as soon as it is copied."""
        self.wait()
        # The next optimizer step writes to tensors on the CPU while they are still being saved.
        state = pytree.tree_map_only(Tensor, lambda x: x.clone() if x.device.type == "cpu" else x, state)
        partial = self.path / f".step-{step:08}"
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            found: Any = async_save(state, checkpoint_id=partial, process_group=self._group)
        self._step, self._writing = step, getattr(found, "upload_completion", found)
        if self._first:
            self._writing.add_done_callback(lambda future: self._publish(future, step))

    def _publish(self, future: Future[Any], step: int) -> None:
        """Gives a written checkpoint its name. Rank 0 is told when all ranks have written."""
        if future.exception() is not None:
            return
        (self.path / f".step-{step:08}").rename(self.path / f"step-{step:08}")
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self.path / f"step-{old:08}", ignore_errors=True)

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is there."""
        if self._writing is not None:
            written, self._writing = self._writing, None
            with writing(self.path):
                written.result()

    def load(self, state: dict[str, Any]) -> int:
        """Fills the state, sharded as it is, from the last checkpoint; returns its step."""
        found: list[Any] = [self.steps()]
        dist.broadcast_object_list(found, src=0, group=self._group)
        if not found[0]:
            raise UserError(f"{self.path.parent} has no checkpoint yet: start it anew with another --out")
        step: int = found[0][-1]
        folder = self.path / f"step-{step:08}"
        try:
            load(state, checkpoint_id=folder, process_group=self._group)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise UserError(
                f"{folder} is damaged ({str(error).splitlines()[0]}). Remove it to resume from the one before."
            ) from error
        return step


def cpu_group() -> dist.ProcessGroup:
    """A process group for what is not training."""
    return dist.new_group(backend="gloo")
