"""What does a converted network cost in time and memory, against the ordinary one checkpointed?

    python benchmarks/conversion_cost.py --out benchmarks/results/conversion_cost_h200.md

Ordinary pre-norm residual layers of attention and a gated MLP in bfloat16, the MLP in tiles of 8192
tokens by nested checkpointing in every arm, but where a row says that it is untiled. Where a row
says compiled, `layer.compile()` was called for each layer of every arm. "checkpointing" is
`torch.utils.checkpoint` around each layer of the ordinary network, without random state;
"converted" is `revnet.convert` of the same layers. Gradients of the converted network are first
compared, bit for bit, with its own stored execution. Times are medians of interleaved rounds in one
process; peaks are allocated bytes above weights and gradients.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnet

WIDTH, HIDDEN, HEADS, TILE = 2048, 5504, 16, 8192


@dataclass(frozen=True)
class Row:
    """A network, its input, and how both are run."""

    layers: int
    batch: int
    tokens: int
    rounds: int
    # Whether stored execution fits the card, too.
    stored: bool = False
    tile: int = TILE
    compiled: bool = False

    def __str__(self) -> str:
        name = f"{self.layers} layers, {self.batch} × {self.tokens}"
        # One tile is the whole MLP.
        untiled = ", untiled" if TILE < self.batch * self.tokens <= self.tile else ""
        return name + untiled + (", compiled" if self.compiled else "")


ROWS = (
    Row(24, 2, 4096, 7, stored=True),
    Row(24, 1, 65_536, 2),
    Row(96, 2, 4096, 3),
    Row(24, 2, 4096, 7, stored=True, compiled=True),
    Row(24, 1, 32_768, 2, tile=32_768),
)


class Layer(nn.Module):
    """Attention and a gated MLP, each with its residual connection."""

    def __init__(self, width: int, hidden: int, heads: int, tile: int) -> None:
        super().__init__()
        self.heads, self.tile = heads, tile
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.tiled(x)

    def tiled(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        if not torch.is_grad_enabled() or len(flat) <= self.tile:
            return self.mlp(flat).view_as(x)
        tiles = [
            checkpoint(self.mlp, tile, use_reentrant=False, preserve_rng_state=False)
            for tile in flat.split(self.tile)
        ]
        return torch.cat(tiles).view_as(x)

    def mlp(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Network(nn.Module):
    """Layers one after the other, checkpointed where asked."""

    def __init__(self, layers: int, tile: int = TILE) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(WIDTH, HIDDEN, HEADS, tile) for _ in range(layers))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)
        return x


def step(net: nn.Module, x: Tensor) -> None:
    net(x).mean().backward()


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    for p in net.parameters():
        p.grad = None
    step(net, x)
    return [p.grad.clone() for p in net.parameters()]


def peak(net: nn.Module, x: Tensor) -> float:
    """Return the peak of one step in MiB, above weights, gradients and the input."""
    step(net, x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(net, x)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def seconds(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def equal_in_every_bit(bits: int, x: Tensor) -> bool:
    """Check inverted against stored execution on a network of four layers."""
    torch.manual_seed(0)
    net = Network(4).to(x.device, x.dtype)
    conversion = revnet.convert(net, bits=bits)
    found = gradients(net, x)
    conversion.execution = "store"
    return all(map(torch.equal, found, gradients(net, x)))


def network(row: Row) -> Network:
    """Return a network that is initialised on the GPU: hundreds of layers take the CPU minutes."""
    with torch.device("cuda"):
        net = Network(row.layers, row.tile).to(torch.bfloat16)
    if row.compiled:
        for layer in net.layers:
            layer.compile()
    return net


def measure(row: Row) -> list[str]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    ordinary = network(row)
    x = torch.randn(row.batch, row.tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    arms: dict[str, Callable[[], nn.Module]] = {}

    def as_checkpointed() -> nn.Module:
        ordinary.checkpointed = True
        return ordinary

    def as_stored() -> nn.Module:
        ordinary.checkpointed = False
        return ordinary

    arms["checkpointing"] = as_checkpointed
    if row.stored:
        arms["stored"] = as_stored
    converted = {}
    for bits in (3, 1):
        net = network(row)
        # The same weights: they exist once.
        for own, other in zip(net.layers, ordinary.layers, strict=True):
            own.load_state_dict(copy.copy(other.state_dict()), assign=True)
        revnet.convert(net, bits=bits)
        converted[bits] = net
        arms[f"converted, {bits} bits"] = lambda net=net: net
    peaks, times = {}, {name: [] for name in arms}
    for name, arm in arms.items():
        peaks[name] = peak(arm(), x)
        for p in arm().parameters():
            p.grad = None
    for _ in range(row.rounds):
        for name, arm in arms.items():
            net = arm()
            times[name].append(seconds(lambda net=net: step(net, x)))
            for p in net.parameters():
                p.grad = None
    base = "checkpointing"
    lines = []
    for name in arms:
        ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
        lines.append(
            f"| {row} | {name} | "
            f"{1000 * statistics.median(times[name]):.4g} | {statistics.median(ratios):.3f} | "
            f"{peaks[name]:.0f} | {peaks[name] / peaks[base]:.3f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=list(range(len(ROWS))))
    options = parser.parse_args()
    x = torch.randn(1, 1024, WIDTH, device="cuda", dtype=torch.bfloat16)
    lines = [
        "# What does a converted network cost, against the ordinary one checkpointed?",
        "",
        "    python benchmarks/conversion_cost.py",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {datetime.date.today()}. bfloat16, width {WIDTH}, hidden "
        f"{HIDDEN}, MLP in tiles of {TILE} tokens by nested checkpointing in every arm. Peak above "
        "weights and gradients. Ratios to checkpointing per layer of the ordinary network.",
        "",
    ]
    equal = {bits: equal_in_every_bit(bits, x) for bits in (3, 1)}
    lines += [f"Gradients of inverted and stored conversion equal in every bit: {equal}.", ""]
    print(lines[-2])
    lines += ["| work | arm | ms | time ÷ | peak, MiB | peak ÷ |", "|---|---|---|---|---|---|"]
    for index in options.rows:
        lines += measure(ROWS[index])
        torch.cuda.empty_cache()
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
