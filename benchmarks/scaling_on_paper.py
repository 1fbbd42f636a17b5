"""What do large networks need per GPU at long sequences, reversible and checkpointed? On paper.

python benchmarks/scaling_on_paper.py            the table of docs/scaling.md, whose formulas these
are python benchmarks/scaling_on_paper.py --check    the formulas against one GPU, or the CPU
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

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


def check() -> str:
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
    return "\n".join([*lines, "", *check_sharded()])


def check_sharded() -> list[str]:
    """What FSDP2's buffers add to it, in streams: one rank, of the proportions of width 2048 and 2
    × 4096 tokens.
    """
    import torch.distributed as dist
    from scaling import CHECKPOINT, FLOAT, Work, activation_peak, backward, build, inputs

    lines = ["| shards | method | measured |", "|---|---|---|"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for shards in ("block", "branch"):
        for method in (FLOAT, CHECKPOINT):
            work = Work(method, 256, 24, 512, 2, "cpu", shards)
            model, x = build(work), inputs(work)
            step = partial(backward, model, x)
            step()
            peak = activation_peak(work.device, step)
            lines.append(f"| {shards} | {method} | {peak / (x.numel() * BF16):.1f} streams |")
    dist.destroy_process_group()
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    print(check() if parser.parse_args().check else table())
