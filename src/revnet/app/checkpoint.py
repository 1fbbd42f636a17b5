"""Checkpoints of a run on several ranks, for any number of ranks.

They are written beside the training, whole or not at all.
"""

from __future__ import annotations

import re
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

from revnet.app.checkpoint_reader import CheckpointPlanner, CheckpointReader
from revnet.app.errors import MachineError, UserError, first_line
from revnet.app.writing import check_own_folder, writing

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
        self._unpublished: OSError | None = None
        self._last = -1
        check_own_folder(path)
        if self._first:
            for partial in path.glob(".step-*"):
                _remove(partial)

    def steps(self) -> list[int]:
        """Return the steps that can be resumed from, in order."""
        return saved_steps(self.path)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Start to write the state when the one before is written; return when it is copied."""
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
        """Name a checkpoint. The first rank hears of the end when all ranks have written."""
        try:
            if written.exception() is None:
                # What has this name was left by a run that went on from an older checkpoint.
                _remove(self.path / f"step-{step:08}")
                (self.path / f".step-{step:08}").rename(self.path / f"step-{step:08}")
                for old in self.steps()[:-KEPT]:
                    _remove(self.path / f"step-{old:08}")
        except OSError as error:
            self._unpublished = error
        finally:
            self._published.set()

    def wait(self) -> None:
        """Return when the checkpoint that is being written is there."""
        if self._writing is None:
            return
        written, self._writing = self._writing, None
        try:
            with writing(self.path):
                written.result()
                if self._first:
                    self._published.wait()
                    if self._unpublished is not None:
                        raise self._unpublished
        except CheckpointException as error:
            raise MachineError(
                f"cannot write {self.path}: {_cause(error)}. What was saved before is as it was."
            ) from error

    def load(self, state: dict[str, Any]) -> int:
        """Fill the state, sharded as it is, from the last checkpoint; return its step."""
        found: list[Any] = [self.steps()]
        dist.broadcast_object_list(found, src=0, group=self._group)
        if not found[0]:
            raise UserError(
                f"{self.path.parent} has no checkpoint yet: start it anew with another --out"
            )
        step: int = found[0][-1]
        self._last = step
        folder = self.path / f"step-{step:08}"
        reader = CheckpointReader(folder)
        try:
            self._read_metadata(reader)
            load(
                state,
                storage_reader=reader,
                planner=CheckpointPlanner(),
                process_group=self._group,
            )
            if type(state["step"]) is not int or state["step"] != step:
                raise ValueError("it is the checkpoint of another step")
        except (CheckpointException, ValueError) as error:
            raise UserError(
                f"{folder} is damaged ({_cause(error)}). Remove it to resume from the one before."
            ) from error
        return step

    def _read_metadata(self, reader: CheckpointReader) -> None:
        """Read the metadata on every rank, or raise ValueError on every rank.

        torch would write a traceback before it raises.
        """
        cause = None
        try:
            reader.read_metadata()
        except Exception as error:
            # Unpickling damaged bytes raises anything.
            cause = first_line(error)
        causes: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(causes, cause, group=self._group)
        for found in causes:
            if found is not None:
                raise ValueError(found)


def saved_steps(path: Path) -> list[int]:
    """Return the steps whose checkpoints are in a folder, in order."""
    if path.is_symlink() or not path.is_dir():
        return []
    named = [
        (re.fullmatch(r"step-([0-9]{8,18})", folder.name), folder) for folder in path.iterdir()
    ]
    return sorted(
        int(match[1])
        for match, folder in named
        # A number with more digits than are written would be another name.
        if match and folder.name == f"step-{int(match[1]):08}" and _is_own_folder(folder)
    )


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    """Remove a folder with what is in it, or whatever else has that name."""
    if _is_own_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _cause(error: BaseException) -> str:
    """Return what went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    return first_line(error)


def cpu_group() -> dist.ProcessGroup:
    """Return a process group for what is not training."""
    return dist.new_group(backend="gloo")
