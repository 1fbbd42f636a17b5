"""The training loop."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

import revnet
from revnet.app import report
from revnet.app.config import TrainConfig
from revnet.app.data import Array, Data, sources, step_batch
from revnet.app.device import find_device
from revnet.app.display import Display
from revnet.app.errors import DataError, UserError
from revnet.app.measure import reconstruction_error
from revnet.app.model import Attention, FeedForward, Shape, Transformer, bits_per_token
from revnet.app.plots import loss_plot
from revnet.app.run import Run, writing

INTERRUPTED = 130
# Windows has none.
HANGUP = getattr(signal, "SIGHUP", None)
LOG_EVERY = 10
HELD_OUT_TOKENS = 50_000


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether to stop: after Ctrl-C, SIGTERM, or a hangup.

    Ctrl-C or SIGTERM after one of these raises KeyboardInterrupt. A closed terminal may send
    several hangups, and a hangup that was ignored before, as by nohup, stays ignored.
    """
    stopping = False

    def handle(number: int, frame: object) -> None:
        nonlocal stopping
        if stopping and number != HANGUP:
            raise KeyboardInterrupt
        stopping = True

    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
        numbers.append(HANGUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Training:
    """A model, its optimizer and its data, and the steps that take them from here to there."""

    def __init__(self, config: TrainConfig, data: Data, run: Run) -> None:
        self.config, self.data, self.run = config, data, run
        self.device = find_device(config.device)
        self.step = 0
        torch.manual_seed(config.seed)
        self.shape = Shape(
            depth=config.depth,
            width=config.width,
            heads=config.heads,
            dropout=config.dropout,
            **data.shape,
        )
        self.model = Transformer(self.shape, execution=config.execution, streams=config.streams).to(
            self.device
        )
        if config.compile:
            for module in self.model.modules():
                if isinstance(module, Attention | FeedForward):
                    module.compile()
        self.optimizer = self.make_optimizer()
        self._board = _board(run) if config.tensorboard else None
        self._start = time.perf_counter()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, which decays matrices only."""
        decayed = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=self.config.lr,
            betas=(0.9, 0.95),
            fused=True,
        )

    def learning_rate(self) -> float:
        """Rises over the first twentieth of the steps, then falls to a twentieth of its peak along a cosine."""
        done = self.step / self.config.steps
        warm = min(1.0, (done + 1 / self.config.steps) * 20)
        return self.config.lr * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def read_batch(self, step: int) -> tuple[Array, Array]:
        """The training examples of a step."""
        return step_batch(self.data, step, self.config.batch, self.config.seed)

    def tensors(self, batch: tuple[Array, Array]) -> tuple[Tensor, Tensor]:
        """A batch on the device."""
        prefix, tokens = (
            torch.from_numpy(array).to(self.device, non_blocking=True) for array in batch
        )
        return prefix, tokens

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The run's autocast."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"
        ):
            yield

    def eager(self) -> AbstractContextManager[Any]:
        """Runs compiled branches as they are written: every length of a sample would be compiled anew."""
        return torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()

    def loss(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Bits per token."""
        with self.precision():
            return bits_per_token(self.model, prefix, tokens)

    def take_step(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """One optimizer step; the loss before it."""
        # Randomness that follows from the step alone needs no saving, and nothing between two steps
        # can disturb it.
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.loss(prefix, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def held_out_numbers(self) -> Array:
        """The examples that a validation reads: all of a small split, otherwise some from all over it."""
        count = self.data.counts["held_out"]
        some = min(count, max(1, HELD_OUT_TOKENS // self.shape.length))
        return np.linspace(0, count, some, endpoint=False, dtype=np.int64)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Bits per token of up to 50,000 held-out tokens; in float streams also the reconstruction error."""
        self.model.eval()
        numbers = self.held_out_numbers()
        total = 0.0
        for part in np.array_split(numbers, math.ceil(len(numbers) / self.config.batch)):
            batch = self.tensors(self.data.batch("held_out", part, np.zeros(len(part))))
            total += float(self.loss(*batch)) * len(part)
        found = {"held_out_bits": total / len(numbers)}
        if self.config.streams == "float" or (
            self.config.streams == "auto" and self.config.dtype == "float32"
        ):
            with self.precision():
                found["reconstruction_error"] = reconstruction_error(self.model, *batch)
        self.model.train()
        return found

    def log(self, row: dict[str, Any]) -> None:
        """Adds the step and its time to a row and writes it to metrics.jsonl, and for TensorBoard where asked."""
        self.run.log(
            {"step": self.step, "seconds": round(time.perf_counter() - self._start, 1)} | row
        )
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, self.step)
            self._board.flush()

    def is_finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def check(self) -> None:
        """Raises where saving would replace what is good by weights that are not numbers."""
        if not self.is_finite():
            advice = (
                f"try a smaller --lr than {self.config.lr:g}. What was saved before is as it was."
            )
            raise UserError(f"weights are not numbers any more at step {self.step}: {advice}")

    def save(self) -> None:
        """Writes the checkpoint and the weights."""
        self.check()
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        self.run.write_checkpoint({"step": self.step, "model": model, "optimizer": optimizer})

    def keep(self) -> None:
        """Saves where an example cannot be read, which says nothing about the steps before it."""
        self.save()

    def resume(self) -> None:
        """Goes back to where the run was saved last."""
        state = self.run.read_checkpoint(self.device)
        self.step = state["step"]
        if self.step >= self.config.steps:
            raise UserError(
                f"{self.run.path} has taken all of its {self.step} steps: ask for more with --steps"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.run.forget_after(self.step)
        if rows := self.run.metrics():
            self._start -= rows[-1]["seconds"]

    def plan(self, new: bool) -> None:
        """Chooses the executions that fit `--memory`; a resumed run keeps its plan, and so its rounding."""
        plan(self, new)

    def draw_loss(self) -> None:
        """Draws loss.png."""
        loss_plot(self.run.path / "loss.png", self.run.metrics(), self.data.unit)


def _board(run: Run) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs its package: pip install 'revnet[tensorboard]'"
        ) from None
    return SummaryWriter(run.path / "tensorboard")


T = TypeVar("T", bound=Training)


def start(
    given: dict[str, Any], make: type[T], create: Callable[[str | None, str], Run] = Run.create
) -> T:
    """A new training from the options that were `given`."""
    config = TrainConfig(**given)
    find_device(config.device)
    data, defaults = sources.load(config)
    config = config.resolve(defaults)
    run = create(config.out, data.name)
    training = make(config, data, run)
    if config.memory:
        training.plan(new=True)
    run.write_json("data.json", data.spec)
    run.write_json(
        "config.json", asdict(config) | {"out": str(run.path), "shape": asdict(training.shape)}
    )
    return training


def resume(
    path: str, given: dict[str, Any], make: type[T], find: Callable[[str], Run] = Run.open
) -> T:
    """The training that was saved in a run's folder; the options `given` may change only what is not learned."""
    run = find(path)
    saved = run.read_json("config.json")
    for item in fields(TrainConfig):
        if item.name in given and given[item.name] != saved[item.name] and not item.metadata["own"]:
            flag = item.name.replace("_", "-")
            raise UserError(f"--{flag} is {saved[item.name]} in {path}: a resumed run keeps it")
    config = TrainConfig(**{item.name: (saved | given)[item.name] for item in fields(TrainConfig)})
    spec = run.read_json("data.json")
    data, _ = sources.load(config, spec)
    if data.spec["fingerprint"] != spec["fingerprint"]:
        raise UserError(
            f"the data of {path} has changed since it was started: {' '.join(config.data)}"
        )
    training = make(config, data, run)
    training.resume()
    if config.memory:
        training.plan(new="memory" in given)
    run.write_json("config.json", asdict(config) | {"shape": asdict(training.shape)})
    return training


def plan(training: Training, new: bool) -> None:
    """Chooses the executions that fit `--memory`; a resumed run keeps its plan, and so its rounding."""
    path = training.run.path / "plan.json"
    if not new and path.exists():
        try:
            training.model.layers.execution = revnet.Plan.load(path)
        except ValueError as error:
            raise UserError(f"{error}. Give another --memory to plan anew.") from error
        return
    prefix, tokens = training.tensors(training.read_batch(training.step))
    x, keywords = training.model.embed(prefix, tokens[:, :-1])
    try:
        with training.precision():
            found = revnet.plan(
                training.model.layers, x.detach(), training.config.memory, **keywords
            )
    except (revnet.ReversibleError, ValueError) as error:
        raise UserError(f"--memory {training.config.memory}: {error}") from error
    training.model.layers.execution = found
    with writing(path):
        found.save(path)


def train(given: dict[str, Any], resumed: str | None = None) -> int:
    """Trains with the options `given`, possibly from where an earlier run was saved, and returns the exit code."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        from revnet.app import parallel

        return parallel.train(given, resumed)
    try:
        return _train(given, resumed)
    except revnet.ReversibleError as error:
        raise UserError(str(error)) from error


def _train(given: dict[str, Any], resumed: str | None) -> int:
    training = resume(resumed, given, Training) if resumed else start(given, Training)
    config, data, run = training.config, training.data, training.run
    with Display(config.steps, data.unit) as display, interruptible() as stop:
        parameters = sum(parameter.numel() for parameter in training.model.parameters())
        display.say(
            f"[bold]{escape(data.name)}[/]: {data.counts['train']:,} examples, "
            f"{data.counts['held_out']:,} held out. Depth {config.depth}, width {config.width}, "
            f"{parameters:,} parameters on {training.device}. "
            f"{f'From step {training.step}. ' if resumed else ''}Run folder "
            f"[bold]{escape(str(run.path))}[/]."
        )
        memory = report.memory(training)
        if not resumed:
            training.log({f"{row.name}_peak_bytes": row.peak for row in memory})
        loop(training, display, stop)
        training.save()
        training.draw_loss()
        if stop():
            display.say(
                f"Stopped at step {training.step}. Continue with: revnet train --resume "
                f"{escape(str(run.path))}"
            )
            return INTERRUPTED
    report.close(training, display, memory)
    return 0


def loop(training: Training, display: Display, stop: Callable[[], bool]) -> None:
    """Steps, logs, validations and checkpoints until the last step or until `stop` says so."""
    config = training.config
    since, tokens = time.perf_counter(), 0
    with _keeping(training), ThreadPoolExecutor(1, "batches") as reader:
        coming = reader.submit(training.read_batch, training.step)
        while training.step < config.steps and not stop():
            batch = training.tensors(coming.result())
            coming = reader.submit(training.read_batch, training.step + 1)
            loss = training.take_step(*batch)
            tokens += batch[1].numel()
            step, last = training.step, training.step == config.steps
            if step % LOG_EVERY == 0 or step == 1 or last:
                bits = float(loss)
                if not math.isfinite(bits):
                    raise UserError(
                        f"the loss is {bits} at step {step}: try a smaller --lr than {config.lr:g}"
                    )
                rate = tokens / (time.perf_counter() - since)
                since, tokens = time.perf_counter(), 0
                training.log(
                    {"bits": bits, "lr": training.learning_rate(), "tokens_per_second": round(rate)}
                )
                display.step(step, bits, rate, last)
            if step % config.validate_every == 0 or last:
                training.log(training.validate())
                training.draw_loss()
            if step % config.save_every == 0 and not last:
                training.save()
                report.samples(training)


@contextmanager
def _keeping(training: Training) -> Iterator[None]:
    try:
        yield
    except DataError:
        training.keep()
        raise
