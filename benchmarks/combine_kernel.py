"""What does one combine of fixed-point streams cost against a floating-point addition?

    python benchmarks/combine_kernel.py                     # the combines of docs/numerics.md; CUDA
    where there is one python benchmarks/combine_kernel.py --sweep             # block sizes and
    warps of the Triton kernel python benchmarks/combine_kernel.py --shape 4 256 256 --device cpu

Every row is first compared, in every bit, with the plain torch operations. All rows of a table run
in turn; the table shows medians. "per training step" is what 48 combines and their 48 inverses (24
blocks) cost beyond float streams.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from revnet._streams import reference
from revnet._streams.fixed import Fixed
from revnet._streams.format import Encoded
from revnet._streams.monitor import RangeMonitor

FORMATS = (Fixed(), Fixed(37))
# value, increment: fp32 streams under bf16 autocast; pure bf16; pure fp32.
STREAMS = (
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
)
STEPS = 48
LAUNCHES = 10

Combine = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs="+", default=[2, 4096, 2048], help="of a stream")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50, help="how often each row runs")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="time block sizes and warps of the Triton kernel instead",
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}, stream {'×'.join(map(str, options.shape))}")
    if options.sweep:
        sweep(options.shape, device, options.repeats)
        return
    for value_dtype, increment_dtype in STREAMS:
        table(options.shape, device, options.repeats, value_dtype, increment_dtype)


def table(
    shape: list[int],
    device: torch.device,
    repeats: int,
    value_dtype: torch.dtype,
    increment_dtype: torch.dtype,
) -> None:
    x = torch.randn(shape, device=device).to(value_dtype)
    increment = torch.randn(shape, device=device).to(increment_dtype)
    size, wide = x.element_size(), increment.element_size()
    rows: dict[str, Combine] = {
        "float add": lambda: x + increment,
        "float subtract": lambda: x - increment,
    }
    widths = dict.fromkeys(rows, 2 * size + wide)
    for fixed in FORMATS:
        name = f"{fixed.fraction_bits} fraction bits"
        monitor = RangeMonitor()
        held = fixed.encode(x, monitor)
        check(fixed, held, increment)
        ours = {
            f"{name}: add": lambda f=fixed, h=held, m=monitor: f.add(h, increment, m, 0),
            f"{name}: subtract": lambda f=fixed, h=held: f.subtract(h, increment),
            f"{name}: add, plain torch": lambda f=fixed, h=held: reference.combine(
                h, increment, 1, f.fraction_bits, None, 0
            ),
        }
        rows |= ours
        widths |= dict.fromkeys(ours, 2 * sum(part.element_size() for part in held) + wide)
        assert monitor.check() is None
    times = in_turn(rows, device, repeats)

    print(f"\nvalue {str(value_dtype)[6:]}, increment {str(increment_dtype)[6:]}\n")
    print("| combine | ms | × float add | bytes per element | GB/s |")
    print("|---|---|---|---|---|")
    for row, seconds in times.items():
        ratio, rate = seconds / times["float add"], widths[row] * x.numel() / seconds / 1e9
        print(f"| {row} | {seconds * 1e3:.4f} | {ratio:.2f} | {widths[row]} | {rate:.0f} |")
    for fixed in FORMATS:
        name = f"{fixed.fraction_bits} fraction bits"
        both = (
            times[f"{name}: add"]
            + times[f"{name}: subtract"]
            - times["float add"]
            - times["float subtract"]
        )
        print(f"per training step of {STEPS // 2} blocks, {name}: {STEPS * both * 1e3:+.2f} ms")


def sweep(shape: list[int], device: torch.device, repeats: int) -> None:
    from revnet._streams import cuda

    print("\n| fraction bits | value | increment | block | warps | add, ms | subtract, ms |")
    print("|---|---|---|---|---|---|---|")
    for fixed, (value_dtype, increment_dtype) in itertools.product(FORMATS, STREAMS[:2]):
        held = fixed.encode(torch.randn(shape, device=device).to(value_dtype))
        increment = torch.randn(shape, device=device).to(increment_dtype)
        monitor = RangeMonitor()
        for block, warps in itertools.product((256, 512, 1024, 2048), (4, 8)):
            cuda._BLOCK, cuda._WARPS = block, warps
            rows: dict[str, Combine] = {
                "add": lambda f=fixed, h=held, i=increment, m=monitor: f.add(h, i, m, 0),
                "subtract": lambda f=fixed, h=held, i=increment: f.subtract(h, i),
            }
            times = in_turn(rows, device, repeats)
            kinds = f"{fixed.fraction_bits} | {str(value_dtype)[6:]} | {str(increment_dtype)[6:]}"
            print(
                f"| {kinds} | {block} | {warps} | {times['add'] * 1e3:.4f} | "
                f"{times['subtract'] * 1e3:.4f} |"
            )


def check(fixed: Fixed, held: Encoded, increment: Tensor) -> None:
    """Compare with plain torch operations, numbers that leave the range included, and undo."""
    bad = increment.clone()
    bad.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])
    for addend in (increment, bad):
        new, wanted = (
            fixed.add(held, addend),
            reference.combine(held, addend, 1, fixed.fraction_bits, None, 0),
        )
        assert torch.equal(new.residual, wanted.residual)
        assert torch.equal(new.value.isnan(), wanted.value.isnan())
        assert torch.equal(new.value.nan_to_num(), wanted.value.nan_to_num())
    back = fixed.subtract(fixed.add(held, increment), increment)
    assert all(torch.equal(part, before) for part, before in zip(back, held, strict=True))


def in_turn(rows: dict[str, Combine], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median seconds of each row; the rows take turns."""
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(3):
        for run in rows.values():
            run()
    for _ in range(repeats):
        for row, run in rows.items():
            seconds[row].append(once(run, device))
    return {row: statistics.median(values) for row, values in seconds.items()}


def once(run: Combine, device: torch.device) -> float:
    # Several in one measurement: neither the host's time for a launch nor a cold cache shall show.
    if device.type != "cuda":
        run()
        begin = time.perf_counter()
        for _ in range(LAUNCHES):
            run()
        return (time.perf_counter() - begin) / LAUNCHES
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    start.record()
    for _ in range(LAUNCHES):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / LAUNCHES / 1e3


if __name__ == "__main__":
    main()
