"""What do time and memory of the three large examples cost, against stored execution, checkpoints
and memcnn?

    python benchmarks/examples.py --out benchmarks/results/examples_cpu.md
    python benchmarks/examples.py --device cuda --full --autocast

The second line is the size of the examples' `--full`: the U-Net on two volumes of 128³. Arms have
their own copies of one network and run in turn, once a round. Before, their gradients are compared
with those of the first arm: of checkpoints and of fixed streams (with stored fixed streams) in
every bit. memcnn is left out where it is not installed; it knows neither keywords nor extra
outputs, and runs the U-Net alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _race import difference, opening, publish
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnet

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

MIB = 2**20
STORED, CHECKPOINT, FLOAT, FIXED, STORED_FIXED, MEMCNN = (
    "stored",
    "checkpoint per level or block",
    "revnet, float streams",
    "revnet, fixed streams",
    "stored, fixed streams",
    "memcnn",
)
# Of all gradients, relative to stored execution.
ALLOWED = {STORED: 0.0, CHECKPOINT: 0.0, FLOAT: 1e-3, FIXED: 1e-3, STORED_FIXED: 1e-3, MEMCNN: 1e-3}


class PerBlock(nn.Module):
    """A sequence as a plain loop with a checkpoint per block."""

    def __init__(self, sequence: Any) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList([block.f, block.g]) for block in sequence)

    def with_aux(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        x1 = x2 = x
        aux = {}
        for i, (f, g) in enumerate(self.pairs):
            x1, x2, extra = checkpoint(_block, f, g, x1, x2, kwargs, use_reentrant=False)
            if extra is not None:
                aux[f"block {i}"] = extra
        return (x1 + x2) / 2, aux

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.with_aux(x, **kwargs)[0]


def _block(f: Any, g: Any, x1: Tensor, x2: Tensor, kwargs: Any) -> tuple[Tensor, Tensor, Any]:
    x1 = x1 + f(x2, **kwargs)
    out = g(x1, **kwargs)
    update, extra = out if isinstance(out, tuple) else (out, None)
    return x1, x2 + update, extra


class Level(nn.Module):
    """A level of the U-Net as memcnn wants it: with an inverse, and no output that is an input."""

    def __init__(self, program: revnet.Reversible) -> None:
        super().__init__()
        self.level = nn.ModuleList(step.fn for step in program.steps)
        self.places = [(step.target, *step.source) for step in program.steps]
        self.first = min(map(min, self.places))
        self.last = max(map(max, self.places)) + 1

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        found = [stream.clone() for stream in streams]
        for fn, (target, source) in zip(self.level, self.places, strict=True):
            update = fn(found[source - self.first])
            found[target - self.first] = found[target - self.first] + update
        return tuple(found)

    def inverse(self, *streams: Tensor) -> tuple[Tensor, ...]:
        found = [stream.clone() for stream in streams]
        for fn, (target, source) in zip(self.level[::-1], self.places[::-1], strict=True):
            update = fn(found[source - self.first])
            found[target - self.first] = found[target - self.first] - update
        return tuple(found)


class Wrapped(nn.Module):
    """A level inside of memcnn's wrapper, on those of all streams that it touches."""

    def __init__(self, program: revnet.Reversible) -> None:
        super().__init__()
        import memcnn

        level = Level(program)
        self.first, self.last = level.first, level.last
        self.inner = memcnn.InvertibleModuleWrapper(level)

    def forward(self, *streams: Tensor) -> list[Tensor]:
        touched = self.inner(*streams[self.first : self.last])
        return [*streams[: self.first], *touched, *streams[self.last :]]


def arms_of(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """Return copies of a network that save memory in different ways, or not."""
    arms = {}
    for arm, streams, execution in (
        (STORED, "float", "store"),
        (CHECKPOINT, "float", "store"),
        (FLOAT, "float", "invert"),
        (STORED_FIXED, "fixed", "store"),
        (FIXED, "fixed", "invert"),
    ):
        arms[arm] = copied(model)
        for module in arms[arm].modules():
            if isinstance(module, revnet.Reversible | revnet.ReversibleSequence):
                module.streams, module.execution = streams, execution
    if name == "unet3d":
        arms[CHECKPOINT].checkpointed = True  # type: ignore[assignment]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("memcnn")
            wrapped = [Wrapped(level) for level in copied(model).levels]  # type: ignore[union-attr]
            arms[MEMCNN] = copied(model)
            arms[MEMCNN].levels = nn.ModuleList(wrapped)
    else:
        arms[CHECKPOINT].blocks = PerBlock(arms[CHECKPOINT].blocks)
    return arms


def copied(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def table(options: argparse.Namespace, name: str) -> list[str]:
    torch.manual_seed(0)
    model, loss_of = importlib.import_module(name).setup(
        options.full, options.device, options.batch
    )
    for parameter in model.parameters():
        if not parameter.any():
            # Gates that are zero would have most gradients be zero.
            nn.init.normal_(parameter, std=0.02)
    arms = arms_of(name, model)

    def run(arm: nn.Module) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            kind = options.device.split(":")[0]
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=options.autocast):
                return loss_of(arm).float()

        return loss

    found = {arm: gradients(net, run(net)) for arm, net in arms.items()}
    assert all(map(torch.equal, found[FIXED], found[STORED_FIXED])), f"{name}: fixed is not exact"
    errors = {arm: difference(grads, found[STORED]) for arm, grads in found.items()}
    for arm, error in errors.items():
        # Under autocast a rebuilt float stream is off by rounding to bfloat16.
        assert options.autocast or error <= ALLOWED[arm], f"{name}, {arm}: {error}"
    del found
    peaks, kept = {}, {}
    for arm, net in arms.items():
        net.zero_grad()
        report = revnet.measure_memory(run(net))
        peaks[arm] = (report.peak_bytes - report.grad_bytes) / MIB
        kept[arm] = report.saved_bytes / MIB
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(options.rounds):
        for arm, net in arms.items():
            times[arm].append(seconds(net, run(net)))
    lines = [
        f"## {name}.py",
        "",
        "| | ms | × stored | kept for backward, MiB | peak, MiB | peak, % of stored "
        "| gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        ratio = statistics.median(a / b for a, b in zip(times[arm], times[STORED], strict=True))
        lines.append(
            f"| {arm} | {1e3 * statistics.median(times[arm]):.4g} | {ratio:.2f} "
            f"| {kept[arm]:.4g} | {peaks[arm]:.4g} | {100 * peaks[arm] / peaks[STORED]:.1f} "
            f"| {errors[arm]:.1e} |"
        )
    return [*lines, ""]


def seconds(net: nn.Module, loss: Callable[[], Tensor]) -> float:
    net.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("unet3d", "dit", "moe")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="EXAMPLE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="the size of the examples' --full")
    parser.add_argument("--batch", type=int, default=0, help="another size of the batch")
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the report to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hardware = (
        torch.cuda.get_device_name()
        if options.device.startswith("cuda")
        else f"CPU, {options.threads} thread"
    )
    lines = [
        *opening(
            "Examples: time and memory",
            hardware,
            f"; {options.rounds} rounds; "
            f"{'size of the paper' if options.full else 'toy size'}, "
            f"batch {options.batch or 'of the examples'}; "
            f"{'bfloat16 autocast' if options.autocast else 'float32'}.",
        ),
        "One forward and backward pass. Arms run in turn, once a round; times are medians, ratios "
        "medians of the ratios within rounds. The peak is above weights, gradients and input. The "
        "gradient error is the relative distance of all gradients from those of stored execution.",
        "",
    ]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        lines += [f"memcnn {importlib.metadata.version('memcnn')}.", ""]
    for name in options.only:
        lines += table(options, name)
    publish(lines, options.out)


if __name__ == "__main__":
    main()
