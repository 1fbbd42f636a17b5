"""How many bytes does a token take, and how long a sequence fits one GPU?

python benchmarks/long_context.py --out benchmarks/results/long_context_h100.md
python benchmarks/long_context.py --tokens 1048576 --blocks 2 4
python benchmarks/long_context.py --shape 8B --blocks 2 --dummy-weights --limit 79
python benchmarks/long_context.py --device cpu --out benchmarks/results/long_context_cpu.md

The network is that of examples/long_context.py: heads in groups, the MLP in tiles, the loss in
chunks. Its rivals are the ordinary residual network of the same branches, checkpointed per layer,
with the same groups, tiles and loss by nested checkpoints; the inputs of its layers stay on the
device, or go to pinned host memory. First the gradients of every arm are compared with those of
stored execution of its network, in float64. Arms run one after the other, as they do not fit a GPU
together; the report is written anew after each. Depth adds weights alone: with `--dummy-weights`
a few blocks run beside memory for the weights of all, and "whole device" is what the whole network
takes. On the CPU no step is timed; there, the bytes per token are then compared with the arithmetic
of docs/long_context.md, and the host time of a tile is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import importlib.util
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _bytes
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import revnet

EXAMPLE = Path(__file__).parents[1] / "examples" / "long_context.py"
sys.path.insert(0, str(EXAMPLE.parent))
# By its path, as it has the name of this file.
_spec = importlib.util.spec_from_file_location("long_context_example", EXAMPLE)
_example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_example)
LongContext = _example.LongContext

GIB = 2**30
# Of the networks of width 128 that the arithmetic is compared with: as many widths as in "1.2B".
HIDDEN = 344
# Vocabulary, width, heads, heads of keys and values, groups, hidden, tile, chunk; blocks, tokens.
SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "small": ((64, 64, 4, 4, 4, 128, 256, 256), 2, 2048),
    "1.2B": ((32768, 2048, 16, 16, 8, 5504, 4096, 4096), 24, 524288),
    "8B": ((131072, 4096, 32, 8, 8, 14336, 4096, 4096), 32, 524288),
}
# No branch draws random numbers, whose states would be kept on the CPU.
again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Ordinary(LongContext):
    """The residual network of one stream with the same branches, checkpointed per layer."""

    stored = False
    # Around the layers: what they save may go elsewhere.
    around: Callable[[], Any] = contextlib.nullcontext

    def trunk(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        layers: list[list[Any]] = [[]]
        for step in self.steps:
            layers[-1].append(step)
            if step.target == 1:
                layers.append([])
        with self.around():
            for layer in layers[:-1]:
                x = self.layer(layer, x, turn) if self.stored else again(self.layer, layer, x, turn)
        return x

    def layer(self, steps: list[Any], x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        run = (lambda fn, *given: fn(*given)) if self.stored else again
        *groups, mlp = steps
        total = x
        for group in groups:
            total = total + run(group.fn, x, turn)
        tiles = total.split(mlp.tile.size, 1)
        return torch.cat([tile + run(mlp.fn, tile) for tile in tiles], 1)


def stored(model: LongContext) -> None:
    """Keep every activation."""
    if isinstance(model, Ordinary):
        model.stored, model.around = True, contextlib.nullcontext
    else:
        model.steps.execution = "store"


def offloaded() -> Any:
    """Return the context of TRL that copies activations to the host beside compute."""
    from trl.models.activation_offloading import OffloadActivations

    return OffloadActivations()


# Of each arm: the network, its streams, and the context of its layers.
ARMS: dict[str, tuple[type[LongContext], str, Callable[[], Any]]] = {
    "reversible, fixed": (LongContext, "fixed", contextlib.nullcontext),
    "reversible, float": (LongContext, "float", contextlib.nullcontext),
    "checkpoint per layer": (Ordinary, "float", contextlib.nullcontext),
    "checkpoint, save_on_cpu": (Ordinary, "float", lambda: save_on_cpu(pin_memory=PIN)),
    "checkpoint, TRL offload": (Ordinary, "float", offloaded),
}
PIN = torch.cuda.is_available()


def made(arm: str, shape: str, blocks: int, device: str, dtype: torch.dtype) -> LongContext:
    """Return the network of an arm; the same weights for every arm."""
    kind, streams, around = ARMS[arm]
    vocabulary, width, heads, kv_heads, groups, hidden, tile, chunk = SHAPES[shape][0]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    # Weights in float32 first would be twice as large.
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(vocabulary, width, blocks, heads, kv_heads, groups, hidden, tile, chunk)
    finally:
        torch.set_default_dtype(before)
    if isinstance(model, Ordinary):
        model.around = around
    fixed = revnet.Fixed(fraction_bits=37) if dtype is torch.float64 else revnet.Fixed()
    model.steps.streams = fixed if streams == "fixed" else "float"
    return model


def text_for(tokens: int, shape: str, device: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(SHAPES[shape][0][0], (1, tokens + 1), device=device)


def examine(arm: str, device: str) -> float:
    """Return the largest relative error of a gradient, in float64, against stored execution."""
    model = made(arm, "small", 2, device, torch.float64)
    twin = copy.deepcopy(model)
    stored(twin)
    text, gradients = text_for(600, "small", device), []
    for each in (twin, model):
        each(text).backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    return max(((a - b).norm() / b.norm()).item() for b, a in zip(*gradients, strict=True))


def fill_gradients(model: nn.Module, sgd: bool) -> None:
    """Give every parameter a gradient, beside which the rest counts, or apply it in backward."""

    def apply(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=1e-4)
        parameter.grad = None

    for parameter in model.parameters():
        if sgd:
            parameter.register_post_accumulate_grad_hook(apply)
        else:
            parameter.grad = torch.zeros_like(parameter)


def ballast(model: LongContext, shape: str, sgd: bool) -> Tensor:
    """Return as much memory as the weights, and gradients, of the blocks that do not run."""
    steps = SHAPES[shape][0][4] + 1
    block = sum(parameter.nbytes for step in model.steps[:steps] for parameter in step.parameters())
    count = SHAPES[shape][1] - len(model.steps) // steps
    device = model.head.weight.device
    return torch.zeros(block * count * (1 if sgd else 2), dtype=torch.uint8, device=device)


def pinned() -> int:
    """Return the bytes of pinned host memory, at most since the last reset."""
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def counts_pinned() -> bool:
    """Check that pinned memory is counted: a zero would say nothing otherwise."""
    held = torch.empty(2**16, dtype=torch.uint8, pin_memory=True)
    return pinned() >= held.nbytes


def gib(size: int) -> str:
    return f"{size / GIB:.3f}"


def row(
    arm: str, shape: str, blocks: int, tokens: int, rounds: int, device: str, dummy: bool = False
) -> str:
    """Measure one arm at one size; an arm that does not fit says so."""
    sgd = shape == "8B"
    start = f"| {arm} | {blocks} | {tokens:,} |"
    model = None
    try:
        model = made(arm, shape, blocks, device, torch.bfloat16)
        if dummy:
            # An attribute, so that it lives as long as the model.
            model.ballast = ballast(model, shape, sgd)
        fill_gradients(model, sgd)
        text = text_for(tokens, shape, device)
        model(text[:, :129]).backward()  # Warm up.
        if device == "cpu":
            peak = revnet.measure_memory(lambda: model(text).backward()).peak_bytes
            found = ["–", "–", "–", "–"]
        else:
            peak, found = measured(lambda: model(text).backward(), rounds)
        return f"{start} {gib(peak)} | {peak / tokens / SHAPES[shape][0][1]:.1f} | " + (
            " | ".join(found) + " |"
        )
    except torch.OutOfMemoryError:
        return f"{start} out of memory | – | – | – | – | – |"
    finally:
        model = None
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


def measured(step: Callable[[], None], rounds: int) -> tuple[int, list[str]]:
    """Return the peak of a step on a GPU above what is held, and the other columns of its row."""
    seconds: list[float] = []
    counted = counts_pinned()
    torch.cuda.synchronize()
    # What the warm-up left in the cache is in pieces of other sizes.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_host_memory_stats()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(1 + rounds):
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    whole, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    took = f"{statistics.median(seconds):.2f}"
    host = f"{pinned() / GIB:.2f}" if counted else "not counted"
    return whole - before, [took, host, gib(whole), gib(reserved)]


def slope(arm: str, blocks: int, groups: int, counts: tuple[int, int], keep: bool = False) -> float:
    """Return by how many bytes an element of one more token raises the peak of a step.

    Args:
        arm: which of the arms.
        blocks: of the network.
        groups: of its heads.
        counts: two numbers of tokens.
        keep: whether every activation is kept.
    """
    width, peaks = 128, []
    kind, streams, _ = ARMS[arm]
    for tokens in counts:
        torch.manual_seed(0)
        model = kind(64, width, blocks, 8, 8, groups, HIDDEN, 256, 256).bfloat16()
        model.steps.streams = streams
        if keep:
            stored(model)
        fill_gradients(model, sgd=False)
        text = text_for(tokens, "small", "cpu")
        model(text[:, :300]).backward()
        peaks.append(revnet.measure_memory(lambda m=model, t=text: m(t).backward()).peak_bytes)
    return (peaks[1] - peaks[0]) / (counts[1] - counts[0]) / width


def compared(start: str, expected: float, found: float) -> str:
    """Return a row of a table of arithmetic and measurement."""
    line = f"| {start} | {expected:.1f} | {found:.1f} | {100 * (found / expected - 1):+.1f} % |"
    print(line, flush=True)
    return line


def bytes_per_token() -> list[str]:
    """Compare the arithmetic with the peak, as it grows from one number of tokens to another."""
    lines = [
        "| streams | groups | bytes per token and element, by the arithmetic | measured | off |",
        "|---|---|---|---|---|",
    ]
    for streams in ("fixed", "float"):
        for groups in (1, 2, 4, 8):
            found = slope(f"reversible, {streams}", 2, groups, (8192, 12288))
            expected = _bytes.reversible(streams, groups, 1.0)
            lines.append(compared(f"{streams} | {groups}", expected, found))
    return lines


def bytes_by_depth() -> list[str]:
    """Compare the arithmetic of every way to train with the peak, in networks of two depths."""
    lines = [
        "| way | blocks | bytes per token and element, by the arithmetic | measured | off |",
        "|---|---|---|---|---|",
    ]
    for depth in (2, 8):
        ways = {
            "reversible, fixed": _bytes.reversible("fixed", 8, 1.0),
            "reversible, float": _bytes.reversible("float", 8, 1.0),
            "checkpoint per layer": _bytes.checkpointed(depth, 8, 1.0),
            "stored": _bytes.stored(depth, 1.0, HIDDEN / 128),
        }
        for way, expected in ways.items():
            keep = way == "stored"
            arm, groups = ("checkpoint per layer", 1) if keep else (way, 8)
            found = slope(arm, depth, groups, (8192, 10240), keep)
            lines.append(compared(f"{way} | {depth}", expected, found))
    return lines


def host_time() -> list[str]:
    """Return the time that one more tile costs where the work of a tile is next to nothing."""
    lines = [
        "| streams | execution | CPU time per tile, forward and backward, µs |",
        "|---|---|---|",
    ]
    nets = {}
    for streams in ("float", "fixed"):
        for execution in ("store", "invert"):
            torch.manual_seed(0)
            pairs = [(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))]
            net = revnet.ReversibleSequence(pairs, streams=streams, execution=execution)
            nets[streams, execution] = net.bfloat16()
    x = torch.randn(1, 1024, 8).bfloat16()
    times: dict[Any, list[float]] = {key: [] for key in nets}
    for turn in range(12):
        for key, net in nets.items():
            took = []
            for size in (64, 8):
                net.tile = {"g": size}
                # Of this process alone, as other work on the machine would count otherwise.
                begun = time.process_time()
                net(x).sum().backward()
                took.append(time.process_time() - begun)
            if turn:
                times[key].append((took[1] - took[0]) / (128 - 16))
    for (streams, execution), seconds in times.items():
        lines.append(f"| {streams} | {execution} | {1e6 * statistics.median(seconds):.0f} |")
    return lines


def missing(arm: str) -> str:
    """Return what an arm needs and does not find, or nothing."""
    if "TRL" not in arm:
        return ""
    if importlib.util.find_spec("trl") is None:
        return "not installed"
    return "" if torch.accelerator.is_available() else "needs an accelerator"


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--blocks", type=int, nargs="*")
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=0, help="timed steps beside the first")
    parser.add_argument(
        "--dummy-weights",
        action="store_true",
        help="hold memory for the weights of all blocks of the shape, beside those that run",
    )
    parser.add_argument("--limit", type=float, help="GiB of the GPU that may be used")
    parser.add_argument("--out", type=Path, help="the report, written anew after each row")
    args = parser.parse_args(argv)
    args.shape = args.shape or ("small" if args.device == "cpu" else "1.2B")
    args.blocks = args.blocks or [SHAPES[args.shape][1]]
    args.tokens = args.tokens or [SHAPES[args.shape][2]]
    return args


def heading(args: argparse.Namespace, command: str) -> list[str]:
    """Return the lines above the first table."""
    cpu = args.device == "cpu"
    name = "two shared CPU cores" if cpu else torch.cuda.get_device_name()
    limit = f", of which {args.limit:g} GiB may be used" if args.limit else ""
    return [
        "# Long contexts",
        "",
        f"    {command}",
        "",
        f"{datetime.date.today()}; {name}{limit}; torch {torch.__version__}, bfloat16.",
        "",
        "| arm | largest relative error of a gradient, float64 |",
        "|---|---|",
    ]


def above_rows(shape: str, dummy: bool) -> list[str]:
    """Return the lines above the rows."""
    also = f" Memory for the weights of all {SHAPES[shape][1]} blocks is held." if dummy else ""
    what = "weights" if shape == "8B" else "weights and gradients"
    also += " Plain SGD in backward frees each gradient at once." if shape == "8B" else ""
    return [
        "",
        f"Shape {shape}: peak above {what}.{also}",
        "",
        "| arm | blocks | tokens | peak, GiB | bytes per token and element | s | pinned, GiB | "
        "whole device, GiB | reserved, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def main(argv: Sequence[str] | None = None) -> list[str]:
    args = options(argv)
    cpu = args.device == "cpu"
    if args.limit:
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(args.limit * GIB / total)
    command = shlex.join(["python", "benchmarks/long_context.py", *(argv or sys.argv[1:])])
    lines: list[str] = []

    def say(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")

    say(*heading(args, command))
    arms = [arm for arm in args.arms if not missing(arm)]
    for arm in arms:
        error = examine(arm, args.device)
        say(f"| {arm} | {error:.1e} |")
        if not error <= 1e-6:
            raise SystemExit(f"{arm}: a gradient is off by {error:.1e}: its figures say nothing")
    absent = [f"| {arm} | {missing(arm)} |" for arm in args.arms if arm not in arms]
    say(*absent, *above_rows(args.shape, args.dummy_weights))
    for blocks, tokens, arm in itertools.product(args.blocks, args.tokens, arms):
        say(row(arm, args.shape, blocks, tokens, args.rounds, args.device, args.dummy_weights))
    if cpu:
        say("", *bytes_per_token())
        say("", *bytes_by_depth())
        say("", *host_time())
    return lines


if __name__ == "__main__":
    main()
