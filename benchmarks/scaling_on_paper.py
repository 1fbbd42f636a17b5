"""What do large networks need per GPU at long sequences, reversible and checkpointed? On paper.

    python benchmarks/scaling_on_paper.py            # the table of docs/scaling.md
    python benchmarks/scaling_on_paper.py --check --out benchmarks/results/scaling_on_paper_cpu.md

The formulas are those of docs/scaling.md. `--check` compares them with what one GPU, or the CPU,
holds, and counts on CPU ranks what FSDP2 and the stages of a pipeline hold beside.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

GIB = 2**30
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Shape:
    """A transformer: `width` features, `layers` of attention and an MLP of `hidden` features, gated
    or not.
    """

    name: str
    width: int
    layers: int
    hidden: int
    parameters: float
    gated: bool = True


@dataclass(frozen=True)
class Layout:
    """How one sequence and the weights lie on GPUs: `split` of them share its tokens, `shards`
    share the weights.
    """

    split: int
    shards: int


SHAPES = (Shape("8B", 4096, 32, 14336, 8.0e9), Shape("70B", 8192, 80, 28672, 70.6e9))
TOKENS = {"32K": 2**15, "128K": 2**17, "1M": 2**20}
LAYOUTS = {"8B": Layout(8, 64), "70B": Layout(8, 512)}


def weights(shape: Shape, layout: Layout) -> float:
    """Bytes of float32 weights, gradients and the two states of AdamW, and of what FSDP2 holds
    besides.
    """
    return 4 * FP32 * shape.parameters / layout.shards + buffers(shape)


def buffers(shape: Shape) -> float:
    """Bytes that FSDP2, by block, holds at the peak: two gathered blocks, and the last one's
    gradients in float32.
    """
    return (2 * BF16 + FP32) * shape.parameters / shape.layers


def stream(shape: Shape, tokens: int, layout: Layout) -> float:
    """Bytes of one bfloat16 tensor (tokens, width) on one GPU."""
    return BF16 * shape.width * tokens / layout.split


def branch(shape: Shape, tokens: int, layout: Layout) -> float:
    """Bytes that the larger branch, the MLP, holds at the widest moment of its backward pass.

    Two tensors of the width: its input and the norm's output. A gated one holds six of the hidden
    size: two projections, the activation, and the gradients of the product and of its factors; a
    plain one three.
    """
    return (
        BF16 * (2 * shape.width + (6 if shape.gated else 3) * shape.hidden) * tokens / layout.split
    )


def attention(shape: Shape, tokens: int, layout: Layout) -> float:
    """Bytes that the attention branch saves: input, norm, queries, keys, values and result."""
    return BF16 * 6 * shape.width * tokens / layout.split


def reversible(shape: Shape, tokens: int, layout: Layout, fixed: bool = True) -> float:
    """Two streams, their gradients, the stream that is read, and one branch. The number of layers
    is not in it.

    Fixed streams hold four bytes more of each number, what its rounding to bfloat16 left over.
    """
    held = 2 * stream(shape, tokens, layout) * (3 if fixed else 1)
    return held + 3 * stream(shape, tokens, layout) + branch(shape, tokens, layout)


def checkpointed(shape: Shape, tokens: int, layout: Layout) -> float:
    """One stream per layer, its gradient, and one whole layer."""
    kept = (shape.layers + 1) * stream(shape, tokens, layout)
    return kept + attention(shape, tokens, layout) + branch(shape, tokens, layout)


def offloaded(shape: Shape, tokens: int, layout: Layout) -> float:
    """As checkpointed, but only the layer at work and the one under way from the host are on the
    GPU.
    """
    kept = 3 * stream(shape, tokens, layout)
    return kept + attention(shape, tokens, layout) + branch(shape, tokens, layout)


def host(shape: Shape, tokens: int, layout: Layout) -> float:
    """Pinned bytes of host memory per GPU, for the offloaded streams."""
    return shape.layers * stream(shape, tokens, layout)


def table() -> str:
    """The table of docs/scaling.md: GiB per GPU."""
    lines = [
        "| shape, tokens | weights, buffers | reversible | checkpointed | checkpointed and "
        "offloaded | + host memory |",
        "|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        layout = LAYOUTS[shape.name]
        for name, tokens in TOKENS.items():
            cells = [
                fn(shape, tokens, layout) / GIB
                for fn in (reversible, checkpointed, offloaded, host)
            ]
            lines.append(
                f"| {shape.name}, {name} | {weights(shape, layout) / GIB:.1f} | "
                + " | ".join(f"{cell:.1f}" for cell in cells)
                + " |"
            )
    return "\n".join(lines)


# --- against a meter


def check() -> list[str]:
    """The formulas against what a network holds, in streams."""
    import torch
    from _models import Attention, Mlp
    from scaling import Checkpointed

    from revnet import ReversibleSequence, measure_memory

    device, width, tokens = ("cuda", 1024, 16384) if torch.cuda.is_available() else ("cpu", 64, 512)
    here = Layout(1, 1)
    lines = ["| layers | execution | on paper | measured |", "|---|---|---|---|"]
    for layers in (4, 16):
        shape = Shape("small", width, layers, 4 * width, 0, gated=False)
        for name, formula in (
            ("reversible, fixed", reversible(shape, tokens, here)),
            ("reversible, float", reversible(shape, tokens, here, fixed=False)),
            ("checkpointed", checkpointed(shape, tokens, here)),
        ):
            pairs = [(Attention(width), Mlp(width)) for _ in range(layers)]
            streams = name.split()[-1]
            model = (
                Checkpointed(pairs)
                if name == "checkpointed"
                else ReversibleSequence(pairs, streams=streams)
            )
            model.to(device, torch.bfloat16)
            x = torch.randn(1, tokens, width, dtype=torch.bfloat16, device=device)

            def step(model: torch.nn.Module = model, x: torch.Tensor = x) -> None:
                model(x).sum().backward()

            step()
            # The gradients exist now, so the meter does not count them.
            unit = stream(shape, tokens, here)
            measured = measure_memory(step).peak_bytes
            lines.append(
                f"| {layers} | {name} | {formula / unit:.1f} streams | {measured / unit:.1f} |"
            )
    return lines


# What FSDP2's step holds, of the tensors whose storages are alive at its widest moment.
KINDS = ("streams", "gradient of a weight", "gathered weights", "gradients being reduced")


def check_sharded() -> list[str]:
    """What FSDP2's buffers add to it, in streams: one rank, of the proportions of width 2048 and 2
    × 4096 tokens.
    """
    import torch.distributed as dist
    from scaling import CHECKPOINT, FLOAT, Work, activation_peak, backward, build, inputs

    lines = [f"| shards | method | measured | {' | '.join(KINDS)} |", "|---" * 7 + "|"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for shards in ("block", "branch"):
        for method in (FLOAT, CHECKPOINT):
            work = Work(method, 256, 24, 512, 2, "cpu", shards)
            model, x = build(work), inputs(work)
            step, unit = partial(backward, model, x), x.numel() * BF16
            # In the first step, as FSDP2 later fills again what it gathered into then.
            kinds = [f"{held / unit:.1f}" for held in widest(step)]
            step()
            peak = activation_peak(work.device, step)
            lines.append(
                f"| {shards} | {method} | {peak / unit:.1f} streams | {' | '.join(kinds)} |"
            )
    dist.destroy_process_group()
    return lines


def widest(step: Callable[[], None]) -> list[int]:
    """Return the bytes of each kind at the widest moment of a step.

    Counted are the storages that operations make, at what they hold then: FSDP2 frees a gathered
    weight by emptying its storage.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    plain = (torch.Tensor, torch.nn.Parameter)

    class Held(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive: dict[int, tuple[Any, str]] = {}
            self.most = [0] * len(KINDS)

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            given = {storage._cdata for storage in storages((args, kwargs))}
            out = func(*args, **(kwargs or {}))
            for leaf in leaves(out):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.alive:
                    reference = weakref.ref(storage, lambda _, key=key: self.alive.pop(key))
                    self.alive[key] = reference, kind_of(func, args, leaf)
            self.note()
            return out

        def note(self) -> None:
            held = dict.fromkeys(KINDS, 0)
            for reference, kind in list(self.alive.values()):
                storage = reference()
                held[kind] += storage.nbytes() if storage is not None else 0
            if sum(held.values()) > sum(self.most):
                self.most = list(held.values())

    def leaves(value: Any) -> list[Any]:
        # Not those of tensors that hold others, such as DTensor.
        return [leaf for leaf in tree_leaves(value) if type(leaf) in plain]

    def storages(value: Any) -> list[Any]:
        return [leaf.untyped_storage() for leaf in leaves(value)]

    def kind_of(func: Any, args: Any, made: Any) -> str:
        if made.dtype is torch.float32 and made.numel() >= 256 * 256:
            return "gradients being reduced"
        if made.dim() == 1 and made.dtype is torch.bfloat16:
            return "gathered weights"
        # Of the products, only that of a weight's gradient has a transposed first factor.
        transposed = func is torch.ops.aten.mm.default and args[0].stride(0) == 1
        return "gradient of a weight" if transposed else "streams"

    with Held() as held:
        step()
    return held.most


def check_stages() -> list[str]:
    """What a micro-batch in flight keeps in each of two stages under GPipe, in streams."""
    from scaling import on_ranks

    lines = [
        "| execution | blocks of a stage | first stage | last stage | "
        "largest gradient difference to stored |",
        "|---|---|---|---|---|",
    ]
    rows, failure = on_ranks(2, 300.0, stages, "cpu")
    lines += [
        f"| {execution} | {blocks} | {first:.1f} streams | {last:.1f} streams | {difference:.1e} |"
        for execution, blocks, first, last, difference in rows
    ]
    return [*lines, *([failure] if failure else [])]


def stages() -> Iterator[list[Any]]:
    """Yield a row for each execution and depth; runs on two ranks."""
    import torch
    import torch.distributed as dist
    from _models import branches
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    from revnet import ReversibleSequence, measure_memory

    rank, width, tokens = dist.get_rank(), 16, 64

    class Stage(torch.nn.Module):
        def __init__(self, blocks: int, execution: str) -> None:
            super().__init__()
            pairs = branches(blocks, width, dtype=torch.float64, seed=rank)
            self.sequence = ReversibleSequence(pairs, execution=execution, streams="float")

        def forward(self, x1: torch.Tensor, x2: torch.Tensor | None = None) -> Any:
            y1, y2 = self.sequence.run(x1, x1 if x2 is None else x2)
            return (y1 + y2) / 2 if rank else (y1, y2)

    def schedule(stage: Stage, count: int) -> Callable[[], None]:
        torch.manual_seed(0)
        x = torch.randn(count, tokens, width, dtype=torch.float64)
        stream = x[:1].clone().requires_grad_()
        given, made = ((stream, stream), (stream,)) if rank else ((x[:1],), (stream, stream))
        device = torch.device("cpu")
        pipe = PipelineStage(stage, rank, 2, device, input_args=given, output_args=made)
        # A loss that keeps nothing of its own.
        kind = ScheduleGPipe(pipe, count, loss_fn=lambda y, target: (y * target).sum())
        return partial(kind.step, target=x) if rank else partial(kind.step, x)

    stored: dict[int, list[torch.Tensor]] = {}
    for execution, blocks in (("store", 2), ("store", 8), ("invert", 2), ("invert", 8)):
        peaks = []
        for count in (4, 8):
            stage = Stage(blocks, execution)
            step = schedule(stage, count)
            step()
            found = [p.grad.clone() for p in stage.parameters()]
            peaks.append(measure_memory(step).peak_bytes / (tokens * width * 8))
        expected = stored.setdefault(blocks, found)
        pairs = zip(found, expected, strict=True)
        here = ((peaks[1] - peaks[0]) / 4, max(float((a - b).norm() / b.norm()) for a, b in pairs))
        ranks: list[Any] = [None, None]
        dist.all_gather_object(ranks, here)
        yield [execution, blocks, ranks[0][0], ranks[1][0], max(ranks[0][1], ranks[1][1])]


def checks() -> str:
    """The report of what was counted."""
    import torch

    # Each thread has scratch memory of its own, which would count.
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else "two shared cores of a CPU, one thread"
    return "\n".join(
        [
            "# What do large networks need per GPU? Formulas, and what a meter counts",
            "",
            f"    {shlex.join(['python', *sys.argv])}",
            "",
            f"{datetime.date.today()}; {hardware}; torch {torch.__version__}, Python "
            f"{platform.python_version()}. The first table is computed from the formulas of "
            "`docs/scaling.md`: GiB per GPU. The others are bytes that a meter counted, "
            "allocation by allocation, in streams: one bfloat16 tensor of the width (of stages, "
            'one float64 tensor of a micro-batch). "Checkpointed" is an ordinary residual network '
            'of the same branches, whose layers keep one tensor each; "stored" is '
            '`execution="store"`.',
            "",
            "## Two common shapes",
            "",
            table(),
            "",
            "## Against a meter",
            "",
            *check(),
            "",
            "On a CPU an addition of integers has temporaries, which the kernel of a GPU has not.",
            "",
            "## One rank of FSDP2",
            "",
            "Width 256, 2 × 512 tokens, 24 blocks: the proportions of width 2048 and 2 × 4,096 "
            "tokens. Beside the sum, what the storages alive at the widest moment are.",
            "",
            *check_sharded(),
            "",
            "## Two stages of a pipeline",
            "",
            "Torch's GPipe on two CPU ranks over gloo. What one more micro-batch in flight keeps: "
            "a fourth of the difference of the peaks at 8 and at 4 of them.",
            "",
            *check_stages(),
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, help="write the report to this file")
    options = parser.parse_args()
    text = checks() if options.check else table()
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
