"""How long does torch.compile take for a whole network, against the same network checkpointed?

    python benchmarks/compile_time.py --out benchmarks/results/compile_time_cpu.md
    python benchmarks/compile_time.py --device cuda

A time is that of the first training step, forward and backward, with every cache of the compiler
switched off; arms are compiled in turn, once a round. "net.compile()" compiles each branch by
itself; the others are one graph, by `torch.compile(net)`. The gradients of the first round are
compared with those of the first arm.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from _models import branches
from _race import BLOCK, FIXED, FLOAT, STORED, Loop, difference, opening, publish, timed
from torch import Tensor, nn

import revnet

PARTS = "net.compile(), float"
ARMS = (STORED, BLOCK, FLOAT, FIXED, PARTS)


def network(arm: str, pairs: Any) -> nn.Module:
    if arm in (STORED, BLOCK):
        return Loop(pairs, arm)
    return revnet.ReversibleSequence(pairs, streams="fixed" if arm == FIXED else "float")


def first_step(arm: str, pairs: Any, x: Tensor) -> tuple[float, list[Tensor]]:
    """Return the seconds of the first step of a network that is not compiled yet, and gradients."""
    torch._dynamo.reset()
    net = network(arm, copy.deepcopy(pairs))
    if arm == PARTS:
        net.compile(fullgraph=True)
        run: Any = net
    else:
        run = torch.compile(net, fullgraph=True)
    seconds = timed(lambda: run(x).float().square().mean().backward(), x.device.type)
    return seconds, [p.grad for p in net.parameters() if p.grad is not None]


def table(blocks: int, options: argparse.Namespace) -> list[str]:
    torch.manual_seed(0)
    pairs = branches(blocks, options.width, device=options.device, dtype=torch.float32)
    x = torch.randn(2, 64, options.width, device=options.device)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    errors: dict[str, float] = {}
    expected: list[Tensor] = []
    for _ in range(options.rounds):
        for arm in ARMS:
            seconds, found = first_step(arm, pairs, x)
            expected = expected or found
            errors[arm] = difference(found, expected)
            assert errors[arm] < 1e-3, f"{arm}: gradients are off by {errors[arm]}"
            times[arm].append(seconds)
            print(f"{blocks} blocks, {arm}: {seconds:.1f} s", flush=True)
    lines = []
    for arm in ARMS:
        ratio = statistics.median(a / b for a, b in zip(times[arm], times[BLOCK], strict=True))
        lines.append(
            f"| {blocks} blocks | {arm} | {statistics.median(times[arm]):.1f} | {ratio:.2f} "
            f"| {errors[arm]:.0e} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    torch._dynamo.config.cache_size_limit = 256
    hardware = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    # The compiler is imported, and its processes are started, before the clock.
    warm = torch.randn(2, 64, options.width, device=options.device)
    first_step(STORED, branches(1, options.width, device=options.device), warm)
    lines = [
        *opening("How long does torch.compile take?", hardware),
        f"Width {options.width}, 2 × 64 tokens, float32; {options.rounds} rounds. Seconds of the "
        'first training step, caches off; ratios to "checkpoint per block" of the same two-stream '
        'network. "stored" is its plain loop. "net.compile()" compiles branch by branch, the '
        "others are one graph.",
        "",
        "| blocks | arm | first step, s | ÷ checkpointing | gradient error |",
        "|---|---|---|---|---|",
    ]
    for blocks in options.blocks:
        lines += table(blocks, options)
    publish(lines, options.out)


if __name__ == "__main__":
    main()
