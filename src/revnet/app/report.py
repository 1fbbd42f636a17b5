"""What a run shows for itself: samples, memory, and how far the model follows its captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from revnet._sizes import format_bytes, free_bytes
from revnet.app.data import Array, Images, digits
from revnet.app.display import Display
from revnet.app.errors import count
from revnet.app.measure import executed, step_memory
from revnet.app.model import example_bits
from revnet.app.plots import sample_grid
from revnet.app.sample import Sampling, images_of, texts_of
from revnet.app.terminal import visible_line
from revnet.app.training import Training

JUDGED = 400
PAIRS = 512
COMPARED = 8000
NAMES = {"store": "stored", "invert": "reversible"}


@dataclass
class MemoryRow:
    """Activation memory of a step in bytes: kept after the forward pass, and at the peak.

    Of what is kept, `blocks` is what the blocks keep; the rest is of embeddings and loss.
    """

    name: str
    blocks: int
    kept: int
    peak: int
    estimated: bool


def marked_up(name: object) -> str:
    """Return a name as it is shown: one line, no control characters, no markup."""
    return escape(visible_line(name))


def machine_of(training: Training) -> str:
    """Return where a training runs, and with how many threads of a CPU."""
    if training.device.type != "cpu":
        return f"on {training.device}"
    return f"on {count(training.config.threads, 'CPU thread')}"


def opening(training: Training, machine: str) -> str:
    """Return the first line that a training shows; `machine` says where and how it runs."""
    config, data = training.config, training.data
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    since = f"From step {training.step}. " if training.step else ""
    return (
        f"[bold]{marked_up(data.name)}[/]: {data.counts['train']:,} examples, "
        f"{data.counts['held_out']:,} held out. Depth {config.depth}, width {config.width}, "
        f"{parameters:,} parameters {machine}. {since}Run folder "
        f"[bold]{marked_up(training.run.path)}[/]."
    )


def stopped(training: Training) -> str:
    """Return the last line of a training that was interrupted."""
    return (
        f"Stopped at step {training.step}. Continue with: revnet train --resume "
        f"{marked_up(training.run.path)}"
    )


def measure_executions(training: Training) -> list[MemoryRow]:
    """Measure stored and checkpointed execution beside the run's own, on one batch of the run.

    What would take more than half of the free memory is estimated from a batch of one example.
    """
    execution = training.model.layers.execution
    own = NAMES.get(execution, execution) if isinstance(execution, str) else "planned"
    batch = training.tensors(training.read_batch(training.step))
    with executed(training.model, "none"):
        rest = step_memory(training.model, lambda: training.loss(*batch)).saved_bytes
    rows = []
    for name in dict.fromkeys(("stored", "checkpointed", own)):
        with executed(training.model, execution if name == own else name):
            one = step_memory(training.model, lambda: training.loss(*(part[:1] for part in batch)))
            times = len(batch[0])
            room = free_bytes(training.device) / 2
            estimated = name != own and one.peak_bytes * times > room
            found = one if estimated else step_memory(training.model, lambda: training.loss(*batch))
        times = times if estimated else 1
        kept, peak = found.saved_bytes * times, found.peak_bytes * times
        rows.append(MemoryRow(name, max(0, kept - rest), kept, peak, estimated))
    return rows


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """Return a table of the activation memory of each execution, the run's own last."""
    table = Table(
        title="Activation memory of one training step",
        caption="Above weights, gradients and optimizer state.",
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=SIMPLE,
    )
    table.add_column("execution", no_wrap=True)
    for name in ("kept by\nblocks", "by embeddings\nand loss", "peak", "blocks\n/ stored"):
        table.add_column(name, justify="right", no_wrap=True)
    stored = max(1, next(row.blocks for row in rows if row.name == "stored"))
    for row in rows:
        about = "~" if row.estimated else ""
        name = f"[bold]{row.name}[/] (this run)" if row is rows[-1] else row.name
        table.add_row(
            name,
            about + format_bytes(row.blocks),
            about + format_bytes(row.kept - row.blocks),
            about + format_bytes(row.peak),
            f"{row.blocks / stored:.2f}",
        )
    return table


def draw_samples(training: Training, last: bool = True) -> None:
    """Draw samples.png, or for a text write samples.txt; before the `last`, with the step."""
    name = "samples" if last else f"samples-{training.step:08}"
    data, model, run = training.data, training.model, training.run
    if isinstance(data, Images):
        with training.eager():
            images = images_of(model, data.words, data.patches, data.show, 10, Sampling())
        with run.new_file(f"{name}.png") as file:
            sample_grid(file, data.show, [("", images)])
        return
    with training.eager():
        texts = texts_of(model, data.spec["show"], model.shape.length, Sampling())
    with run.new_file(f"{name}.txt") as file:
        file.write("\n\n----\n\n".join(texts).encode())


def close(training: Training, display: Display, rows: list[MemoryRow]) -> None:
    """Draw the last samples, judge them, and print what was found."""
    data, run = training.data, training.run
    with display.working("drawing samples"):
        draw_samples(training)
    display.console.print(memory_table(rows))
    found: dict[str, Any] = {"memory": [asdict(row) for row in rows]}
    own_digits = training.config.data == ["digits"]
    if own_digits and isinstance(data, Images):
        with display.working("judging samples"):
            found |= judge_digits(training, data)
        display.say(
            f"\n[bold]{found['read_as_captioned']:.1%}[/] of {JUDGED} generated digits are read as "
            f"their caption says, by a classifier that reads {found['classifier_accuracy']:.1%} of "
            f"real held-out digits right.",
            wrap=True,
        )
    elif isinstance(data, Images):
        with display.working("judging samples"):
            found |= judge_captions(training, data)
            draw_held_out(training, data)
        if found["pairs"]:
            display.say(
                f"\nA held-out image is likelier under its own caption than under another one in "
                f"[bold]{found['own_caption_likelier']:.1%}[/] of {count(found['pairs'], 'pair')}.",
                wrap=True,
            )
        display.say(
            f"Held-out captions beside the nearest training image: "
            f"{marked_up(run.path / 'held_out.png')}"
        )
    else:
        with display.working("judging held-out text"):
            found |= judge_text(training)
        display.say(
            f"\n[bold]{found['held_out_bits']:.3f}[/] bits per byte of {found['held_out_bytes']:,} "
            f"held-out bytes, {training.shape.length} at a time.",
            wrap=True,
        )
    run.write_json("result.json", found)
    words = "".join(f' "{caption}"' for caption in ("three", "a handwritten eight") if own_digits)
    folder = marked_up(run.path)
    kind = "png" if isinstance(data, Images) else "txt"
    display.say(f"Look at {folder}/samples.{kind}, or draw more:\n  revnet sample {folder}{words}")


def judge_digits(training: Training, data: Images) -> dict[str, float]:
    """Return how many generated digits a classifier reads as captioned, and its accuracy."""
    wanted = np.arange(JUDGED) % 10
    captions = [digits.NAMES[digit] for digit in wanted]
    with training.eager():
        images = images_of(training.model, data.words, data.patches, captions, 1, Sampling(seed=1))
    share, accuracy = digits.share_read(images[:, 0], wanted)
    return {"read_as_captioned": share, "classifier_accuracy": accuracy}


def judge_captions(training: Training, data: Images) -> dict[str, float]:
    """Return in how many pairs an image is likelier under its caption than under another's."""
    most = min(PAIRS, data.counts["held_out"])
    prefix, tokens = data.batch("held_out", np.arange(most), np.zeros(most))
    other = np.roll(prefix, 1, axis=0)
    differ = (other != prefix).any(axis=1)
    own, others = (_bits(training, captions, tokens) for captions in (prefix, other))
    likelier = own[differ] < others[differ]
    return {
        "own_caption_likelier": float(likelier.mean()) if len(likelier) else 0.0,
        "pairs": int(differ.sum()),
    }


def judge_text(training: Training) -> dict[str, float]:
    """Return the bits per byte of the held-out text, all of it up to 2^20 bytes."""
    most = min(training.data.counts["held_out"], 2**20 // training.shape.length)
    batch = training.data.batch("held_out", np.arange(most), np.zeros(most))
    return {"held_out_bits": float(_bits(training, *batch).mean()), "held_out_bytes": batch[1].size}


@torch.no_grad()
def _bits(training: Training, prefix: Array, tokens: Array) -> Array:
    """Return the bits per token of each example, without dropout."""
    training.model.eval()
    found = []
    for start in range(0, len(tokens), training.config.batch):
        part = slice(start, start + training.config.batch)
        with training.precision():
            found.append(
                example_bits(training.model, *training.tensors((prefix[part], tokens[part]))).cpu()
            )
    training.model.train()
    return torch.cat(found).numpy()


def draw_held_out(training: Training, data: Images) -> None:
    """Draw held_out.png: for held-out captions the real image, four samples, and their neighbours.

    Copies of training images would show as equal neighbours.
    """
    shown = min(12, data.counts["held_out"])
    numbers = data.splits["held_out"][:shown]
    captions = [data.captions[i][0] for i in numbers]
    real = np.stack([data.load(i) for i in numbers])[:, None]
    with training.eager():
        drawn = images_of(training.model, data.words, data.patches, captions, 4, Sampling())
    candidates = np.random.default_rng(0).permutation(data.splits["train"])[:COMPARED]
    known = np.stack([data.load(i) for i in candidates])
    flat = known.reshape(len(known), -1).astype(np.float32)
    queries = drawn.reshape(-1, flat.shape[1]).astype(np.float32)
    nearest = ((flat**2).sum(axis=1) - 2 * queries @ flat.T).argmin(axis=1)
    neighbours = known[nearest].reshape(drawn.shape)
    groups = [("real", real), ("drawn", drawn), ("nearest in training, in this order", neighbours)]
    with training.run.new_file("held_out.png") as file:
        sample_grid(file, captions, groups)
