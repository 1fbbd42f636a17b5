"""`torchrun … -m revnet train`: the same training on several ranks, by DDP or FSDP2.

Every rank runs the same program. What it writes besides checkpoints, all but the first rank write
to a folder that goes with them, and what it shows only the first rank shows.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from rich.markup import escape
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
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
from revnet.app.run import Run
from revnet.app.terminal import complain
from revnet.app.train import INTERRUPTED, LOG_EVERY, Training, interruptible, loop, resume, start

T = TypeVar("T")


class _Shadow(Run):
    """The run as all ranks but the first have it: it reads the run's folder, and writes to one of its own."""

    def __init__(self, path: Path, run: Path) -> None:
        super().__init__(path)
        self._run = run

    def read_json(self, name: str) -> Any:
        """Reads a JSON file of the run."""
        return Run(self._run).read_json(name)

    def forget_after(self, step: int) -> None:
        """Nothing: the rows are the first rank's."""


class _Display(Display):
    """Counts the tokens of all ranks."""

    def step(self, step: int, bits: float, rate: float, last: bool) -> None:
        """Progress after `step` steps."""
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
            self._find_plan()
        self._net: Any = self.model
        if config.parallel == "fsdp":
            # Of this device, because FSDP2 would move the weights to an accelerator that --device
            # leaves alone; of this group, because one that the mesh made would wait for a lost rank
            # for half an hour.
            mesh = DeviceMesh.from_group(dist.group.WORLD, self.device.type)  # type: ignore[arg-type]
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
        self.checkpoints = Checkpoints(_folder(run) / "checkpoints", cpu_group())

    def _find_plan(self) -> None:
        """The plan that the run has, or one that all ranks make together, before the network is sharded."""
        path = _folder(self.run) / "plan.json"
        if _from_first(
            lambda: (
                path.exists() and self.run.read_json("config.json")["memory"] == self.config.memory
            )
        ):
            self.model.layers.execution = revnet.Plan.load(path)
        else:
            super().plan(new=True)

    def plan(self, new: bool) -> None:
        """Nothing: there is a plan since before the network was sharded."""

    def read_batch(self, step: int) -> tuple[Array, Array]:
        """This rank's training examples of a step."""
        return step_batch(
            self.data, step, self.config.batch, self.config.seed, self._rank, self._world
        )

    def loss(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Bits per token of this rank's examples."""
        if torch.is_grad_enabled():
            # Each rank drops other features.
            torch.manual_seed(torch.initial_seed() % 2**40 + (self._rank << 40))
        with self.precision():
            return bits_per_token(self._net, prefix, tokens)

    def take_step(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """One optimizer step; the loss before it, of all ranks."""
        loss = super().take_step(prefix, tokens)
        dist.all_reduce(loss)
        return loss / self._world

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out bits per token of all ranks' shares; every rank makes as many forward passes as any other."""
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
        """Writes a row with the tokens per second of all ranks."""
        if "tokens_per_second" in row:
            row = row | {"tokens_per_second": row["tokens_per_second"] * self._world}
        super().log(row)

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
        """Starts to write the checkpoint, and writes the weights that `revnet sample` reads."""
        self.check()
        self.checkpoints.save(self.step, self._state())
        weights: Any = get_model_state_dict(
            self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if self._rank == 0:
            self.run.write_weights(weights)

    def keep(self) -> None:
        """Nothing: the other ranks do not know, and would have to save too."""

    def resume(self) -> None:
        """Goes back to the last checkpoint, whichever number of ranks wrote it."""
        state = self._state()
        # The groups' settings are the program's own.
        found = state | {"optimizer": {"state": state["optimizer"]["state"]}}
        self.step = self.checkpoints.load(found)
        if self.step >= self.config.steps:
            raise UserError(
                f"the run has taken all of its {self.step} steps: ask for more with --steps"
            )
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
        """Whether any rank was told to stop, so that all stop after the same step."""

        def answer() -> bool:
            if self.step % LOG_EVERY and self.step < self.config.steps:
                return False
            told = torch.tensor(int(stop()))
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._control)
            return bool(told)

        return answer


def _from_first(fn: Callable[[], T]) -> T:
    """What `fn` returns on the first rank, on all ranks; what the user can put right there is raised on all ranks."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = fn()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


def _folder(run: Run) -> Path:
    return run._run if isinstance(run, _Shadow) else run.path


def train(given: dict[str, Any], resumed: str | None) -> int:
    """Trains as `revnet.app.train.train` does, on all ranks; returns this rank's exit code."""
    first = int(os.environ["RANK"]) == 0
    try:
        with (
            _ranks(given, resumed) as attempt,
            tempfile.TemporaryDirectory(prefix="revnet-") as scratch,
        ):
            return _train(given, resumed, attempt, Path(scratch))
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
        if not _is_lost(error):
            raise
        rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
        complain(
            f"rank {rank} of {world} lost another rank ({first_line(error)}). "
            "Continue from the last checkpoint with --resume, on any number of ranks."
        )
        # Threads of the process group may wait for the lost rank for ever.
        os._exit(1)


def _is_lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        sign in text
        for sign in ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out")
    )


@contextmanager
def _ranks(given: dict[str, Any], resumed: str | None) -> Iterator[int]:
    """A process group; gives the number of times that torchrun has started the ranks."""
    config = TrainConfig(**given)
    timeout = timedelta(seconds=config.rank_timeout)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    attempt = _attempt(store, rank, world, timeout)
    saved = Run.open(resumed).read_json("config.json") if resumed else {}
    cuda = ({"device": config.device} | saved | given)[
        "device"
    ] != "cpu" and torch.cuda.is_available()
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


def _attempt(store: Store, rank: int, world: int, timeout: timedelta) -> int:
    """The number of this start of all ranks, on which they agree.

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


def _train(given: dict[str, Any], resumed: str | None, attempt: int, scratch: Path) -> int:
    training = _make(given, resumed, attempt, scratch)
    config, data, run = training.config, training.data, training.run
    first, world = dist.get_rank() == 0, dist.get_world_size()
    with _Display(config.steps, data.unit, quiet=not first) as display, interruptible() as told:
        stop = training.agreed(told)
        parameters = sum(parameter.numel() for parameter in training.model.parameters())
        display.say(
            f"[bold]{escape(data.name)}[/]: {data.counts['train']:,} examples, "
            f"{data.counts['held_out']:,} held out. Depth {config.depth}, width {config.width}, "
            f"{parameters:,} parameters by {config.parallel.upper()} on {world} ranks of "
            f"{training.device.type}. {f'From step {training.step}. ' if training.step else ''}Run "
            f"folder [bold]{escape(str(run.path))}[/]."
        )
        loop(training, display, stop)
        training.save()
        training.checkpoints.wait()
        training.draw_loss()
        if training.step < config.steps:
            display.say(
                f"Stopped at step {training.step}. Continue with: revnet train --resume "
                f"{escape(str(run.path))}"
            )
            return INTERRUPTED
        report.samples(training)
        display.say(f"Done. Look at {escape(str(run.path))}.")
    return 0


def _make(
    given: dict[str, Any], resumed: str | None, attempt: int, scratch: Path
) -> ParallelTraining:
    """The training that was asked for; after a restart by torchrun, the one that was under way."""
    first = dist.get_rank() == 0

    def create(out: str | None, name: str) -> Run:
        path = Path(_from_first(lambda: str(Run.create(out, name).path)))
        return Run(path) if first else _Shadow(scratch, path)

    def find(path: str) -> Run:
        run = Run.open(path)
        return run if first else _Shadow(scratch, run.path)

    if resumed is None and attempt > 1:
        if given.get("out") is None:
            raise UserError(
                "torchrun restarted the ranks, but without --out they cannot know which run was "
                "theirs"
            )
        run = Path(given["out"])
        if _from_first(lambda: bool(saved_steps(run / "checkpoints"))):
            resumed, given = given["out"], {}
        elif first:
            # It died before its first checkpoint.
            (run / "config.json").unlink(missing_ok=True)
    dist.barrier()
    if resumed is not None:
        return resume(resumed, given, ParallelTraining, find)
    return start(given, ParallelTraining, create)
