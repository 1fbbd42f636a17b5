"""What does it cost that a replay sees the attributes and buffers of a branch as its call found
them?

    python benchmarks/state_cost.py --out benchmarks/results/state_cost_cpu.md

Each row of the first table is a network whose branches hold something that they do not use; it is
timed in turn with the same network whose branches hold nothing. Gradients are compared first: they
are equal in every bit. Each row of the second is one block whose branches write to a large buffer
and read it, in turn with the same writes to a tensor that no module holds, which replays do not see
again. Gradients are compared first with those of stored execution. Times are those of the process,
since other work on the machine would show in any other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _race import opening, publish
from torch import Tensor, nn

import revnet

Holding = Callable[[nn.Module], Any]


class Branch(nn.Module):
    """A small MLP that also holds something."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter, self.leave = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(nn.functional.gelu(self.enter(self.norm(x))))


def numbers(count: int) -> Holding:
    def hold(branch: nn.Module) -> None:
        for i in range(count):
            setattr(branch, f"number_{i}", i)

    return hold


def lists(count: int) -> Holding:
    def hold(branch: nn.Module) -> None:
        for i in range(count):
            setattr(branch, f"list_{i}", [i, i + 1])

    return hold


def tensors(count: int) -> Holding:
    def hold(branch: nn.Module) -> None:
        for i in range(count):
            setattr(branch, f"tensor_{i}", torch.zeros(8))

    return hold


def entries(count: int) -> Holding:
    def hold(branch: nn.Module) -> None:
        branch.table = dict.fromkeys(range(count), 0)  # type: ignore[assignment]

    return hold


def buffer(mib: int) -> Holding:
    def hold(branch: nn.Module) -> None:
        branch.register_buffer("mask", torch.zeros(mib * 2**18))

    return hold


ROWS: dict[str, Holding] = {
    "10 numbers": numbers(10),
    "100 numbers": numbers(100),
    "10 lists": lists(10),
    "100 lists": lists(100),
    "10 tensors": tensors(10),
    "100 tensors": tensors(100),
    "a dict of 131,072 entries": entries(2**17),
    "a buffer of 64 MiB": buffer(64),
}


class Writing(Branch):
    """Writes to one element of a large tensor in some of its calls, and reads it.

    Args:
        width: of the streams.
        mib: the size of the tensor.
        writes: whether a call writes, by its number from 1 on.
        registered: whether the tensor is a buffer; otherwise no module holds it.
    """

    def __init__(
        self, width: int, mib: int, writes: Callable[[int], bool], registered: bool
    ) -> None:
        super().__init__(width)
        table = torch.ones(mib * 2**18)
        if registered:
            self.register_buffer("table", table)
        self.reach = (lambda branch: branch.table) if registered else (lambda branch: table)
        self.writes, self.calls = writes, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        table = self.reach(self)
        if self.writes(self.calls):
            table[:1].neg_()
        return super().forward(x) * table[0]


WRITES: dict[str, Callable[[int], bool]] = {
    "never": lambda call: False,
    "in every call": lambda call: True,
    "once, in the 3rd call": lambda call: call == 3,
    "once, in the 50th call": lambda call: call == 50,
    "from the 3rd call on": lambda call: call >= 3,
    "from the 50th call on": lambda call: call >= 50,
}
CALLS = 60


def writing(options: argparse.Namespace, name: str, registered: bool) -> Any:
    torch.manual_seed(0)
    pair = [Writing(options.width, 64, WRITES[name], registered) for _ in range(2)]
    return revnet.ReversibleSequence([pair], streams=options.streams)


def write_table(options: argparse.Namespace) -> list[str]:
    torch.manual_seed(1)
    x = torch.randn(options.batch, options.tokens, options.width)
    lines = [
        "| a buffer of 64 MiB is written | ms per step | ÷ outside of modules | slowest step, ms "
        "| bytes kept above outside |",
        "|---|---|---|---|---|",
    ]
    for name in WRITES:
        net, stored, outside = (writing(options, name, where) for where in (True, True, False))
        stored.execution = "store"
        times = []
        for call in range(1, CALLS + 1):
            seconds, found = train(net, x)
            expected = train(stored, x)[1]
            pairs = zip(found, expected, strict=True)
            assert all(torch.allclose(a, b, 1e-3, 1e-3) for a, b in pairs), f"{name}, call {call}"
            times.append((seconds, train(outside, x)[0]))
        kept = [revnet.measure_memory(each, x).saved_bytes for each in (net, outside)]
        # The first call fills caches.
        seconds = statistics.median(a for a, _ in times[1:])
        ratio = statistics.median(a / b for a, b in times[1:])
        slowest = max(a for a, _ in times[1:])
        lines.append(
            f"| {name} | {1e3 * seconds:.2f} | {ratio:.3f} | {1e3 * slowest:.2f} "
            f"| {kept[0] - kept[1]:,} |"
        )
    return lines


def network(options: argparse.Namespace, hold: Holding | None) -> revnet.ReversibleSequence:
    torch.manual_seed(0)
    width = options.width
    pairs = [(Branch(width), Branch(width)) for _ in range(options.blocks)]
    for branch in (branch for pair in pairs for branch in pair):
        if hold is not None:
            hold(branch)
    return revnet.ReversibleSequence(pairs, streams=options.streams)


def train(net: nn.Module, x: Tensor) -> tuple[float, list[Tensor]]:
    """Return the seconds of one training step, and the gradients."""
    net.zero_grad()
    start = time.process_time()
    net(x).square().sum().backward()
    seconds = time.process_time() - start
    return seconds, [p.grad for p in net.parameters() if p.grad is not None]


def table(options: argparse.Namespace) -> list[str]:
    torch.manual_seed(1)
    x = torch.randn(options.batch, options.tokens, options.width)
    plain = network(options, None)
    lines = [
        "| each branch holds | ms per step | ÷ nothing | bytes kept above nothing |",
        "|---|---|---|---|",
    ]
    kept = revnet.measure_memory(plain, x).saved_bytes
    for name, hold in ROWS.items():
        net = network(options, hold)
        pairs = zip(train(net, x)[1], train(plain, x)[1], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"{name}: other gradients"
        more = revnet.measure_memory(net, x).saved_bytes - kept
        for arm in (net, plain):
            for _ in range(3):
                train(arm, x)
        times = [(train(net, x)[0], train(plain, x)[0]) for _ in range(options.rounds)]
        seconds = statistics.median(a for a, _ in times)
        ratio = statistics.median(a / b for a, b in times)
        lines.append(f"| {name} | {1e3 * seconds:.2f} | {ratio:.3f} | {more:,} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--streams", choices=("float", "fixed"), default="float")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        *opening(
            "What it costs to replay attributes and buffers", f"CPU, {options.threads} thread"
        ),
        f"{options.blocks} blocks of two MLPs, width {options.width}, {options.batch} × "
        f"{options.tokens} tokens, {options.streams} streams.",
        "",
        "Stored is no arm here: both networks rebuild. Times are of the process, medians of "
        f"{options.rounds} steps in turn.",
        "",
        *table(options),
        "",
        f"One block of two branches, {CALLS} steps in turn.",
        "",
        *write_table(options),
    ]
    publish(lines, options.out)


if __name__ == "__main__":
    main()
