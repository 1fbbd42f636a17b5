"""What does a scaled step of fixed-point streams cost against its plain operations?

    python benchmarks/scaled_kernel.py                   # a stream of 2 × 4096 × 2048; CUDA if any
    python benchmarks/scaled_kernel.py --shape 4 256 256 --device cpu

A scaled step multiplies its target by μ, remembers the remainder and adds an increment. Each row is
first compared, in every bit, with the plain torch operations. All rows run in turn; the table shows
medians. "host" is the time until the call returns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from combine_kernel import in_turn
from torch import Tensor
from torch.utils import _pytree as pytree

from revnet._streams import scaled
from revnet._streams.buffer import BufferedStream, multiply_and_add, subtract_and_divide
from revnet._streams.fixed import Fixed
from revnet._streams.monitor import RangeMonitor

RATIOS = (Fraction(1, 8), Fraction(9, 10))
STREAMS = (
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs="+", default=[2, 4096, 2048], help="of a stream")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30, help="how often each row runs")
    parser.add_argument("--steps", type=int, default=12, help="which step to measure")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{device}, torch {torch.__version__}, stream {'×'.join(map(str, options.shape))}\n")
    print("| μ | value | increment | row | ms | × float | host, µs |")
    print("|---|---|---|---|---|---|---|")
    for value_dtype, increment_dtype in STREAMS:
        for ratio in RATIOS:
            x = torch.randn(options.shape, device=device).to(value_dtype)
            increment = torch.randn(options.shape, device=device).to(increment_dtype)
            table(x, increment, ratio, options.steps, options.repeats)


def table(x: Tensor, increment: Tensor, ratio: Fraction, steps: int, repeats: int) -> None:
    fixed, monitor = Fixed(), RangeMonitor()
    before: Any = fixed.encode(x)
    for step in range(steps - 1):
        before = multiply_and_add(before, ratio, increment, fixed, monitor, step)

    def forward() -> BufferedStream:
        return multiply_and_add(before, ratio, increment, fixed, monitor, 0)

    after = forward()

    def inverse() -> Any:
        return subtract_and_divide(after, ratio, increment, fixed)

    assert same(after, plain(forward)()), "the fused step differs from plain operations"
    assert same(inverse(), before), "the fused inverse does not come back"
    assert same(inverse(), plain(inverse)()), "the fused inverse differs from plain operations"
    assert monitor.check() is None
    rows: dict[str, Callable[[], object]] = {
        "float multiply and add": lambda: x * float(ratio) + increment,
        "step": forward,
        "inverse": inverse,
        "step, plain torch": plain(forward),
        "inverse, plain torch": plain(inverse),
    }
    times = in_turn(rows, x.device, repeats)
    for row, seconds in times.items():
        relative = seconds / times["float multiply and add"]
        print(
            f"| {ratio} | {str(x.dtype)[6:]} | {str(increment.dtype)[6:]} | {row} "
            f"| {seconds * 1e3:.4f} | {relative:.2f} | {host(rows[row], x.device):.0f} |"
        )


def plain(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call by plain torch operations."""

    def call() -> Any:
        fused = scaled._fused
        scaled._fused = lambda *arguments: False
        try:
            return run()
        finally:
            scaled._fused = fused

    return call


def host(run: Callable[[], object], device: torch.device) -> float:
    """Return the microseconds until a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        run()
    microseconds = (time.perf_counter() - begin) / 20 * 1e6
    if device.type == "cuda":
        torch.cuda.synchronize()
    return microseconds


def same(a: Any, b: Any) -> bool:
    leaves = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return all(torch.equal(x, y) for x, y in zip(*leaves, strict=True))


if __name__ == "__main__":
    main()
