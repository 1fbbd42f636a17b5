"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from revnet.app import digits
from revnet.app.config import TrainConfig
from revnet.app.data import Images, step_batch
from revnet.app.display import Display, memory_table
from revnet.app.errors import UserError
from revnet.app.measure import EXECUTIONS, executed, reconstruction_error, step_memory
from revnet.app.model import Shape, Transformer, bits_per_token
from revnet.app.plots import loss_plot, sample_grid
from revnet.app.run import Run, replacing
from revnet.app.sample import Sampling, images_of

INTERRUPTED = 130
LOG_EVERY = 10
HELD_OUT_EXAMPLES = 512
JUDGED = 400


def find_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is the accelerator where there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed; pressing it twice raises KeyboardInterrupt."""
    pressed = False

    def handle(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Training:
    """A model, its optimizer and its data, and the steps that take them from here to there."""

    def __init__(self, config: TrainConfig, data: Images, run: Run) -> None:
        self.config, self.data, self.run = config, data, run
        self.device = find_device(config.device)
        self.step = 0
        torch.manual_seed(config.seed)
        self.shape = Shape(
            depth=config.depth,
            width=config.width,
            heads=config.heads,
            prefix_vocab=data.words.vocab,
            prefix_length=data.words.length,
            vocab=data.patches.vocab,
            rows=data.patches.rows,
            columns=data.patches.columns,
            dropout=config.dropout,
        )
        self.model = Transformer(self.shape, execution=config.execution).to(self.device)
        decayed = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.95),
            fused=True,
        )

    def learning_rate(self) -> float:
        """Rises over the first twentieth of the steps, then falls to a twentieth of its peak along a cosine."""
        done = self.step / self.config.steps
        warm = min(1.0, (done + 1 / self.config.steps) * 20)
        return self.config.lr * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def tensors(self, batch: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """A batch on the device."""
        prefix, tokens = (torch.from_numpy(array).to(self.device, non_blocking=True) for array in batch)
        return prefix, tokens

    def train_batch(self) -> tuple[Tensor, Tensor]:
        """The examples of the next step."""
        return self.tensors(step_batch(self.data, self.step, self.config.batch, self.config.seed))

    def loss(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Bits per token under the run's autocast."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return bits_per_token(self.model, prefix, tokens)

    def take_step(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """One optimizer step; the loss before it."""
        # Randomness that follows from the step alone needs no saving, and nothing between two steps can disturb it.
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

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out bits per token and the reconstruction error of its last batch, without dropout."""
        self.model.eval()
        numbers = np.arange(min(self.data.counts["held_out"], HELD_OUT_EXAMPLES))
        total = 0.0
        for part in np.array_split(numbers, math.ceil(len(numbers) / self.config.batch)):
            batch = self.tensors(self.data.batch("held_out", part, np.zeros(len(part))))
            total += float(self.loss(*batch)) * len(part)
        self.model.train()
        return {"held_out_bits": total / len(numbers), "reconstruction_error": reconstruction_error(self.model, *batch)}

    def save(self) -> None:
        """Writes the checkpoint and the weights."""
        state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with replacing(self.run.path / "checkpoint.pt") as file:
            torch.save(state, file)
        with replacing(self.run.path / "weights.safetensors") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}))

    def draw_plots(self, samples: bool) -> None:
        """Draws loss.png, and samples.png where asked."""
        loss_plot(self.run.path / "loss.png", self.run.metrics(), "image token")
        if samples:
            images = images_of(self.model, self.data.words, self.data.patches, self.data.show, 10, Sampling())
            sample_grid(self.run.path / "samples.png", self.data.show, images)


def train(config: TrainConfig) -> int:
    """Trains as `config` says and returns the exit code."""
    data = digits.load()
    config = config.resolve(digits.DEFAULTS)
    run = Run.create(config.out, data.name)
    training = Training(config, data, run)
    run.write_json("config.json", asdict(config) | {"out": str(run.path), "shape": asdict(training.shape)})
    run.write_json("data.json", data.spec)
    with Display(config.steps, "image token") as display, interruptible() as stop:
        parameters = sum(parameter.numel() for parameter in training.model.parameters())
        display.say(
            f"[bold]{data.name}[/]: {data.counts['train']:,} examples, {data.counts['held_out']:,} held out. "
            f"Depth {config.depth}, width {config.width}, {parameters:,} parameters on {training.device}. "
            f"Run folder [bold]{run.path}[/]."
        )
        loop(training, display, stop)
        training.save()
        training.draw_plots(samples=not stop())
        if stop():
            display.say(f"Stopped at step {training.step}; saved in {run.path}.")
            return INTERRUPTED
    finish(training, display)
    return 0


def loop(training: Training, display: Display, stop: Callable[[], bool]) -> None:
    """Steps, logs, validations and checkpoints until the last step or until `stop` says so."""
    config, run = training.config, training.run
    since, tokens = time.perf_counter(), 0
    while training.step < config.steps and not stop():
        batch = training.train_batch()
        loss = training.take_step(*batch)
        tokens += batch[1].numel()
        step, last = training.step, training.step == config.steps
        if step % LOG_EVERY == 0 or step == 1 or last:
            bits = float(loss)
            if not math.isfinite(bits):
                raise UserError(f"the loss is {bits} at step {step}: try a smaller --lr")
            rate = tokens / (time.perf_counter() - since)
            since, tokens = time.perf_counter(), 0
            run.log({"step": step, "bits": bits, "lr": training.learning_rate(), "tokens_per_second": round(rate)})
            display.step(step, bits, rate)
        if step % config.validate_every == 0 or last:
            run.log({"step": step} | training.validate())
            training.draw_plots(samples=False)
        if step % config.save_every == 0 and not last:
            training.save()
            training.draw_plots(samples=True)


def finish(training: Training, display: Display) -> None:
    """Measures the memory of the run against other executions, reads the generated digits, and prints both."""
    batch = training.train_batch()
    rows = []
    for name in EXECUTIONS:
        with executed(training.model, name):
            report = step_memory(training.model, lambda: training.loss(*batch))
        rows.append((name, report.saved_bytes, report.peak_bytes))
    wanted = np.arange(JUDGED) % 10
    captions = [digits.NAMES[digit] for digit in wanted]
    images = images_of(training.model, training.data.words, training.data.patches, captions, 1, Sampling(seed=1))
    share, accuracy = digits.share_read(images[:, 0], wanted)
    training.run.write_json(
        "result.json",
        {
            "memory": [{"execution": name, "kept_bytes": kept, "peak_bytes": peak} for name, kept, peak in rows],
            "digits_read_as_captioned": share,
            "classifier_accuracy_on_real_digits": accuracy,
        },
    )
    display.console.print(memory_table("Activation memory of one training step", rows))
    display.say(
        f"\n[bold]{share:.1%}[/] of {JUDGED} generated digits are read as their caption says, by a classifier "
        f"that reads {accuracy:.1%} of real held-out digits right.\n"
        f"Look at {training.run.path / 'samples.png'}, or draw more:\n"
        f'  revnet sample {training.run.path} "three" "a handwritten eight" --out digits.png'
    )
