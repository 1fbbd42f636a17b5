"""A training: a network, its optimizer and its data, and one step after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

import revnet
from revnet.app.config import TrainConfig
from revnet.app.data import Array, Data, step_batch
from revnet.app.device import find_device
from revnet.app.errors import UserError
from revnet.app.measure import reconstruction_error
from revnet.app.model import Shape, Transformer, bits_per_token
from revnet.app.plots import loss_plot
from revnet.app.run import Run, check_tensors, damaged_checkpoint
from revnet.app.tracker import Tracker

HELD_OUT_TOKENS = 50_000


class Training:
    """A model, its optimizer and its data, and the steps that take them from here to there."""

    def __init__(self, config: TrainConfig, data: Data, run: Run) -> None:
        self.config, self.data, self.run = config, data, run
        self.device = find_device(config.device)
        self.step = 0
        torch.manual_seed(config.seed)
        self.shape = shape_of(config, data)
        self.model = Transformer(self.shape, execution=config.execution, streams=config.streams)
        self.model.to(self.device)
        if config.compile:
            self.model.layers.compile()
        self.optimizer = self.make_optimizer()
        self._tracker: Tracker | None = None
        self._start = time.perf_counter()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW, which decays matrices only."""
        decayed = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=self.config.lr,
            betas=(0.9, 0.95),
            fused=True,
        )

    def learning_rate(self) -> float:
        """Return the learning rate of the next step.

        It rises over the first twentieth of the steps, then falls to a twentieth of its peak along
        a cosine.
        """
        done = self.step / self.config.steps
        warm = min(1.0, (done + 1 / self.config.steps) * 20)
        return self.config.lr * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def read_batch(self, step: int) -> tuple[Array, Array]:
        """Return the training examples of a step."""
        return step_batch(self.data, step, self.config.batch, self.config.seed)

    def tensors(self, batch: tuple[Array, Array]) -> tuple[Tensor, Tensor]:
        """Return a batch on the device."""
        prefix, tokens = (
            torch.from_numpy(array).to(self.device, non_blocking=True) for array in batch
        )
        return prefix, tokens

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Enter the run's autocast."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"
        ):
            yield

    def eager(self) -> AbstractContextManager[Any]:
        """Run compiled branches as written: each length of a sample would be compiled anew."""
        return torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()

    def loss(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Return the bits per token."""
        with self.precision():
            return bits_per_token(self.model, prefix, tokens)

    def take_step(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Take one optimizer step, and return the loss before it."""
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
        """Return the examples of a validation: a small split, or some from all over a large one."""
        count = self.data.counts["held_out"]
        some = min(count, max(1, HELD_OUT_TOKENS // self.shape.length))
        return np.linspace(0, count, some, endpoint=False, dtype=np.int64)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the bits per token of up to 50,000 held-out tokens.

        Where streams may be float, also the reconstruction error.
        """
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
        """Write a row with its step and time to metrics.jsonl, and report it where asked."""
        self.run.log(
            {"step": self.step, "seconds": round(time.perf_counter() - self._start, 1)} | row
        )
        if self._tracker is not None:
            self._tracker.log(self.step, row)

    def track(self, known: Mapping[str, str]) -> dict[str, str]:
        """Begin to report what is logged; return what services call the run.

        Args:
            known: What they called it before.
        """
        self._tracker = Tracker(self.config, self.run, known)
        return self._tracker.known

    def end_tracking(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Report how the training has ended; the arguments are those of `__exit__`."""
        if self._tracker is not None:
            end = "finished" if self.step >= self.config.steps else "stopped"
            if kind is not None:
                end = "stopped" if kind is KeyboardInterrupt else "failed"
            self._tracker.close(end)

    def is_finite(self) -> bool:
        """Return whether no weight is NaN or infinite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def check_finite(self) -> None:
        """Raise where saving would replace good weights by NaN or infinity."""
        if not self.is_finite():
            advice = (
                f"try a smaller --lr than {self.config.lr:g}. What was saved before is as it was."
            )
            raise UserError(f"weights are not numbers any more at step {self.step}: {advice}")

    def save(self) -> None:
        """Write the checkpoint and the weights."""
        self.check_finite()
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        self.run.write_checkpoint({"step": self.step, "model": model, "optimizer": optimizer})

    def keep(self) -> None:
        """Save where an example cannot be read, which says nothing about the steps before it."""
        self.save()

    def resume(self) -> None:
        """Go back to where the run was saved last."""
        weights = self.model.state_dict()
        # The weights, and the two averages of AdamW.
        most = 3 * sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        state = self.run.read_checkpoint(self.device, most)
        try:
            self.step = _step_of(state)
            check_tensors(state.get("model"), weights)
            averages = self._checked_averages(state.get("optimizer"))
        except ValueError as error:
            raise damaged_checkpoint(self.run.path / "checkpoint.pt", str(error)) from error
        self.check_unfinished(str(self.run.path))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": averages})
        self.run.forget_after(self.step)
        rows = self.run.metrics()
        if rows:
            self._start -= rows[-1].get("seconds", 0.0)

    def check_unfinished(self, name: str) -> None:
        """Raise unless there are steps to take."""
        if self.step >= self.config.steps:
            raise UserError(
                f"{name} has taken all of its {self.step} steps: ask for more with --steps"
            )

    def _checked_averages(self, found: Any) -> dict[int, dict[str, Tensor]]:
        """Return AdamW's state, copied: its tensors must not share memory."""
        state = found.get("state") if isinstance(found, dict) else None
        if not isinstance(state, dict):
            raise ValueError("it has no state of the optimizer")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.step and state.keys() != set(range(len(parameters))):
            raise ValueError("it has the state of another optimizer")
        averages = {}
        for number, values in state.items():
            parameter = parameters[number]
            step = torch.zeros((), dtype=torch.float32)
            check_tensors(values, {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter})
            if float(values["step"]) < 0 or bool((values["exp_avg_sq"] < 0).any()):
                raise ValueError("it has a negative number of steps or average of squares")
            averages[number] = {name: value.clone() for name, value in values.items()}
        return averages

    def choose_executions(self, new: bool) -> None:
        """Choose the executions that fit `--memory`.

        A resumed run keeps its plan, and so its rounding, unless the plan shall be `new`.
        """
        plan = None if new else self.run.load_plan()
        if plan is None:
            plan = self._make_plan()
            self.run.save_plan(plan)
        try:
            self.model.layers.execution = plan
        except ValueError as error:
            raise UserError(f"{self.run.path / 'plan.json'}: {error}") from error

    def _make_plan(self) -> revnet.Plan:
        prefix, tokens = self.tensors(self.read_batch(self.step))
        x, keywords = self.model.embed(prefix, tokens[:, :-1])
        try:
            with self.precision():
                return revnet.plan(self.model.layers, x.detach(), self.config.memory, **keywords)
        except (revnet.ReversibleError, ValueError) as error:
            raise UserError(f"--memory {self.config.memory}: {error}") from error

    def draw_loss(self) -> None:
        """Draw loss.png."""
        with self.run.new_file("loss.png") as file:
            loss_plot(file, self.run.metrics(), self.data.unit)


def shape_of(config: TrainConfig, data: Data) -> Shape:
    """Return the size of the network that a run trains."""
    return Shape(
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        dropout=config.dropout,
        **data.shape,
    )


def _step_of(state: dict[str, Any]) -> int:
    step = state.get("step")
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError("its step is no number of steps")
    return step
