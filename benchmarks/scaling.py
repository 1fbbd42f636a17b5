"""How does training with a reversible sequence scale over GPUs, against FSDP2 with block
checkpointing?

    python benchmarks/scaling.py check context speed command depth length --gpus 1,2 --out
    benchmarks/results

check      gradients by DDP and FSDP2 against one GPU, and against stored execution
context    the same by context parallelism
speed      tokens per second, step time and activation peak for each number of GPUs, sharded by
block and by branch command    losses of `torchrun … -m revnet train` by DDP and FSDP2 against those
of one process depth      the most blocks that fit
length     the most tokens that fit

In `speed`, `depth` and `length` weights are float32, computed with in bfloat16, gradients reduced
in float32, and the states of AdamW exist. Each world size, and each search, has processes of its
own. What fails on one of them ends them all at once and is reported, and what is left begins in
fresh ones. The report is written anew after every row.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from _models import Attention, Mlp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from revnet import ReversibleSequence, measure_memory

GIB = 2**30
REVERSIBLE, FLOAT, CHECKPOINT = "reversible", "reversible float", "checkpoint"
EXECUTIONS = ("store", "select", "checkpoint", "offload", "invert")
METHODS = (REVERSIBLE, FLOAT, CHECKPOINT)
OUT_OF_MEMORY = 77


@dataclass(frozen=True)
class Work:
    """One network and its input: `blocks` of attention (or a causal shift) and an MLP, `batch` per
    GPU.
    """

    method: str
    width: int
    blocks: int
    tokens: int
    batch: int
    device: str
    shards: str = "block"
    mixer: str = "attention"
    memory: float | None = None


class Shift(nn.Module):
    """A causal mixer of constant cost per token: attention at a million tokens takes minutes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.leave(x + F.pad(x[:, :-1], (0, 0, 1, 0)))


class Residual(nn.Module):
    """The same branches on one stream: a usual transformer block."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x)


class Checkpointed(nn.Module):
    """Block checkpointing, which keeps one stream per block."""

    def __init__(self, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(f, g) for f, g in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def build(work: Work) -> nn.Module:
    """The network, sharded before its weights exist: it never stands on one GPU as a whole."""
    mixer = {"attention": Attention, "shift": Shift}[work.mixer]
    with torch.device("meta"):
        pairs = [(mixer(work.width), Mlp(work.width)) for _ in range(work.blocks)]
    if work.method == CHECKPOINT:
        model: nn.Module = Checkpointed(pairs)
    else:
        model = ReversibleSequence(pairs, streams="float" if work.method == FLOAT else "fixed")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    shard(model, work.shards, work.device, mp_policy=policy)
    model.to_empty(device=work.device)
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = parameter.to_local()
            if parameter.dim() == 2:
                own.normal_(std=0.02)
            else:
                own.fill_(1.0 if name.endswith("weight") else 0.0)
            parameter.grad = torch.zeros_like(parameter)
    return model


def shard(model: nn.Module, by: str, device: str, **options: Any) -> nn.Module:
    options["mesh"] = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.blocks:
        for module in (block.f, block.g) if by == "branch" else (block,):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the states that it otherwise makes in its first step. The gradients are zero as
    yet.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    optimizer.step()
    return optimizer


def inputs(work: Work) -> Tensor:
    torch.manual_seed(1000 + dist.get_rank())
    return torch.randn(
        work.batch, work.tokens, work.width, device=work.device, dtype=torch.bfloat16
    )


def backward(model: nn.Module, x: Tensor) -> None:
    """A loss that lets go of the output as soon as that is differentiated; in float32 it would
    outweigh the streams.
    """
    model(x).square().mean().backward()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clear(device: str) -> None:
    """Gives memory back: hooks and modules that FSDP2 ties together wait for the garbage
    collector.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def activation_peak(device: str, step: Callable[[], None]) -> int:
    """Bytes that a forward and backward pass hold at once, above weights, gradients and input."""
    if device == "cpu":
        return measure_memory(step).peak_bytes
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


# Each of the next ones runs on every rank; rank 0's rows are the result.


def check(checks: dict[str, Callable[[], str]]) -> Iterator[str]:
    """How each check came out. What fails on one rank leaves the others waiting: it ends the
    processes.
    """
    for fn in checks.values():
        yield fn()


def gradient_checks(device: str) -> dict[str, Callable[[], str]]:
    checks: dict[str, Callable[[], str]] = {
        f"{kind}, {execution}, float64, against one GPU": partial(
            against_one, device, kind, execution
        )
        for kind in ("DDP", "FSDP2 by block", "FSDP2 by branch")
        for execution in EXECUTIONS
    }
    checks["fixed streams, FSDP2 in bfloat16, against stored execution"] = partial(
        exact, device, "FSDP2 by block"
    )
    return checks


def context_checks(device: str) -> dict[str, Callable[[], str]]:
    return {
        f"{kernel} kernel in {name}, {streams} streams, {execution}, against "
        f"{'one GPU' if execution == 'store' else 'stored execution'}": partial(
            contexts, device, execution, streams, f"{kernel}_ATTENTION", dtype
        )
        for kernel, name, dtype in (
            ("EFFICIENT", "float32", torch.float32),
            ("FLASH", "bfloat16", torch.bfloat16),
        )
        for streams in ("float", "fixed")
        for execution in ("store", "checkpoint", "invert")
    }


def small(device: str, dtype: torch.dtype, execution: str, streams: str) -> ReversibleSequence:
    """A network that is alike on every rank."""
    torch.manual_seed(7)
    pairs = [(Attention(128), Mlp(128)) for _ in range(3)]
    return ReversibleSequence(pairs, execution=execution, streams=streams).to(device, dtype)


def wrapped(kind: str, model: ReversibleSequence, **options: Any) -> nn.Module:
    if kind == "DDP":
        return DistributedDataParallel(model)
    return shard(model, kind.split()[-1], next(model.parameters()).device.type, **options)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in found]


def difference(some: list[Tensor], others: list[Tensor]) -> str:
    """The largest relative difference of a gradient."""
    if all(torch.equal(a, b) for a, b in zip(some, others, strict=True)):
        return "equal in every bit"
    return f"{max(float((a - b).norm() / b.norm()) for a, b in zip(some, others, strict=True)):.1e}"


def against_one(device: str, kind: str, execution: str) -> str:
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.randn(
        2 * world, 32, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).to(device)
    one = small(device, torch.float64, "store", "float")
    one(x).square().mean().backward()
    model = wrapped(kind, small(device, torch.float64, execution, "float"))
    model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    return difference(gradients(model), gradients(one))


def exact(device: str, kind: str) -> str:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(2, 64, 128, device=device)
    found = []
    for execution in ("store", "invert"):
        model = wrapped(kind, small(device, torch.float32, execution, "fixed"), mp_policy=policy)
        model(x).float().square().mean().backward()
        found.append(gradients(model))
    return difference(*found)


def contexts(device: str, execution: str, streams: str, kernel: str, dtype: torch.dtype) -> str:
    """Each rank has some tokens; torch's ring attention passes keys and values around, in replays
    too.
    """
    world = dist.get_world_size()
    mesh = init_device_mesh(device, (world,))
    # 64 tokens per rank or a multiple of it: see docs/scaling.md.
    x = torch.randn(2, 64 * world, 128, generator=torch.Generator().manual_seed(3)).to(
        device, dtype
    )
    found = []
    for this, ring in (("store", execution != "store"), (execution, True)):
        model = small(device, dtype, this, streams)
        part = x.clone()
        around = (
            context_parallel(mesh, buffers=[part], buffer_seq_dims=[1])
            if ring
            else contextlib.nullcontext()
        )
        with sdpa_kernel(getattr(SDPBackend, kernel)), around:
            model(part).float().square().sum().backward()
        found.append([parameter.grad.float() for parameter in model.parameters()])
        if ring:
            for gradient in found[-1]:
                dist.all_reduce(gradient)
    return difference(found[1], found[0])


def speed(works: list[Work], rounds: int, seconds: float) -> Iterator[dict[str, float]]:
    """Median step time (forward, backward, AdamW) and activation peak of each work, one after the
    other.
    """
    for work in works:
        model, x = build(work), inputs(work)
        optimizer = adam(model)

        def step(
            model: nn.Module = model, x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer
        ) -> None:
            backward(model, x)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        for _ in range(3):
            step()
        peak = activation_peak(work.device, partial(backward, model, x))
        optimizer.zero_grad(set_to_none=False)
        times: list[float] = []
        end = time.perf_counter() + seconds
        more = torch.ones(1, device=work.device)
        while len(times) < rounds and more.item():
            dist.barrier()
            synchronize(work.device)
            start = time.perf_counter()
            step()
            synchronize(work.device)
            times.append(time.perf_counter() - start)
            # The ranks' clocks differ: rank 0 says when there has been enough.
            more.fill_(float(time.perf_counter() < end))
            dist.broadcast(more, 0)
        yield {"seconds": statistics.median(times), "steps": len(times), "peak": peak}
        del model, optimizer, x, step
        clear(work.device)


def trials(
    work: Work, name: str, sizes: tuple[int, int], shares: list[float], seconds: float, failed: int
) -> Iterator[Any]:
    """Training steps of two sizes that fit, and then of shares of the size that, by a straight
    line, just fits.

    Of the size that `failed`, if there is one.

    Yields the expected size; then each size that is tried, and after it the seconds and bytes of
    its step.
    """
    end = time.perf_counter() + seconds
    if work.device == "cuda" and work.memory is not None:
        torch.cuda.set_per_process_memory_fraction(work.memory * GIB / torch.cuda.mem_get_info()[1])
    # The first step of a process also loads its kernels.
    low, low, high = (trial(replace(work, **{name: size})) for size in (sizes[0], *sizes))
    slope = {key: (high[key] - low[key]) / (sizes[1] - sizes[0]) for key in ("peak", "seconds")}
    # The ranks' clocks and memories differ: rank 0 decides.
    plan = [sizes[1] + (room(work) - high["peak"]) / slope["peak"], slope["seconds"]]
    dist.broadcast_object_list(plan, 0)
    expected, each = plan
    yield expected
    for share in shares:
        size = int(share * (failed or expected))
        # What does not fit says so before its step ends.
        if share < 1 and size * each > seconds:
            size = int(seconds / each)
        late = [time.perf_counter() > end]
        dist.broadcast_object_list(late, 0)
        if late[0]:
            return
        size -= size % (1 if name == "blocks" else 64)
        yield size
        yield trial(replace(work, **{name: size}))


def room(work: Work) -> float:
    """Bytes of a GPU that a network may have."""
    if work.memory is not None or work.device == "cpu":
        return (work.memory or 1.0) * GIB
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def trial(work: Work) -> dict[str, float]:
    """Seconds of one training step, and the most bytes that it holds."""
    clear(work.device)
    model, x = build(work), inputs(work)
    optimizer = adam(model)
    synchronize(work.device)
    start = time.perf_counter()
    peak = activation_peak(work.device, partial(backward, model, x))
    optimizer.step()
    synchronize(work.device)
    seconds = time.perf_counter() - start
    if work.device == "cuda":
        return {"seconds": seconds, "peak": torch.cuda.max_memory_allocated()}
    peak += sum(16 * parameter.to_local().numel() for parameter in model.parameters())
    if peak > room(work):
        raise torch.OutOfMemoryError(f"{peak} bytes")
    return {"seconds": seconds, "peak": peak}


def _rank(
    rank: int, gpus: int, store: str, path: str, fn: Callable[..., Any], device: str, args: Any
) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=gpus)
    rows = []
    try:
        for row in fn(*args):
            rows.append(row)
            if rank == 0:
                Path(path).write_text(json.dumps(rows))
    except BaseException as error:
        # The other ranks wait in a collective: the parent ends them. Nothing here may wait for
        # them.
        if exhausted(error):
            os._exit(OUT_OF_MEMORY)
        traceback.print_exc()
        Path(path).with_name(f"error-{rank}").write_text(first_line(error))
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def exhausted(error: BaseException) -> bool:
    """Whether memory was too small: libraries that allocate for themselves have errors of their own
    for it.
    """
    said = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in said
        or "ALLOC_FAILED" in said
    )


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].replace("|", "/")


def on_ranks(
    gpus: int, seconds: float, fn: Callable[..., Any], device: str, *args: Any
) -> tuple[list[Any], str]:
    """The rows that `fn` yields on rank 0 of fresh processes, and why they are not all there, or
    nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        arguments = (gpus, str(Path(folder) / "store"), str(path), fn, device, args)
        failure, end = "", time.monotonic() + seconds
        # The server of the forks has imported torch, and has not touched a GPU.
        multiprocessing.set_forkserver_preload(["torch", "torch.distributed.fsdp", "revnet"])
        context: Any = mp.start_processes(
            _rank, arguments, gpus, join=False, start_method="forkserver"
        )
        processes = context.processes
        try:
            while any(process.is_alive() for process in processes) and not failure:
                time.sleep(0.05)
                codes = [process.exitcode for process in processes if process.exitcode]
                if OUT_OF_MEMORY in codes:
                    failure = "out of memory"
                elif codes:
                    # The others fail after the first, because it is gone.
                    files = sorted(
                        Path(folder).glob("error-*"), key=lambda file: file.stat().st_mtime_ns
                    )
                    said = [file.read_text() for file in files]
                    failure = f"failed: {said[0] if said else f'exit code {codes[0]}'}"
                elif time.monotonic() > end:
                    failure = f"no answer within {seconds:.0f} s"
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return (json.loads(path.read_text()) if path.exists() else []), failure


class Report:
    """Lines that are shown at once, and written to a file that is whole after each of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        cuda = options.device == "cuda"
        where = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
        day = datetime.date.today()
        self.lines = [
            "# Training on several GPUs",
            "",
            f"    python {' '.join(sys.argv)}".replace(f" --out {options.out}", ""),
            "",
            f"{day}; {max(options.gpus)} × {where}; torch {torch.__version__}, Python "
            f"{platform.python_version()}",
        ]
        kind = where.lower().replace(" ", "-")
        self.path = options.out / f"scaling_{kind}_{day}.md" if options.out else None
        self.start = time.perf_counter()

    def add(self, *lines: str) -> None:
        """Adds lines, after what was said before."""
        print(*lines, sep="\n", flush=True)
        self.lines += lines
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("\n".join(self.lines) + "\n")

    def table(self, title: str, text: str, *columns: str) -> None:
        """Begins a section with a table."""
        self.add(
            "",
            f"## {title}",
            "",
            text,
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
        )

    def row(self, *cells: str) -> None:
        self.add(f"| {' | '.join(cells)} |")


def report_check(options: argparse.Namespace, report: Report) -> None:
    report_gradients("Gradients", options, report, gradient_checks(options.device))


def report_context(options: argparse.Namespace, report: Report) -> None:
    report_gradients("Context parallelism", options, report, context_checks(options.device))


def report_gradients(
    title: str, options: argparse.Namespace, report: Report, checks: dict[str, Callable[[], str]]
) -> None:
    gpus = max(options.gpus)
    report.table(
        title,
        f"On {gpus} ranks; the largest relative difference of a gradient.",
        "what",
        "difference",
    )
    failures = 0
    while checks and failures < 4:
        rows, failure = on_ranks(gpus, 90, check, options.device, checks)
        names = list(checks)
        for name, found in zip(names, rows, strict=False):
            report.row(name, found)
        if failure:
            report.row(names[len(rows)] if len(rows) < len(names) else "", failure)
            failures += 1
        checks = {name: checks[name] for name in names[len(rows) + bool(failure) :]}
    if checks:
        report.row("the rest", f"not run after {failures} failures")


def work_of(
    options: argparse.Namespace, method: str, width: int, blocks: int, tokens: int, batch: int
) -> Work:
    return Work(
        method,
        options.width or width,
        options.blocks or blocks,
        options.tokens or tokens,
        options.batch or batch,
        options.device,
        memory=options.memory,
    )


def report_speed(options: argparse.Namespace, report: Report) -> None:
    works = [
        replace(work_of(options, method, 2048, 24, 4096, 2), shards=shards)
        for shards in ("block", "branch")
        for method in options.methods or METHODS
    ]
    some = works[0]
    report.table(
        "Speed",
        f"Width {some.width}, {some.blocks} blocks, {some.tokens} tokens, batch {some.batch} per "
        f"GPU; forward, backward and AdamW. The peak is that of one GPU above weights, gradients "
        f"and optimizer, buffers of FSDP2 included; ratios are to the same GPUs and shards.",
        "GPUs", "shards", "method", "step", "steps", "tokens/s", "× one GPU", "activation peak",
        "time", "peak ÷ checkpointing",
    )  # fmt: skip
    alone: dict[Work, float] = {}
    for gpus in options.gpus:
        found, failure = on_ranks(
            gpus, 150, speed, options.device, works, options.rounds, options.seconds / 8
        )
        rows = dict(zip(works, found, strict=False))
        for work, row in rows.items():
            base = rows.get(replace(work, method=CHECKPOINT))
            rate = gpus * work.batch * work.tokens / row["seconds"]
            if gpus == 1:
                alone[work] = rate
            report.row(
                f"{gpus}",
                work.shards,
                work.method,
                f"{row['seconds'] * 1e3:.1f} ms",
                f"{row['steps']:.0f}",
                f"{rate:,.0f}",
                f"{rate / alone[work]:.2f}" if work in alone else "",
                f"{row['peak'] / 2**20:,.0f} MiB",
                f"{row['seconds'] / base['seconds']:.3f}" if base else "",
                f"{row['peak'] / base['peak']:.3f}" if base else "",
            )
        if failure:
            failed = works[len(found)] if len(found) < len(works) else None
            names = (failed.shards, failed.method) if failed else ("", "")
            report.row(f"{gpus}", *names, failure, *[""] * 6)


def report_command(options: argparse.Namespace, report: Report) -> None:
    """The real command, as a user starts it."""
    gpus, steps = max(options.gpus), 20
    report.table(
        "The command",
        f"`revnet train` on text, {steps} steps of {4 * gpus} examples, float32, without dropout, "
        f"in one process and by `torchrun --nproc-per-node {gpus}`; the last row goes on from the "
        f"checkpoint of FSDP2 by DDP.",
        "run", "first loss", "last loss", "largest relative difference", "took",
    )  # fmt: skip
    arguments = {
        "context": 64,
        "depth": 4,
        "width": 128,
        "heads": 4,
        "batch": 4 * gpus,
        "dropout": 0.0,
    }
    arguments |= {
        "lr": 1e-3,
        "validate-every": steps,
        "save-every": steps,
        "device": options.device,
    }
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "texts"
        text.mkdir()
        for file in sorted(Path(__file__).parent.glob("*.py")):
            (text / file.name).write_text(file.read_text())
        runs: list[tuple[str, int, list[str]]] = [
            ("one process", 1, ["--steps", str(steps), "--out", f"{folder}/one"]),
            ("DDP", gpus, ["--steps", str(steps), "--parallel", "ddp", "--out", f"{folder}/ddp"]),
            (
                "FSDP2",
                gpus,
                ["--steps", str(steps), "--parallel", "fsdp", "--out", f"{folder}/fsdp"],
            ),
            (
                "resumed",
                gpus,
                ["--steps", str(2 * steps), "--parallel", "ddp", "--resume", f"{folder}/fsdp"],
            ),
        ]
        first: dict[int, float] = {}
        for name, world, given in runs:
            start = time.perf_counter()
            launch = [sys.executable, "-m"]
            if world > 1:
                launch += [
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc-per-node={world}",
                    "-m",
                ]
            fresh = (
                []
                if "--resume" in given
                else [str(text), *(f"--{key}={value}" for key, value in arguments.items())]
            )
            try:
                done = subprocess.run(
                    [*launch, "revnet", "train", *fresh, *given],
                    capture_output=True, text=True, timeout=90, check=False,
                )  # fmt: skip
                if done.returncode:
                    print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr, flush=True)
                    said = [
                        line
                        for line in (done.stderr + done.stdout).splitlines()
                        if "rror" in line or "revnet:" in line
                    ]
                    raise RuntimeError(said[-1] if said else f"exit code {done.returncode}")
                lines = (Path(given[-1]) / "metrics.jsonl").read_text().splitlines()
                losses = {
                    row["step"]: row["bits"] for row in map(json.loads, lines) if "bits" in row
                }
            except Exception as error:
                report.row(
                    name,
                    f"failed: {first_line(error)}",
                    "",
                    "",
                    f"{time.perf_counter() - start:.0f} s",
                )
                continue
            first = first or losses
            shared = first.keys() & losses.keys()
            off = max(abs(losses[step] / first[step] - 1) for step in shared)
            report.row(
                name,
                f"{losses[min(losses)]:.6f}",
                f"{losses[max(losses)]:.6f} (step {max(losses)})",
                "" if losses is first else f"{off:.1e} over {len(shared)} logged losses",
                f"{time.perf_counter() - start:.0f} s",
            )


def report_depth(options: argparse.Namespace, report: Report) -> None:
    search(
        options,
        report,
        "blocks",
        (8, 24),
        partial(work_of, options, width=2048, blocks=0, tokens=4096, batch=2),
    )


def report_length(options: argparse.Namespace, report: Report) -> None:
    def work(method: str) -> Work:
        return replace(work_of(options, method, 2048, 24, 0, 1), mixer="shift")

    search(
        options,
        report,
        "tokens",
        (65536, 131072) if options.device == "cuda" else (256, 1024),
        work,
    )


def search(
    options: argparse.Namespace,
    report: Report,
    name: str,
    sizes: tuple[int, int],
    work: Callable[[str], Work],
) -> None:
    """Finds the largest size that fits: memory and time are straight lines, and trials next to
    their end decide.
    """
    gpus = max(options.gpus)
    some = work(FLOAT)
    fixed = f"{some.tokens} tokens" if name == "blocks" else f"{some.blocks} blocks"
    report.table(
        "The deepest network" if name == "blocks" else "The longest sequence",
        f"On {gpus} GPUs: width {some.width}, {fixed}, batch {some.batch} per GPU, {some.mixer} "
        f"and MLP, sharded by {some.shards}; one step of forward, backward and AdamW. All of it "
        f"has to fit: weights, gradients and the states of AdamW in float32, {16 / gpus:.3g} bytes "
        f"of a GPU per parameter, as well as activations. "
        + (f"At most {options.memory} GiB of each GPU. " if options.memory else "")
        + f"At most {options.seconds:.0f} s per method.",
        "method", name, "step", "peak per GPU", "",
    )  # fmt: skip
    for method in options.methods or METHODS:
        fits, fails, expected = 0, 0, 0.0
        # Upwards until it no longer fits; where the first does not, once more from further below.
        for shares in ([0.98, 1.02, 1.06, 1.12], [0.95, 0.975], [0.85, 0.9]):
            given = (work(method), name, sizes, shares, options.seconds, fails)
            found, failure = on_ranks(
                gpus, 2 * options.seconds + 60, trials, options.device, *given
            )
            expected = expected or (found[0] if found else 0)
            for size, taken in zip(found[1::2], found[2::2], strict=False):
                fits = max(fits, size)
                report.row(
                    method,
                    f"{size:,}",
                    f"{taken['seconds']:.1f} s",
                    f"{taken['peak'] / GIB:.1f} GiB",
                    "fits",
                )
            if failure:
                tried = found[-1] if len(found) % 2 == 0 and found else 0
                report.row(method, f"{tried:,}" if tried else "", "", "", failure)
                if tried and failure == "out of memory":
                    fails = min(fails or tried, tried)
            if fits or not fails:
                break
        end = f", not {fails:,}" if fails else ""
        rest = "" if fails else "; larger ones were not tried"
        report.row(
            f"**{method}**", f"**{fits:,} fit{end}**", "", "", f"{expected:,.0f} expected{rest}"
        )


PARTS = {
    "check": report_check,
    "context": report_context,
    "speed": report_speed,
    "command": report_command,
    "depth": report_depth,
    "length": report_length,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS), metavar="PART")
    parser.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), help="of speed and the searches"
    )
    parser.add_argument("--width", type=int, help="instead of the part's own, as the next three")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--batch", type=int, help="per GPU")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed, at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="per method of a search")
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="of each GPU for a search (all of it; 1 on a CPU)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report")
    options = parser.parse_args()
    # Long sequences leave no room for fragments.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    report = Report(options)
    for part in options.parts:
        start = time.perf_counter()
        try:
            PARTS[part](options, report)
        except Exception as error:
            traceback.print_exc()
            report.add("", f"{part} failed: {first_line(error)}")
        report.add("", f"({part} took {time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
