"""Checkpoints of a run on several ranks: written beside the training, whole or not at all, for any number of ranks."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.utils import _pytree as pytree

from revnet.app.errors import MachineError, UserError
from revnet.app.run import writing

KEPT = 2


class Checkpoints:
    """The folder `checkpoints` of a run, with one folder per saved step.

    A checkpoint is written to a hidden folder, which gets its name when every rank has written its
    part.

    Args:
        path: The folder.
        group: A process group of its own, on the CPU: writing must not wait for the training's
            collectives.
    """

    def __init__(self, path: Path, group: dist.ProcessGroup) -> None:
        self.path = path
        self._group = group
        self._first = dist.get_rank() == 0
        self._writing: Future[Any] | None = None
        self._published = threading.Event()
        self._last = -1
        if self._first:
            for partial in path.glob(".step-*"):
                shutil.rmtree(partial, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps that can be resumed from, in order."""
        return sorted(int(folder.name.removeprefix("step-")) for folder in self.path.glob("step-*"))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Starts to write the state, after the one before is written; returns as soon as it is copied."""
        self.wait()
        if step == self._last:
            return
        # The next optimizer step writes to tensors on the CPU while they are still being saved.
        state = pytree.tree_map_only(
            Tensor, lambda x: x.clone() if x.device.type == "cpu" else x, state
        )
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            found: Any = async_save(
                state, checkpoint_id=self.path / f".step-{step:08}", process_group=self._group
            )
        self._last, self._writing = step, getattr(found, "upload_completion", found)
        if self._first:
            self._published.clear()
            self._writing.add_done_callback(lambda written: self._publish(written, step))

    def _publish(self, written: Future[Any], step: int) -> None:
        """Gives a checkpoint its name. The first rank hears of the end when all ranks have written."""
        try:
            if written.exception() is None:
                (self.path / f".step-{step:08}").rename(self.path / f"step-{step:08}")
                for old in self.steps()[:-KEPT]:
                    shutil.rmtree(self.path / f"step-{old:08}", ignore_errors=True)
        finally:
            self._published.set()

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is there."""
        if self._writing is None:
            return
        written, self._writing = self._writing, None
        try:
            with writing(self.path):
                written.result()
        except CheckpointException as error:
            raise MachineError(
                f"cannot write {self.path}: {error}. What was saved before is as it was."
            ) from error
        if self._first:
            self._published.wait()

    def load(self, state: dict[str, Any]) -> int:
        """Fills the state, sharded as it is, from the last checkpoint; returns its step."""
        found: list[Any] = [self.steps()]
        dist.broadcast_object_list(found, src=0, group=self._group)
        if not found[0]:
            raise UserError(
                f"{self.path.parent} has no checkpoint yet: start it anew with another --out"
            )
        step: int = found[0][-1]
        self._last = step
        folder = self.path / f"step-{step:08}"
        try:
            load(state, checkpoint_id=folder, process_group=self._group)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise UserError(
                f"{folder} is damaged ({str(error).splitlines()[0]}). Remove it to resume from the "
                f"one before."
            ) from error
        return step


def cpu_group() -> dist.ProcessGroup:
    """A process group for what is not training."""
    return dist.new_group(backend="gloo")
