"""Does it pay to rebuild a step's input on a second CUDA stream while the step above it is
differentiated?

python benchmarks/overlap.py --out benchmarks/results/overlap_h100.md

The backward pass of a two-stream network by hand, without the engine: in turn, or with alternate
steps on two streams, so that the rebuilding of a step runs beside the gradient of the one above it
(PaReprop, arXiv:2306.09342). Gradients are first compared in every bit. What the engine could gain
is bounded by what this loop gains.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _models import branches
from _race import opening, publish
from torch import Tensor, nn

# Width, tokens, batch, blocks.
SIZES = ((256, 256, 8, 48), (1024, 1024, 8, 24), (2048, 4096, 2, 12))
MIB = 2**20


def down(
    steps: list[tuple[nn.Module, int]],
    state: list[Tensor],
    grads: list[Tensor],
    streams: list[torch.cuda.Stream],
) -> list[Tensor]:
    """The gradients of all weights, from the streams after the last step and their gradients."""
    state, grads, found = list(state), list(grads), []
    here = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(here)
    # Until the end: a tensor freed on one stream must not be given out again while the other one
    # uses it.
    alive: list[Tensor] = []
    rebuilt = torch.cuda.Event()
    differentiated = torch.cuda.Event()

    def rebuild(k: int) -> tuple[Tensor, Tensor]:
        branch, target = steps[k]
        with torch.cuda.stream(streams[k % 2]):
            torch.cuda.current_stream().wait_event(rebuilt)
            with torch.enable_grad():
                x = state[1 - target].detach().requires_grad_()
                out = branch(x)
            state[target] = state[target] - out.detach()
            rebuilt.record()
        alive.extend((x, state[target]))
        return x, out

    ahead = rebuild(len(steps) - 1)
    for k in range(len(steps) - 1, -1, -1):
        branch, target = steps[k]
        (x, out), ahead = ahead, rebuild(k - 1) if k else ahead
        with torch.cuda.stream(streams[k % 2]):
            torch.cuda.current_stream().wait_event(differentiated)
            pulled, *weights = torch.autograd.grad(out, [x, *branch.parameters()], grads[target])
            grads[1 - target] = grads[1 - target] + pulled
            differentiated.record()
        alive.append(grads[1 - target])
        found += weights
    for stream in streams:
        here.wait_stream(stream)
    return [*found, *grads]


def captured(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return found

    return replay


def timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(size: tuple[int, int, int, int], rounds: int) -> list[str]:
    width, tokens, batch, blocks = size
    pairs = branches(blocks, width, device="cuda", dtype=torch.bfloat16)
    steps = [(branch, target) for pair in pairs for target, branch in enumerate(pair)]
    state = list(torch.randn(2, batch, tokens, width, device="cuda", dtype=torch.bfloat16))
    grads = list(torch.randn(2, batch, tokens, width, device="cuda", dtype=torch.bfloat16))
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    name = f"d={width}, {tokens} tokens, batch {batch}, {blocks} blocks"
    lines = []
    for mode in ("eager", "captured"):
        arms: list[Callable[[], list[Tensor]]] = [
            lambda: down(steps, state, grads, [one, one]),
            lambda: down(steps, state, grads, [one, two]),
        ]
        for run in arms:
            run()
            run()
        peaks = [peak(run) for run in arms]
        if mode == "captured":
            arms = [captured(run) for run in arms]
        found = [[tensor.clone() for tensor in run()] for run in arms]
        equal = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        del found
        if not equal:
            raise SystemExit(
                f"{name}, {mode}: two streams give other gradients, so their time says nothing"
            )
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for run, seconds in zip(arms, times, strict=True):
                seconds.append(timed(run))
        medians = [statistics.median(seconds) for seconds in times]
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        lines.append(
            f"| {name} | {mode} | {1e3 * medians[0]:.2f} | {1e3 * medians[1]:.2f} | {ratio:.3f} | "
            f"{peaks[0] / MIB:.0f} | {peaks[1] / MIB:.0f} | {'yes' if ratio <= 0.95 else 'no'} |"
        )
        print(lines[-1], flush=True)
        del arms
        torch.cuda.empty_cache()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="a file for the report")
    given = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    lines = [line for size in SIZES for line in measure(size, given.rounds)]
    head = [
        *opening("Rebuilding on a second stream", torch.cuda.get_device_name()),
        f"bfloat16, {given.rounds} rounds in turn, medians. The backward pass of a two-stream "
        "network by hand, float streams. Gradients are equal in every bit. Peak: above weights, "
        "of the eager pass; the loop holds the rebuilt streams.",
        "",
        "| work | mode | one stream, ms | two, ms | ratio | peak of one, MiB | of two | gains 5 % "
        "|",
        "|---|---|---|---|---|---|---|---|",
    ]
    publish([*head, *lines], given.out)


if __name__ == "__main__":
    main()
