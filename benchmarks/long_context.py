"""How many bytes does a token take, and how long a sequence fits one GPU?

python benchmarks/long_context.py --out benchmarks/results/long_context_h100.md
python benchmarks/long_context.py --tokens 1048576 --blocks 2 4
python benchmarks/long_context.py --shape 8B --blocks 8
python benchmarks/long_context.py --device cpu --out benchmarks/results/long_context_cpu.md

The network is that of examples/long_context.py: heads in groups, the MLP in tiles, the loss in
chunks. Its rivals are the ordinary residual network of the same branches, checkpointed per layer,
with the same groups, tiles and loss by nested checkpoints; the inputs of its layers stay on the
device, or go to pinned host memory. First the gradients of every arm are compared with those of
stored execution of its network, in float64. Arms run one after the other, as they do not fit a GPU
together. On the CPU no step is timed; there, the bytes per token are then compared with the
arithmetic of docs/long_context.md, and the host time of a tile is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
# Vocabulary, width, heads, heads of keys and values, groups, hidden, tile, chunk; blocks, tokens.
SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "small": ((64, 64, 4, 4, 4, 128, 256, 256), 2, 2048),
    "1.2B": ((32768, 2048, 16, 16, 8, 5504, 4096, 4096), 24, 524288),
    "8B": ((131072, 4096, 32, 8, 8, 14336, 4096, 4096), 32, 524288),
}
again = partial(checkpoint, use_reentrant=False)


class Ordinary(LongContext):
    """The residual network of one stream with the same branches, checkpointed per layer."""

    stored = False

    def trunk(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        layers: list[list[Any]] = [[]]
        for step in self.steps:
            layers[-1].append(step)
            if step.target == 1:
                layers.append([])
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
        model.stored = True
    else:
        model.steps.execution = "store"


def offloaded() -> Any:
    """Return the context of TRL that copies activations to the host beside compute."""
    from trl.models.activation_offloading import OffloadActivations

    return OffloadActivations()


# Of each arm: the network, its streams, and the context of its forward pass.
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
    kind, streams, _ = ARMS[arm]
    vocabulary, width, heads, kv_heads, groups, hidden, tile, chunk = SHAPES[shape][0]
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(vocabulary, width, blocks, heads, kv_heads, groups, hidden, tile, chunk)
    model.to(dtype)
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
    for each, context in ((twin, contextlib.nullcontext()), (model, ARMS[arm][2]())):
        with context:
            loss = each(text)
        loss.backward()
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


def pinned() -> int:
    """Return the bytes of pinned host memory in use, at most since the last reset."""
    stats = torch.cuda.host_memory_stats() if PIN else {}
    return int(stats.get("allocated_bytes.peak", 0))


def row(arm: str, shape: str, blocks: int, tokens: int, rounds: int, device: str) -> str:
    """Measure one arm at one size; an arm that does not fit says so."""
    width = SHAPES[shape][0][1]
    start = f"| {arm} | {blocks} | {tokens:,} |"
    try:
        model = made(arm, shape, blocks, device, torch.bfloat16)
        fill_gradients(model, sgd=shape == "8B")
        text = text_for(tokens, shape, device)
        seconds: list[float] = []

        def step() -> None:
            with ARMS[arm][2]():
                loss = model(text)
            loss.backward()

        def timed() -> None:
            begun = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)

        model(text[:, :129]).backward()  # Warm up.
        if device == "cpu":
            peak = revnet.measure_memory(step).peak_bytes
        else:
            torch.cuda.reset_peak_host_memory_stats()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            timed()
            peak = torch.cuda.max_memory_allocated() - before
            for _ in range(rounds):
                timed()
        took = f"{statistics.median(seconds):.2f}" if seconds else "–"
        return (
            f"{start} {peak / GIB:.3f} | {peak / tokens / width:.1f} | {took} | "
            f"{pinned() / GIB:.2f} |"
        )
    except torch.OutOfMemoryError:
        return f"{start} out of memory | – | – | – |"
    finally:
        model = step = timed = None
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


def arithmetic(streams: str, groups: int, shared: float) -> float:
    """Return the bytes per token and element at the peak; see docs/long_context.md."""
    held = 12 if streams == "fixed" else 4
    return max(held + 12 + (6 + 6 * shared) / groups, held + 8 + (10 + 10 * shared) / groups)


def slope(streams: str, groups: int, counts: tuple[int, int], width: int) -> float:
    """Return by how many bytes an element of one more token raises the peak of a step."""
    peaks = []
    for tokens in counts:
        torch.manual_seed(0)
        model = LongContext(64, width, 2, 8, 8, groups, width, 256, 256).bfloat16()
        model.steps.streams = streams
        fill_gradients(model, sgd=False)
        text = text_for(tokens, "small", "cpu")
        model(text[:, :300]).backward()
        peaks.append(revnet.measure_memory(lambda m=model, t=text: m(t).backward()).peak_bytes)
    return (peaks[1] - peaks[0]) / (counts[1] - counts[0]) / width


def bytes_per_token() -> list[str]:
    """Compare the arithmetic with the peak, as it grows from one number of tokens to another."""
    lines = [
        "| streams | groups | bytes per token and element, by the arithmetic | measured | off |",
        "|---|---|---|---|---|",
    ]
    for streams in ("fixed", "float"):
        for groups in (1, 2, 4, 8):
            expected = arithmetic(streams, groups, 1.0)
            found = slope(streams, groups, (8192, 12288), 128)
            lines.append(
                f"| {streams} | {groups} | {expected:.1f} | {found:.1f} | "
                f"{100 * (found / expected - 1):+.1f} % |"
            )
            print(lines[-1], flush=True)
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


def main(argv: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--blocks", type=int, nargs="*")
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=0, help="timed steps beside the first")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    shape = args.shape or ("small" if cpu else "1.2B")
    arms = [arm for arm in args.arms if not missing(arm)]
    lines = ["| arm | largest relative error of a gradient, float64 |", "|---|---|"]
    for arm in arms:
        error = examine(arm, args.device)
        lines.append(f"| {arm} | {error:.1e} |")
        if not error <= 1e-6:
            raise SystemExit(f"{arm}: a gradient is off by {error:.1e}: its figures say nothing")
    lines += [f"| {arm} | {missing(arm)} |" for arm in args.arms if arm not in arms]
    lines += [
        "",
        f"Shape {shape}: peak above weights and gradients.",
        "",
        "| arm | blocks | tokens | peak, GiB | bytes per token and element | s | pinned, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for blocks in args.blocks or [SHAPES[shape][1]]:
        for tokens in args.tokens or [SHAPES[shape][2]]:
            for arm in arms:
                lines.append(row(arm, shape, blocks, tokens, args.rounds, args.device))
                print(lines[-1], flush=True)
    if cpu:
        lines += ["", *bytes_per_token(), "", *host_time()]
    command = " ".join(["python", "benchmarks/long_context.py", *(argv or sys.argv[1:])])
    name = "two shared CPU cores" if cpu else torch.cuda.get_device_name()
    report = [
        "# Long contexts",
        "",
        f"    {command}",
        "",
        f"{datetime.date.today()}; {name}; torch {torch.__version__}, bfloat16.",
        "",
        *lines,
    ]
    if args.out:
        args.out.write_text("\n".join(report) + "\n")
    else:
        print("\n".join(report))
    return lines


if __name__ == "__main__":
    main()
