"""`torchrun … -m revnet train`: the same training on several ranks, by DDP or FSDP2.

Every rank runs the same program. Only the first rank writes, besides checkpoints, and shows
progress.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import revnet
from revnet.app import report
from revnet.app.checkpoint import Checkpoints, cpu_group, saved_steps
from revnet.app.config import TrainConfig
from revnet.app.data import Array, Data, step_batch
from revnet.app.display import Display
from revnet.app.errors import DataError, MachineError, UserError, first_line
from revnet.app.model import bits_per_token
from revnet.app.ranks import from_first, is_lost, joined
from revnet.app.run import Run
from revnet.app.terminal import complain
from revnet.app.train import INTERRUPTED, LOG_EVERY, interruptible, loop, resume, start
from revnet.app.training import Training


class _ReadOnlyRun(Run):
    """The run as all ranks but the first have it: they read its folder, and write nothing."""

    @contextmanager
    def new_file(self, name: str) -> Iterator[BinaryIO]:
        """Yield a file that goes nowhere."""
        yield io.BytesIO()

    def save_plan(self, plan: revnet.Plan) -> None:
        """Do nothing: the plan is the first rank's."""

    def log(self, row: dict[str, Any]) -> None:
        """Do nothing: the rows are the first rank's."""

    def metrics(self) -> list[dict[str, Any]]:
        """Return nothing: the rows are the first rank's."""
        return []


class _Display(Display):
    """Progress that counts the tokens of all ranks."""

    def step(self, step: int, bits: float, rate: float, last: bool) -> None:
        """Show progress after `step` steps."""
        super().step(step, bits, rate * dist.get_world_size(), last)


class ParallelTraining(Training):
    """One rank's part of a training: its share of every batch, its shards of the state."""

    def __init__(self, config: TrainConfig, data: Data, run: Run) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        if config.batch % world:
            raise UserError(
                f"--batch is {config.batch}, which {world} ranks cannot share: take a multiple of "
                f"{world}"
            )
        super().__init__(config, data, run)
        self._rank, self._world = rank, world
        if config.memory:
            self._share_plan()
        self._net: Any = self.model
        if config.parallel == "fsdp":
            # Of this device, because FSDP2 would move the weights to an accelerator that --device
            # leaves alone; of this group, because one that the mesh made would wait for a lost rank
            # for half an hour.
            everyone: Any = dist.group.WORLD
            mesh = DeviceMesh.from_group(everyone, self.device.type)
            # By branch, so that the parts of a report that call branches directly find their
            # weights.
            for block in self.model.layers.blocks:
                for branch in block.children():
                    fully_shard(branch, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            self.optimizer = self.make_optimizer()
        else:
            self._net = DistributedDataParallel(self.model)
        self._control = cpu_group()
        self.checkpoints = Checkpoints(run.path / "checkpoints", cpu_group())

    def _share_plan(self) -> None:
        """Take the run's plan, or make one together, before the network is sharded."""
        path = self.run.path

        def is_planned() -> bool:
            if not (path / "plan.json").exists() or not (path / "config.json").exists():
                return False
            return Run(path).read_config()[0].memory == self.config.memory

        super().choose_executions(new=not from_first(is_planned))

    def choose_executions(self, new: bool) -> None:
        """Do nothing: there is a plan since before the network was sharded."""

    def read_batch(self, step: int) -> tuple[Array, Array]:
        """Return this rank's training examples of a step."""
        return step_batch(
            self.data, step, self.config.batch, self.config.seed, self._rank, self._world
        )

    def loss(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Return the bits per token of this rank's examples."""
        if torch.is_grad_enabled():
            # Each rank drops other features.
            torch.manual_seed(torch.initial_seed() % 2**40 + (self._rank << 40))
        with self.precision():
            return bits_per_token(self._net, prefix, tokens)

    def take_step(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Take one optimizer step, and return the loss before it, of all ranks."""
        loss = super().take_step(prefix, tokens)
        dist.all_reduce(loss)
        return loss / self._world

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the held-out bits per token of all ranks, each of which makes as many passes."""
        self.model.eval()
        numbers = self.held_out_numbers()
        each = self.config.batch // self._world
        total = torch.zeros((), dtype=torch.float64)
        for first in range(0, len(numbers), self.config.batch):
            mine = numbers[first + self._rank * each :][:each]
            # A rank with nothing left repeats an example, which does not count.
            part = mine if len(mine) else numbers[:1]
            batch = self.tensors(self.data.batch("held_out", part, np.zeros(len(part))))
            total += float(self.loss(*batch)) * len(mine)
        dist.all_reduce(total, group=self._control)
        self.model.train()
        return {"held_out_bits": float(total) / len(numbers)}

    def log(self, row: dict[str, Any]) -> None:
        """Write a row with the tokens per second of all ranks."""
        if "tokens_per_second" in row:
            row = row | {"tokens_per_second": row["tokens_per_second"] * self._world}
        super().log(row)

    def track(self, known: Mapping[str, str]) -> dict[str, str]:
        """Begin to report on the first rank; return what services call the run."""
        begin = super().track
        return from_first(lambda: begin(known))

    def is_finite(self) -> bool:
        """Return whether all weights of all ranks are numbers."""
        return self._are_finite(list(self.model.parameters()))

    def _are_finite(self, tensors: list[Tensor]) -> bool:
        own = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        found = torch.tensor(int(all(bool(x.isfinite().all()) for x in own)))
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self._control)
        return bool(found)

    def _optimizer_tensors(self) -> list[Tensor]:
        states = self.optimizer.state.values()
        return [x for state in states for x in state.values() if isinstance(x, Tensor)]

    def save(self) -> None:
        """Start to write the checkpoint, and write the weights that `revnet sample` reads."""
        self.check_finite()
        self.checkpoints.save(self.step, self._state())
        weights: Any = get_model_state_dict(
            self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if self._rank == 0:
            self.run.write_weights(weights)

    def keep(self) -> None:
        """Do nothing: the other ranks do not know, and would have to save too."""

    def resume(self) -> None:
        """Go back to the last checkpoint, whichever number of ranks wrote it."""
        state = self._state()
        # The groups' settings are the program's own.
        found = state | {"optimizer": {"state": state["optimizer"]["state"]}}
        self.step = self.checkpoints.load(found)
        self.check_unfinished("the run")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=found["model"],
            optim_state_dict=state["optimizer"] | found["optimizer"],
        )
        if not self._are_finite([*self.model.parameters(), *self._optimizer_tensors()]):
            raise UserError(
                f"{self.checkpoints.path}/step-{self.step:08} is damaged (its weights contain NaN "
                f"or infinity). Remove it to resume from the one before."
            )
        self.run.forget_after(self.step)

    def _state(self) -> dict[str, Any]:
        # Randomness and the place in the data follow from the step and the seed.
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def agreed(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return a function that says on all ranks after the same step whether one is to stop."""

        def answer() -> bool:
            if self.step % LOG_EVERY and self.step < self.config.steps:
                return False
            told = torch.tensor(int(stop()))
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._control)
            return bool(told)

        return answer


def train_on_ranks(given: dict[str, Any], resumed: str | None) -> int:
    """Train as `revnet.app.train.train_alone` does, on all ranks; return this rank's exit code."""
    first = int(os.environ["RANK"]) == 0
    try:
        with ExitStack() as held, joined(given, resumed) as attempt:
            training = _make(given, resumed, attempt, held)
            held.push(training.end_tracking)
            return _train_and_close(training)
    except DataError:
        raise
    except (UserError, MachineError):
        # Every rank met it; one says so.
        if first:
            raise
        return 2
    except revnet.ReversibleError as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if not is_lost(error):
            raise
        rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
        complain(
            f"rank {rank} of {world} lost another rank ({first_line(error)}). "
            "Continue from the last checkpoint with --resume, on any number of ranks."
        )
        # Threads of the process group may wait for the lost rank for ever.
        os._exit(1)


def _train_and_close(training: ParallelTraining) -> int:
    """Take all steps, or those until a signal; then save, and say what is there."""
    config = training.config
    first, world = dist.get_rank() == 0, dist.get_world_size()
    with (
        _Display(config.steps, training.data.unit, training.step, quiet=not first) as display,
        interruptible() as told,
    ):
        machine = f"by {config.parallel.upper()} on {world} ranks of {training.device.type}"
        display.say(report.opening(training, machine), wrap=True)
        loop(training, display, training.agreed(told))
        training.save()
        training.checkpoints.wait()
        training.draw_loss()
        if training.step < config.steps:
            display.reach(training.step)
            display.say(report.stopped(training))
            return INTERRUPTED
        report.draw_samples(training)
        display.say(f"Done. Look at {report.marked_up(training.run.path)}.")
    return 0


def _make(
    given: dict[str, Any], resumed: str | None, attempt: int, held: ExitStack
) -> ParallelTraining:
    """Return the training that was asked for, or after a restart the one that was under way."""
    first = dist.get_rank() == 0

    def hold(find: Callable[[], Run]) -> Run:
        """Let the first rank lock a run's folder, and all ranks have the run."""
        path = Path(from_first(lambda: str(held.enter_context(find().locked()).path)))
        return Run(path) if first else _ReadOnlyRun(path)

    if resumed is None and attempt > 1:
        if given.get("out") is None:
            raise UserError(
                "torchrun restarted the ranks, but without --out they cannot know which run was "
                "theirs"
            )
        run = Path(given["out"])
        if from_first(lambda: bool(saved_steps(run / "checkpoints"))):
            resumed, given = given["out"], {}
        elif first:
            # It died before its first checkpoint.
            (run / "config.json").unlink(missing_ok=True)
    dist.barrier()
    if resumed is not None:
        return resume(resumed, given, ParallelTraining, lambda path: hold(lambda: Run.open(path)))
    return start(
        given,
        ParallelTraining,
        lambda out, name: hold(lambda: Run.create(out, name, again=attempt > 1)),
    )
