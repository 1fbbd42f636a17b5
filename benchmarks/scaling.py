"""How does FSDP2 training with a reversible sequence scale over GPUs, against FSDP2 with block checkpointing?

    python benchmarks/scaling.py speed --gpus 1,2,4      tokens per second, step time, activation peak
    python benchmarks/scaling.py depth --gpus 4          the most blocks that fit
    python benchmarks/scaling.py length --gpus 4         the most tokens that fit

Prints one markdown table per part. Every network is sharded by block, its weights in float32, computed in bfloat16,
reduced in float32. Each world size, and each trial of the two searches, is a fresh set of processes, so that running
out of memory in one says nothing about the next.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from revnet import ReversibleSequence

GIB = 2**30
METHODS = ("reversible", "reversible float", "checkpoint")


@dataclass
class Work:
    """One network and its input: `blocks` of attention (or a causal convolution) and an MLP, `batch` per GPU."""

    method: str
    width: int
    blocks: int
    tokens: int
    batch: int
    mixer: str = "attention"
    device: str = "cuda"


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 128)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.leave = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.leave(mixed.transpose(1, 2).flatten(2))


class Shift(nn.Module):
    """A causal mixer of constant cost per token, for the searches: attention at a million tokens takes minutes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.leave(x + F.pad(x[:, :-1], (0, 0, 1, 0)))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 4 * width, bias=False)
        self.leave = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.gelu(self.enter(self.norm(x))))


class Residual(nn.Module):
    """The same branches on one stream: a usual transformer block."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x)


class Checkpointed(nn.Module):
    """Block checkpointing."""

    def __init__(self, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(f, g) for f, g in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def build(work: Work, execution: str = "invert") -> nn.Module:
    """The network, sharded by block before its weights exist: it never stands on one GPU as a whole."""
    mixer = {"attention": Attention, "shift": Shift}[work.mixer]
    with torch.device("meta"):
        pairs = [(mixer(work.width), Mlp(work.width)) for _ in range(work.blocks)]
    if work.method == "checkpoint":
        model: nn.Module = Checkpointed(pairs)
    else:
        streams = "float" if work.method == "reversible float" else "fixed"
        model = ReversibleSequence(pairs, streams=streams, execution=execution)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device=work.device)
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shard = parameter.to_local()
            if parameter.dim() == 2:
                shard.normal_(std=0.02)
            else:
                shard.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def inputs(work: Work) -> Tensor:
    torch.manual_seed(1000 + dist.get_rank())
    return torch.randn(work.batch, work.tokens, work.width, device=work.device, dtype=torch.bfloat16)


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).float().square().mean().backward()


def assert_exact(work: Work) -> None:
    """Gradients of inverted and of stored execution are equal in every bit, on these ranks."""
    small = Work("reversible", 256, 4, 64, 2, work.mixer, work.device)
    results = []
    for execution in ("store", "invert"):
        model = build(small, execution)
        backward(model, inputs(small))
        results.append([parameter.grad.to_local().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "inverted and stored gradients differ"


def synchronize(work: Work) -> None:
    if work.device == "cuda":
        torch.cuda.synchronize()


def activation_peak(work: Work, model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward and backward pass hold at once, above the weights and their gradients."""
    if work.device != "cuda":
        return 0
    # The gradients exist already: zeroed, not freed, they are not counted.
    synchronize(work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(model, x)
    synchronize(work)
    return torch.cuda.max_memory_allocated() - before


# Each of these runs on every rank, and returns rank 0's result.


def speed(works: list[Work], rounds: int, seconds: float) -> list[dict[str, float]]:
    """Median step time (forward, backward, AdamW) and activation peak of each work, one after the other."""
    if works[0].device == "cuda":
        assert_exact(works[0])
    results = []
    for work in works:
        model = build(work)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        x = inputs(work)

        def step(model: nn.Module = model, x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> None:
            backward(model, x)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        for _ in range(3):
            step()
        peak = activation_peak(work, model, x)
        optimizer.zero_grad(set_to_none=False)
        times: list[float] = []
        end = time.perf_counter() + seconds / len(works)
        more = torch.ones(1, device=work.device)
        while len(times) < rounds and more.item():
            dist.barrier()
            synchronize(work)
            start = time.perf_counter()
            step()
            synchronize(work)
            times.append(time.perf_counter() - start)
            # The ranks' clocks differ: rank 0 says when there has been enough.
            more.fill_(float(time.perf_counter() < end))
            dist.broadcast(more, 0)
        results.append({"seconds": statistics.median(times), "steps": len(times), "peak": peak})
        del model, optimizer, x, step
        torch.cuda.empty_cache() if work.device == "cuda" else None
    return results


def trial(work: Work) -> dict[str, float]:
    """Seconds and bytes of one training step (SGD), or none of either where it does not fit."""
    model, x = build(work), inputs(work)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    start = time.perf_counter()
    for _ in range(2):
        # The second pass meets gradients that exist.
        start = time.perf_counter()
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        synchronize(work)
    peak = torch.cuda.max_memory_allocated() if work.device == "cuda" else 0
    return {"seconds": time.perf_counter() - start, "peak": peak}


def _rank(rank: int, gpus: int, store: str, path: str, fn: Callable[..., Any], device: str, args: Any) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=gpus)
    try:
        result = fn(*args)
    except torch.OutOfMemoryError:
        # The other ranks wait in a collective: the parent ends them.
        raise SystemExit(OUT_OF_MEMORY) from None
    if rank == 0:
        Path(path).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


OUT_OF_MEMORY = 77


def on_ranks(gpus: int, fn: Callable[..., Any], device: str, *args: Any) -> Any:
    """What `fn` returns on rank 0 of fresh processes; None where one of them ran out of memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        try:
            mp.spawn(_rank, (gpus, str(Path(folder) / "store"), str(path), fn, device, args), nprocs=gpus)
        except mp.ProcessExitedException as error:
            if error.exit_code != OUT_OF_MEMORY:
                raise
            return None
        return json.loads(path.read_text())


def report_speed(options: argparse.Namespace) -> None:
    works = [
        Work(method, options.width, options.blocks, options.tokens, options.batch, device=options.device)
        for method in options.methods
    ]
    print("| GPUs | method | step | steps | tokens/s | against one GPU | activation peak | against checkpointing |")
    print("|---|---|---|---|---|---|---|---|")
    alone: dict[str, float] = {}
    for gpus in options.gpus:
        found = on_ranks(gpus, speed, options.device, works, options.rounds, options.seconds)
        if found is None:
            print(f"| {gpus} | | out of memory | | | | | |", flush=True)
            continue
        base = found[-1] if works[-1].method == "checkpoint" else None
        for work, row in zip(works, found, strict=True):
            rate = gpus * work.batch * work.tokens / row["seconds"]
            alone.setdefault(work.method, rate / gpus)
            against = "" if base is None else f"time ×{row['seconds'] / base['seconds']:.3f}"
            if base is not None and base["peak"]:
                against += f", peak ×{row['peak'] / base['peak']:.3f}"
            print(
                f"| {gpus} | {work.method} | {row['seconds'] * 1e3:.1f} ms | {row['steps']:.0f} | {rate:,.0f} "
                f"| ×{rate / alone[work.method]:.2f} | {row['peak'] / GIB:.2f} GiB | {against} |",
                flush=True,
            )


def report_search(options: argparse.Namespace) -> None:
    """Grows one size from `--start` by doubling while it fits, then halves the gap to what did not."""
    gpus = options.gpus[-1]
    unit = 1 if options.part == "depth" else 1024
    name = "blocks" if options.part == "depth" else "tokens"
    print(f"| method | {name} | step | peak per GPU |\n|---|---|---|---|")
    for method in options.methods:
        fits, fails, size = 0, math.inf, options.start
        end = time.perf_counter() + options.seconds
        while True:
            given = {"blocks": options.blocks, "tokens": options.tokens, "batch": 1, name: size}
            work = Work(method, options.width, **given, mixer="shift", device=options.device)
            found = on_ranks(gpus, trial, options.device, work)
            if found is None:
                fails = size
                print(f"| {method} | {size:,} | out of memory | |", flush=True)
            else:
                fits = size
                print(f"| {method} | {size:,} | {found['seconds']:.1f} s | {found['peak'] / GIB:.1f} GiB |", flush=True)
            size = min(2 * fits, options.most) if math.isinf(fails) else (fits + int(fails)) // 2 // unit * unit
            if size <= fits or fails - fits <= 0.02 * fails or time.perf_counter() > end:
                break
        outcome = "" if math.isinf(fails) else f", not {fails:,}"
        print(f"| **{method}** | **{fits:,} fit{outcome}** | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "depth", "length"))
    parser.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2, help="per GPU; the searches use 1")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed, at most")
    parser.add_argument("--start", type=int, default=64, help="the first size of a search")
    parser.add_argument("--most", type=int, default=2**20, help="the largest size of a search")
    parser.add_argument("--seconds", type=float, default=45.0, help="per world size, or per method of a search")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU"
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}\n")
    report_speed(options) if options.part == "speed" else report_search(options)


if __name__ == "__main__":
    main()
