"""What does memory buy: at equal memory and equal time, which network learns best?

    python benchmarks/equal_memory.py --seconds 60 --out runs/memory                  # CUDA
    python benchmarks/equal_memory.py --size tiny --budget 0.25 --seconds 100 --threads 1

Language models of bytes, as in `quality_lm.py`. An arm is a form and a number of layers; the
ordinary network is checkpointed layer by layer, the others compute their activations again by
inversion. The activations of one sequence, above weights, gradients and the state of the optimizer,
may take --budget MiB, which decides how long a context is: `form:layers` has the longest one that
fits, `form:layers@context` has this one. All arms train for --seconds by the fastest of several
steps, which run in turn, so that a busy machine favours none; a step of the optimizer has about as
many bytes in every arm. The sequences of a step run at once, as they would on as many devices with
one sequence each: on a single one, an ordinary network whose sequences fit one by one needs no
other memory. Held-out bytes are the same for all arms, cut into windows of their context.

What is finished is kept in --out, and a benchmark that was ended goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import quality_lm as lm
import torch
from _race import opening, timed
from torch import Tensor, nn

import revnet

MIB = 2**20
ARMS = ("ordinary:4", "ordinary:8", "ordinary:16", "branch-copy:8", "branch-copy:16",
        "layer-copy:8", "layer-copy:16")  # fmt: skip
GRID = 8  # contexts are multiples of it


@dataclass
class Arm:
    """A form of the network, its layers, and what fits and is done in the time given."""

    form: str
    layers: int
    context: int = 0  # 0 until it is known
    bytes: float = 0.0  # of activations, for each byte of context
    seconds: float = math.inf  # of a step
    steps: int = 0

    @classmethod
    def parse(cls, text: str) -> Arm:
        form, _, size = text.partition(":")
        layers, _, context = size.partition("@")
        return cls(form, int(layers), int(context or 0))

    @property
    def name(self) -> str:
        return f"{self.form.replace('/', '_')}_{self.layers}x{self.context}"

    @property
    def execution(self) -> str:
        return "checkpoint" if self.form == "ordinary" else "invert"


# --- what fits, and how long it takes


def activations(arm: Arm, size: lm.Size, context: int, device: str) -> int:
    """Return the bytes that forward and backward of one sequence take, gradients excepted."""
    model = lm.Model(arm.form, replace(size, context=context), 0, arm.execution).to(device)
    tokens = torch.randint(256, (1, context), device=device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def step() -> None:
        # Without its cache, as casts of all weights at once are no activations.
        with torch.autocast(device, torch.bfloat16, device == "cuda", cache_enabled=False):
            loss = lm.bits_of(model, tokens, tokens)
        loss.backward()

    step()
    return revnet.measure_memory(step).peak_bytes


def fit(arm: Arm, size: lm.Size, budget: float, device: str) -> None:
    """Find the bytes for each byte of context, and with them the longest context that fits."""
    near = 512
    few, many = (activations(arm, size, context, device) for context in (near, 2 * near))
    arm.bytes = (many - few) / near
    arm.context = arm.context or int(budget / arm.bytes) // GRID * GRID
    if not arm.context:
        raise SystemExit(f"{arm.form}, {arm.layers} layers: {GRID} bytes do not fit")


def clock(arms: list[Arm], text: lm.Text, options: argparse.Namespace) -> None:
    """Note the seconds of a step of each arm: the fastest of some that run in turn."""
    steps = []
    for arm in arms:
        size = options.of(arm)
        model = lm.Model(arm.form, size, 0, arm.execution).to(options.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        steps.append(lambda m=model, o=optimizer, s=size: step(m, o, text, s, options.device))
    for turn in range(options.turns + 1):
        for arm, run in zip(arms, steps, strict=True):
            seconds = timed(run, options.device)
            if turn:  # the first one warms up
                arm.seconds = min(arm.seconds, seconds)
    for arm in arms:
        arm.steps = max(1, int(options.seconds / arm.seconds))


def step(
    model: lm.Model, optimizer: torch.optim.Optimizer, text: lm.Text, size: lm.Size, device: str
) -> None:
    """Take the step of `lm.train`."""
    bits = lm.bits_of(model, *lm.batch(text.train, size, 0, device))
    optimizer.zero_grad()
    bits.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def planned(text: lm.Text, options: argparse.Namespace) -> list[Arm]:
    """Return the arms with their contexts and steps, which are kept for when it goes on."""
    path = options.out / "plan.json"
    arms = [Arm.parse(text) for text in options.arms]
    if path.exists():
        known = [Arm(**given) for given in json.loads(path.read_text())]
        if [(arm.form, arm.layers) for arm in arms] != [(arm.form, arm.layers) for arm in known]:
            raise SystemExit(f"{path} has other arms: choose another --out")
        return known
    for arm in arms:
        fit(arm, options.of(arm), options.budget * MIB, options.device)
    clock(arms, text, options)
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(arm) for arm in arms]))
    return arms


# --- training


def windows(data: Tensor, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets: all bytes after the first once, in rows of the context or less."""
    last = len(data) - 1
    whole = last // context * context
    if whole:
        yield data[:whole].view(-1, context), data[1 : whole + 1].view(-1, context)
    if whole < last:
        yield data[None, whole:last], data[None, whole + 1 :]


@torch.no_grad()
def held_out(model: lm.Model, text: lm.Text, size: lm.Size, device: str, count: int) -> float:
    """Return the bits per byte of the first held-out bytes, in windows of the context."""
    data = text.held_out[: count + 1].to(device, torch.int64)
    model.eval()
    total = 0.0
    for inputs, targets in windows(data, size.context):
        rows = zip(inputs.split(size.batch), targets.split(size.batch), strict=True)
        total += sum(lm.bits_of(model, x, y).item() * y.numel() for x, y in rows)
    model.train()
    return total / (len(data) - 1)


def train_all(arms: list[Arm], text: lm.Text, options: argparse.Namespace) -> None:
    """Train what is missing, all arms with one seed before the next seed."""
    end = time.monotonic() + 60 * options.minutes
    for seed in range(options.seeds):
        for arm in arms:
            run = lm.Run(arm.form, options.rate, seed)
            of_arm = argparse.Namespace(
                shape=options.of(arm), device=options.device, execution=arm.execution,
                out=options.out / arm.name, evaluations=options.held_out, compile=False,
                capture=False,
            )  # fmt: skip
            if (of_arm.out / run.name / "result.json").exists():
                continue
            if time.monotonic() > end or not lm.train(run, text, of_arm, end, held_out):
                return
            print(arm.name, seed, "done", flush=True)
            write_report(arms, text, options)


# --- the report


def table(arms: list[Arm], options: argparse.Namespace) -> list[str]:
    lines = [
        "| form | layers | context | activations a byte, KiB | parameters | ms a step | steps | "
        "million bytes | seconds | bits per byte | seeds | above the best ordinary, % |",
        "|" + "---|" * 12,
    ]
    found = {arm.name: lm.results(options.out / arm.name) for arm in arms}
    bits = {name: {run["seed"]: run["bits"] for run in runs} for name, runs in found.items()}
    ordinary = [arm.name for arm in arms if arm.form == "ordinary" and bits[arm.name]]
    best = min(ordinary, key=lambda name: statistics.fmean(bits[name].values()), default="")
    for arm in arms:
        if not found[arm.name]:
            lines.append(f"| {arm.form} | {arm.layers} | {arm.context} | not trained |" + " |" * 8)
            continue
        size = options.of(arm)
        more = ""
        if arm.name != best and bits.get(best, {}).keys() & bits[arm.name].keys():
            mean, half, _ = lm.paired(bits[arm.name], bits[best])
            more = f"{mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")
        runs = found[arm.name]
        seconds = statistics.median(run["curve"][-1]["seconds"] for run in runs)
        seen = arm.steps * size.batch * size.context / 1e6
        lines.append(
            f"| {arm.form} | {arm.layers} | {arm.context} | {arm.bytes / 1024:.2f} | "
            f"{runs[0]['parameters']:,} | {1e3 * arm.seconds:.1f} | {arm.steps} | {seen:.2f} | "
            f"{seconds:.0f} | {statistics.fmean(bits[arm.name].values()):.4f} | {len(runs)} | "
            f"{more} |"
        )
    return lines


def write_report(arms: list[Arm], text: lm.Text, options: argparse.Namespace) -> None:
    size = options.of(arms[0])
    precision = "bfloat16 autocast" if options.device == "cuda" else "float32"
    lines = [
        *opening(
            "What does memory buy, at equal memory and equal time?",
            options.hardware,
            f"; {precision}, residual streams float32.",
        ),
        f"Language models of bytes of width {size.width}, on {len(text.train):,} bytes of Python "
        f"sources (sha256 begins with {text.digest}). The activations of one sequence, forward and "
        f"backward, may take {options.budget:g} MiB; weights, gradients and AdamW's state, 16 "
        "bytes a parameter, come on top. The ordinary network is checkpointed by layer, the "
        f"others are inverted. Every arm has the steps that fit into {options.seconds:g} s by the "
        f"fastest of {options.turns} steps, at about {options.tokens:,} bytes each, at rate "
        f"{options.rate:g}. Bits per byte are those of the first {options.held_out:,} held-out "
        "bytes, in windows of the arm's context. Seconds are those that training then took.",
        "",
        *table(arms, options),
    ]
    (options.out / "report.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=lm.SIZES, default="6M" if cuda else "tiny")
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="FORM:LAYERS[@CONTEXT]")
    parser.add_argument("--budget", type=float, default=8 if cuda else 0.25, help="MiB a sequence")
    parser.add_argument("--seconds", type=float, default=120, help="of training for each arm")
    parser.add_argument("--tokens", type=int, help="bytes of a step; those of --size by default")
    parser.add_argument("--rate", type=float, default=2e-3 if cuda else 6e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5, help="steps that are timed")
    parser.add_argument("--held-out", type=int, default=2**19 if cuda else 2**16, help="bytes")
    parser.add_argument("--megabytes", type=float, default=400, help="of text, at most")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which it stops")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    here = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    parser.add_argument("--hardware", default=here, help="as the report names it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    base = lm.SIZES[options.size]
    options.tokens = options.tokens or base.batch * base.context

    def of(arm: Arm) -> lm.Size:
        context = arm.context or base.context
        return replace(base, layers=arm.layers, context=context, steps=arm.steps,
                       batch=max(1, round(options.tokens / context)))  # fmt: skip

    options.of = of
    text = lm.python_sources(int(options.megabytes * 1e6))
    arms = planned(text, options)
    train_all(arms, text, options)
    write_report(arms, text, options)
    print((options.out / "report.md").read_text())


if __name__ == "__main__":
    main()
