"""What does one scaled step of fixed-point streams cost, forward and back, against floats?

    python benchmarks/scaled_kernel.py                          # CUDA where there is one
    python benchmarks/scaled_kernel.py --factors tensors        # without the rows of ratios
    python benchmarks/scaled_kernel.py --shape 4 256 256 --device cpu

A step is `v ← γ v + f` with its remainder kept, where γ is a ratio or a tensor: a factor for each
number (as in `Affine`, where it and f are halves of one tensor) or for each channel. Every row is
first compared, in every bit, with the plain torch operations. All rows of a table run in turn; the
table shows medians. Buffers are those of the middle of a run of 24 steps. A last table lists the
bytes an element that buffers take.
"""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from typing import Any

import torch
from combine_kernel import Combine, in_turn
from torch import Tensor
from torch.utils import _pytree as pytree

from revnet._factors import Factor, Increment, factor_of
from revnet._streams import reference
from revnet._streams.buffer import BufferedStream, multiply_and_add, subtract_and_divide
from revnet._streams.fixed import Fixed
from revnet._streams.monitor import RangeMonitor

RATIOS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8), Fraction(9, 10), Fraction(99, 100))
# value, increment: fp32 streams under bf16 autocast; pure bf16; pure fp32.
STREAMS = (
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
)
STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs="+", default=[2, 4096, 2048], help="of a stream")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50, help="how often each row runs")
    parser.add_argument("--factors", choices=["ratios", "tensors", "both"], default="both")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}, stream {'×'.join(map(str, options.shape))}")
    for value_dtype, increment_dtype in STREAMS:
        factors: dict[str, Factor] = {}
        if options.factors != "tensors":
            factors |= {str(ratio): factor_of(ratio, None) for ratio in RATIOS}
        if options.factors != "ratios":
            factors |= tensors(options.shape, device, increment_dtype)
        table(options.shape, device, options.repeats, value_dtype, increment_dtype, factors)
    if options.factors != "tensors":
        buffers()


def tensors(shape: list[int], device: torch.device, dtype: torch.dtype) -> dict[str, Factor]:
    """Return factors between 1 / 1.35 and 1.35, as `Affine(limit=0.3)` makes them."""

    def random(*shape: int) -> Factor:
        raw = torch.randn(shape, device=device).to(dtype)
        return factor_of((0.3 * (raw / 0.3).tanh()).exp(), math.exp(-0.3))

    return {"a factor each": random(*shape), "a factor a channel": random(shape[-1])}


def table(
    shape: list[int],
    device: torch.device,
    repeats: int,
    value_dtype: torch.dtype,
    increment_dtype: torch.dtype,
    factors: dict[str, Factor],
) -> None:
    fixed, x = Fixed(), torch.randn(shape, device=device).to(value_dtype)
    both = torch.randn((*shape[:-1], 2 * shape[-1]), device=device).to(increment_dtype)
    half, increment = both.chunk(2, -1)[1], both.chunk(2, -1)[1].contiguous()
    rows: dict[str, Combine] = {
        "float add": lambda: x + increment,
        "float scale and add": lambda: x * 0.125 + increment,
    }
    size, wide = x.element_size(), increment.element_size()
    widths = dict.fromkeys(rows, 2 * size + wide)
    start = fixed.encode(x)
    rows["fixed add"] = lambda: fixed.add(start, increment)
    widths["fixed add"] = 2 * stream_bytes(start) + wide
    for name, factor in factors.items():
        addend = half if name == "a factor each" else increment
        monitor = RangeMonitor()
        held: Any = start
        for index in range(STEPS):
            before = held
            held = multiply_and_add(held, factor, Increment(addend), fixed, monitor, index)
        check(fixed, factor, before, held, addend)
        ours: dict[str, Combine] = {
            f"{name}: step": lambda b=before, f=factor, a=addend, m=monitor: multiply_and_add(
                b, f, Increment(a), fixed, m, 0
            ),
            f"{name}: inverse": lambda h=held, f=factor, a=addend: subtract_and_divide(
                h, f, Increment(a), fixed
            ),
            f"{name}: step, plain torch": lambda b=before, h=held, f=factor, a=addend: by_reference(
                fixed, f, b, h, a
            ),
            f"{name}: inverse, plain torch": lambda b=before, h=held, f=factor, a=addend: undone(
                fixed, f, b, h, a
            ),
        }
        rows |= ours
        moved = 2 * stream_bytes(start) + wide + held.buffer.element_size()
        moved += 0 if held.past.begun else before.buffer.element_size()
        if factor.scale is not None:
            moved += factor.scale.numel() * factor.scale.element_size() / x.numel()
        widths |= dict.fromkeys(ours, moved)
        assert monitor.check() is None
    times = in_turn(rows, device, repeats)

    print(f"\nvalue {str(value_dtype)[6:]}, increment {str(increment_dtype)[6:]}\n")
    print("| step | ms | × float add | × fixed add | bytes per element | GB/s |")
    print("|---|---|---|---|---|---|")
    for row, seconds in times.items():
        rate = widths[row] * x.numel() / seconds / 1e9
        print(
            f"| {row} | {seconds * 1e3:.4f} | {seconds / times['float add']:.2f} | "
            f"{seconds / times['fixed add']:.2f} | {widths[row]:.0f} | {rate:.0f} |"
        )


def buffers() -> None:
    print("\n| γ | bits a step | bytes an element after 24 steps | after 96 steps |")
    print("|---|---|---|---|")
    fixed = Fixed()
    for ratio in (*RATIOS[:3], Fraction(1, 16), *RATIOS[3:]):
        factor, sizes = factor_of(ratio, None), []
        held: Any = fixed.encode(torch.zeros(1))
        for index in range(96):
            held = multiply_and_add(held, factor, Increment(torch.zeros(1)), fixed, None, index)
            if index in (23, 95):
                sizes.append(sum(x.element_size() for x in (*held.full, held.buffer)))
        bits = torch.tensor(float(1 / ratio)).log2().item()
        print(f"| {ratio} | {bits:.3f} | {sizes[0]} | {sizes[1]} |")


def stream_bytes(held: Any) -> int:
    return sum(part.element_size() for part in held)


def by_reference(
    fixed: Fixed, factor: Factor, before: Any, after: BufferedStream, increment: Tensor
) -> tuple[Any, Tensor]:
    """Return the step in plain torch operations."""
    assert after.past is not None
    return reference.scale_and_add(
        before.stream if isinstance(before, BufferedStream) else before,
        None if after.past.begun else before.buffer,
        Increment(increment),
        factor,
        after.buffer.dtype,
        fixed.fraction_bits,
        None,
        0,
    )


def undone(
    fixed: Fixed, factor: Factor, before: Any, after: BufferedStream, increment: Tensor
) -> tuple[Any, Tensor]:
    """Return the inverse in plain torch operations."""
    width = before.buffer.dtype if isinstance(before, BufferedStream) else torch.int64
    return reference.subtract_and_divide(
        after.stream, after.buffer, Increment(increment), factor, width, fixed.fraction_bits
    )


def check(
    fixed: Fixed, factor: Factor, before: Any, after: BufferedStream, increment: Tensor
) -> None:
    """Compare with plain torch operations, and undo."""
    (value, residual), buffer = by_reference(fixed, factor, before, after, increment)
    assert torch.equal(after.stream.value, value)
    assert torch.equal(after.stream.residual, residual)
    assert torch.equal(after.buffer, buffer)
    back = subtract_and_divide(after, factor, Increment(increment), fixed)
    leaves = pytree.tree_leaves(back), pytree.tree_leaves(before)
    assert all(torch.equal(part, old) for part, old in zip(*leaves, strict=True))


if __name__ == "__main__":
    main()
