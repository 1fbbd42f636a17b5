"""What does a reversible network cost against what users of an ordinary one have?

    python benchmarks/rivals.py --out benchmarks/results            # on CUDA
    python benchmarks/rivals.py --shapes 2048x24x4096 2048x24x16384:main --minutes 3
    python benchmarks/rivals.py --device cpu --shapes 64x24x256 64x24x1024 --rounds 5

The ordinary residual network x + f(x), x + g(x) is run in every way that its users have; a network
on two streams of the very same branches, so of equal parameters, and the ordinary network converted
are run by revnet. Every way is first compared, at a short length, with the stored execution of its
own network in the same precision, and with that in float64. Then its peak above weights and
gradients, the bytes that the forward pass keeps, and its pinned host memory are measured, and all
ways run in turn, once a round. Ways whose step takes longer than `--long` seconds are timed once.
What does not fit, is not installed or not reached in `--minutes` keeps its row. A shape is width x
blocks x tokens; ":main" after it leaves out most rivals and all plans, ":few" all but six ways.
Per width and number of blocks one report is written, anew after each way and each round, and one
picture.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _models import branches
from _race import difference, opening, timed
from pareto import ATTENTION, apart, compiling, plans_for
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import revnet

MIB = 2**20
ORDINARY, TWO_STREAM, CONVERTED = "ordinary", "two streams", "converted, bits={}"
BY_LAYER, CYCLE = "two streams of whole layers", "three streams of whole layers"
STORED, CHECKPOINTED = "stored", "checkpoint per block"
OFFLOADED, COMPILED = "checkpoint per block, offloaded", "compiled blocks"
FEW = (STORED, CHECKPOINTED, "revnet, float streams", "revnet, fixed streams",
       "revnet, converted, bits=3", "revnet, fixed streams, three, whole layers")  # fmt: skip
LATE = "not reached in the time given"
Pairs = list[tuple[nn.Module, nn.Module]]
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Width, blocks and tokens of a network, and which ways run it."""

    width: int
    blocks: int
    tokens: int
    chosen: str = "all"

    @classmethod
    def parse(cls, text: str) -> Shape:
        size, _, chosen = text.partition(":")
        if chosen not in ("", "main", "few"):
            raise ValueError(f"{text}: ':main' or ':few' may follow a shape")
        return cls(*map(int, size.split("x")), chosen or "all")

    def takes(self, way: Way) -> bool:
        if self.chosen == "few":
            return way.name in FEW
        ours = way.network != ORDINARY
        return self.chosen == "all" or ours or way.name in (STORED, CHECKPOINTED, OFFLOADED)


@dataclass
class Way:
    """One way to run one of the networks, and what was found about it."""

    name: str
    network: str
    run: Run | None
    stored: Run | None = None  # the same network, its activations stored
    failure: str = ""
    own_error: float = 0.0
    error: float | None = None
    peak: int = 0
    kept: int = 0
    host: int | None = None
    times: list[float] = field(default_factory=list)

    @property
    def time(self) -> float:
        return statistics.median(self.times)

    def against(self, other: Way) -> str:
        """The median of the ratios of times within a round."""
        if not self.times or not other.times:
            return "–"
        pairs = list(zip(self.times, other.times, strict=False))
        return f"{statistics.median(a / b for a, b in pairs):.3f}"


NETWORKS, LENGTHS = [(2048, 24), (2048, 96), (1024, 24), (1024, 96)], (4096, 16384, 65536)
SHAPES = [Shape(*network, tokens) for network in NETWORKS for tokens in LENGTHS]


# --- the ordinary network


class Layer(nn.Module):
    """Attention and MLP of an ordinary residual network."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        return residual(self.f, self.g, x)


class Ordinary(nn.Module):
    """The ordinary network as a module, which `revnet.convert` takes."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(f, g) for f, g in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def residual(f: nn.Module, g: nn.Module, x: Tensor) -> Tensor:
    x = x + f(x)
    return x + g(x)


def ordinary(pairs: Pairs, apply: Callable[..., Tensor] = residual) -> Run:
    def run(x: Tensor) -> Tensor:
        for f, g in pairs:
            x = apply(f, g, x)
        return x

    return run


def per_block(f: nn.Module, g: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return checkpoint(residual, f, g, x, use_reentrant=False, **options)


def every_second_block(pairs: Pairs) -> Run:
    def run(x: Tensor) -> Tensor:
        for index, (f, g) in enumerate(pairs):
            x = (per_block if index % 2 else residual)(f, g, x)
        return x

    return run


def selective(f: nn.Module, g: nn.Module, x: Tensor, products: bool) -> Tensor:
    """torchtitan's policy per operation: attention, and every second matrix product, are kept."""
    seen = {True: 0, False: 0}  # in forward, and when computed again

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = any(name in str(op) for name in ATTENTION)
        if products and op is torch.ops.aten.mm.default:
            seen[ctx.is_recompute] += 1
            keep = seen[ctx.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return per_block(f, g, x, context_fn=partial(create_selective_checkpoint_contexts, policy))


def within(context: Callable[[], Any], run: Run) -> Run:
    def inside(x: Tensor) -> Tensor:
        with context():
            return run(x)

    return inside


def compiled(pairs: Pairs, setting: float) -> Run:
    """Each block compiled with an `activation_memory_budget`; all share what is compiled."""
    return ordinary(pairs, torch.compile(apart(residual, setting), fullgraph=True))


# --- all ways


def rivals(pairs: Pairs, device: str, budgets: list[float]) -> list[Way]:
    stored = ordinary(pairs)
    on_host = partial(torch.autograd.graph.save_on_cpu, pin_memory=device == "cuda")
    ways: dict[str, Run | str] = {
        STORED: stored,
        CHECKPOINTED: ordinary(pairs, per_block),
        "checkpoint per block, no early stop": within(
            lambda: set_checkpoint_early_stop(False), ordinary(pairs, per_block)
        ),
        "checkpoint of every 2nd block": every_second_block(pairs),
        "selective: attention": ordinary(pairs, partial(selective, products=False)),
        "selective: attention, every 2nd product": ordinary(
            pairs, partial(selective, products=True)
        ),
        "save_on_cpu": within(on_host, stored),
        # What `gradient_checkpointing_kwargs={"offload": True}` of transformers does.
        OFFLOADED: within(on_host, ordinary(pairs, per_block)),
        "TRL OffloadActivations": offloaded_by_trl(pairs),
        "torch_remat per block": by_remat(pairs),
    }
    for setting in budgets:
        name = f"{COMPILED}, activation_memory_budget {setting}"
        ways[name] = within(partial(compiling, setting), compiled(pairs, setting))
    if not budgets:
        ways[f"{COMPILED}, activation_memory_budget"] = "not asked for (--budgets)"
    return [
        Way(name, ORDINARY, None, failure=run)
        if isinstance(run, str)
        else Way(name, ORDINARY, run, stored)
        for name, run in ways.items()
    ]


def offloaded_by_trl(pairs: Pairs) -> Run | str:
    if importlib.util.find_spec("trl") is None:
        return "not installed"
    if not torch.accelerator.is_available():
        return "needs an accelerator"
    from accelerate import PartialState
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    PartialState()  # without which its warnings raise
    # It has to know the parameters, or their transposed views would be copied, too.
    manager = get_act_offloading_ctx_manager(Ordinary(pairs), warn_if_no_head=False)
    return within(lambda: manager, ordinary(pairs))


def by_remat(pairs: Pairs) -> Run | str:
    if importlib.util.find_spec("torch_remat") is None:
        return "not installed"
    import torch_remat

    again = torch_remat.checkpoint(region_name="block")(residual)
    return ordinary(pairs, again)


class Added(Layer):
    """What a whole layer adds to its input: the branch of a network by layer."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.f(x)
        return mixed + self.g(x + mixed)


def by_layer(pairs: Pairs) -> Pairs:
    """Return blocks whose branches are whole layers; an odd last layer stays two branches."""
    layers = [Added(*pair) for pair in pairs]
    return [*zip(layers[::2], layers[1::2], strict=False), *pairs[len(pairs) // 2 * 2 :]]


def network_of(name: str, pairs: Pairs, **options: Any) -> nn.Module:
    """Return a reversible network of these attentions and MLPs."""
    if name == CYCLE:
        return revnet.ReversibleCycle([Added(*pair) for pair in pairs], **options)
    return revnet.ReversibleSequence(pairs if name == TWO_STREAM else by_layer(pairs), **options)


def reversible(pairs: Pairs) -> list[Way]:
    found = []
    parts = {TWO_STREAM: "", BY_LAYER: ", whole layers", CYCLE: ", three, whole layers"}
    for network, whole in parts.items():
        for streams in ("float", "fixed"):
            run, stored = (
                network_of(network, pairs, execution=execution, streams=streams)
                for execution in ("invert", "store")
            )
            found.append(Way(f"revnet, {streams} streams{whole}", network, run, stored))
    return found


def converted(pairs: Pairs, x: Tensor, bits: int) -> Way:
    def network(execution: str) -> Ordinary:
        net = Ordinary(pairs)
        revnet.convert(net, bits=bits, execution=execution, calibrate=x.detach())
        return net

    name = CONVERTED.format(bits)
    return Way(f"revnet, {name}", name, network("invert"), network("store"))


def plans(pairs: Pairs, x: Tensor, ways: list[Way]) -> list[Way]:
    """Return the fastest mixtures of executions at the peak of each rival that ran."""
    met: list[Way] = []
    for way in ways:
        if way.network == ORDINARY and way.peak and way.peak not in [each.peak for each in met]:
            met.append(way)
    net = revnet.ReversibleSequence(pairs)
    fixed = x.dtype is not torch.float32
    stored = revnet.ReversibleSequence(
        pairs, execution="store", streams="fixed" if fixed else "float"
    )
    found = []
    for way, plan in zip(met, plans_for(net, x, [way.peak for way in met]), strict=True):
        name = f"revnet, plan at the peak of: {way.name}"
        if plan is None:
            found.append(Way(name, TWO_STREAM, None, failure="no plan so small"))
            continue
        planned = revnet.ReversibleSequence(pairs, execution=plan)
        found.append(Way(name, TWO_STREAM, planned, stored))
    return found


# --- measurements


def gradients(run: Run, pairs: Pairs, x: Tensor) -> list[Tensor]:
    """Return the gradients of the input and of the parameters of these pairs."""
    leaf = x.detach().requires_grad_()
    parameters = [p for pair in pairs for branch in pair for p in branch.parameters()]
    y = run(leaf)
    return list(torch.autograd.grad(y, [leaf, *parameters], torch.full_like(y, 1e-2)))


def in_float64(way: Way, pairs: Pairs, x: Tensor) -> list[Tensor]:
    """Gradients of the network of a way, its activations stored, in float64.

    Of the input and of the first block, which the errors of all others reach: those of all
    parameters in float64 would not fit beside them.
    """
    double = copy.deepcopy(pairs)
    for pair in double:
        for branch in pair:
            branch.double()
    if way.network == ORDINARY:
        run: Run = ordinary(double)
    elif way.network in (TWO_STREAM, BY_LAYER, CYCLE):
        run = network_of(way.network, double, execution="store", streams="float")
    else:
        run = Ordinary(double)
        bits = int(way.network.partition("=")[2])
        revnet.convert(run, bits=bits, execution="store", calibrate=x.double())
    return gradients(run, double[:1], x.double())


def compare(ways: list[Way], pairs: Pairs, short: Tensor, x: Tensor, end: float) -> None:
    """Compare the gradients of all ways; a way that is wrong ends the benchmark.

    Compiled ways are compared at the whole length, as a short one would have to be compiled for;
    float64 does not fit there.
    """
    exact: dict[str, list[Tensor]] = {}
    allowed = 1e-3 if x.dtype is torch.float32 else 0.5
    for way in reached(ways, end):
        with failures(way):
            given = x if way.name.startswith(COMPILED) else short
            found = gradients(way.run, pairs, given)
            way.own_error = difference(found, gradients(way.stored, pairs, given))
            if given is short:
                if way.network not in exact:
                    exact[way.network] = in_float64(way, pairs, short)
                way.error = difference(found[: len(exact[way.network])], exact[way.network])
        if not way.failure and not way.own_error <= allowed:
            raise SystemExit(f"{way.name}: gradients are off by {way.own_error:.1e}")


def reached(ways: list[Way], end: float) -> Iterator[Way]:
    """Go through the ways that run; after the time `end` each is noted as late instead."""
    for way in ways:
        if not way.failure and time.monotonic() > end:
            way.failure = LATE
        if not way.failure:
            yield way


@contextlib.contextmanager
def failures(way: Way) -> Iterator[None]:
    """Note what keeps a way from running, and go on."""
    try:
        yield
    except torch.OutOfMemoryError:
        way.failure = "out of memory"
    except Exception as error:  # of any kind, in the code of others
        said = next(iter(str(error).splitlines()), "")
        way.failure = f"fails: {type(error).__name__}: {said[:80]}"
    if way.failure:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def step(run: Run, x: Tensor) -> None:
    y = run(x)
    y.backward(torch.full_like(y, 1e-2))


def measure(way: Way, x: Tensor, long: float) -> None:
    """Fill in bytes, of a device or of the CPU; gradients exist already."""
    if x.device.type != "cuda":
        step(way.run, x)
        way.kept = revnet.measure_memory(way.run, x).saved_bytes
        way.peak = revnet.measure_memory(lambda: step(way.run, x)).peak_bytes
        return
    # The first step compiles, has kernels and workspaces made, and host memory pinned. It counts
    # where it is too long for that to matter.
    seconds = timed(lambda: measured_step(way, x), "cuda")
    if seconds <= long or way.host:
        seconds = timed(lambda: measured_step(way, x), "cuda")
    way.times.append(seconds)


def measured_step(way: Way, x: Tensor) -> None:
    """Take a step and note what it holds; the allocator counts without waiting for the device."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_peak_host_memory_stats()
    pinned = torch.cuda.host_memory_stats().get("active_bytes.current", 0)
    y = way.run(x)
    way.kept = torch.cuda.memory_allocated() - before - y.nbytes
    y.backward(torch.full_like(y, 1e-2))
    way.peak = torch.cuda.max_memory_allocated() - before
    way.host = torch.cuda.host_memory_stats().get("active_bytes.peak", 0) - pinned


def run_in_turn(
    ways: list[Way], x: Tensor, rounds: int, long: float, end: float = math.inf
) -> Iterator[int]:
    """Run all ways once, again and again; a step longer than `long` seconds is not repeated."""
    for number in range(rounds):
        for way in ways:
            if way.failure or time.monotonic() > end or (way.times and way.times[0] > long):
                continue
            with failures(way):
                way.times.append(timed(lambda way=way: step(way.run, x), x.device.type))
        yield number


def all_ways(options: argparse.Namespace, shape: Shape, end: float) -> Iterator[list[Way]]:
    """Yield all ways of a shape, anew after each that was measured and after each round."""
    torch._dynamo.reset()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    pairs = branches(shape.blocks, shape.width, device=options.device, dtype=dtype)
    x = torch.randn(1, shape.tokens, shape.width, device=options.device, dtype=dtype)
    short = x[:, : options.check_tokens].contiguous()
    x.requires_grad_()
    ways = rivals(pairs, options.device, options.budgets) + reversible(pairs)
    ways += [converted(pairs, short, bits) for bits in options.bits]
    ways = [way for way in ways if shape.takes(way)]
    compare(ways, pairs, short, x, end)
    yield ways
    for p in (x, *(p for pair in pairs for branch in pair for p in branch.parameters())):
        p.grad = torch.zeros_like(p)

    def measured(some: list[Way]) -> Iterator[list[Way]]:
        for way in reached(some, end):
            with failures(way):
                measure(way, x, options.long)
            yield ways

    yield from measured(ways)
    if options.plans and shape.chosen == "all" and time.monotonic() < end:
        extra = plans(pairs, x, ways)
        compare(extra, pairs, short, x, end)
        ways += extra
        yield from measured(extra)
    for _ in run_in_turn(ways, x, options.rounds, options.long, end):
        yield ways
    for way in ways:
        way.run = way.stored = None  # they hold the network, and the next one needs its memory


# --- the report


def digits(number: float) -> str:
    """Write a number with four digits or more, and without an exponent."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def table(ways: list[Way]) -> list[str]:
    stored, checkpointed = ways[0], ways[1]
    lines = [
        "| way | network | ms | × stored | × checkpoint | peak, MiB | ÷ checkpoint | kept, MiB | "
        "host, MiB | against own stored | against float64 | steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way in ways:
        if way.failure or not way.peak:
            lines.append(f"| {way.name} | {way.network} | {way.failure} |" + " |" * 9)
            continue
        ms = digits(1e3 * way.time) if way.times else "–"
        smaller = f"{way.peak / checkpointed.peak:.3f}" if checkpointed.peak else "–"
        own = "equal in every bit" if way.own_error == 0 else f"{way.own_error:.1e}"
        host = "–" if way.host is None else f"{way.host / MIB:,.0f}"
        error = "–" if way.error is None else f"{way.error:.1e}"
        lines.append(
            f"| {way.name} | {way.network} | {ms} | {way.against(stored)} | "
            f"{way.against(checkpointed)} | {digits(way.peak / MIB)} | {smaller} | "
            f"{digits(way.kept / MIB)} | {host} | {own} | {error} | {len(way.times)} |"
        )
    return lines


def draw(found: dict[int, list[Way]], path: Path) -> None:
    """Time against peak, all ways, one plot for each length."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    size = (4.6 * len(found) + 1, 4.4)
    figure, plots = plt.subplots(1, len(found), figsize=size, squeeze=False, layout="constrained")
    names = list({way.name: None for ways in found.values() for way in ways if way.times})
    for plot, (tokens, ways) in zip(plots[0], found.items(), strict=True):
        ran = [way for way in ways if way.times]
        for way in ran:
            ours = way.network != ORDINARY
            if "plan" in way.name:
                style = {"marker": ".", "color": "tab:blue", "alpha": 0.6}
                label = "revnet, plans"
            else:
                color = plt.get_cmap("tab20")(names.index(way.name))
                style = {"marker": "s" if ours else "o", "color": color}
                label = way.name
            plot.loglog(way.peak / MIB, 1e3 * way.time, linestyle="", label=label, **style)
        plot.set(title=f"{tokens:,} tokens", xlabel="peak above weights, MiB", ylabel="ms a step")
        # Numbers beside each other take more room than those below each other.
        for axis, steps in ((plot.xaxis, (1, 2, 5)), (plot.yaxis, (1, 1.5, 2, 3, 5, 7))):
            axis.set_major_locator(LogLocator(subs=steps))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    handles = {
        label: handle
        for plot in plots[0]
        for handle, label in zip(*plot.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(
    options: argparse.Namespace, width: int, blocks: int, found: dict[int, list[Way]]
) -> str:
    device = options.device
    precision = "bfloat16" if device == "cuda" else "float32"
    lines = [
        *opening(
            "What does a reversible network cost against what users of an ordinary one have?",
            options.hardware,
            f". Width {width}, {blocks} blocks of attention and MLP, batch 1, {precision}; forward "
            "and backward.",
        ),
        '"stored" is the ordinary residual network with its activations stored. Networks on two '
        "streams have the very same parameters, and are another architecture: f is an attention "
        "and g an MLP, or, of whole layers, each of them one after the other. On "
        "three, whole layers update one after the other, and each reads the sum of the two others. "
        '"own stored" is the stored execution of the same network in the same precision, "float64" '
        f"the same in float64, both at {options.check_tokens} tokens (own stored of compiled "
        "blocks at all). The peak is above weights, gradients and input; host memory is pinned, in "
        "blocks of powers of two; ratios of times are medians within rounds. Rows of one step were "
        "timed once.",
    ]
    if device == "cpu":
        lines += ["", "On a CPU the host's memory is the same memory, so offloading saves nothing."]
    for tokens, ways in found.items():
        lines += ["", f"## {tokens:,} tokens", "", *table(ways)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    form = "WIDTHxBLOCKSxTOKENS[:main|:few]"
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=SHAPES, metavar=form)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--long", type=float, default=20.0, help="seconds; longer steps run once")
    parser.add_argument("--check-tokens", type=int, default=256, help="for comparing gradients")
    parser.add_argument("--bits", type=int, nargs="*", default=[3, 1], help="of converted networks")
    parser.add_argument("--budgets", type=float, nargs="*", default=[1.0, 0.5, 0.1] if cuda else [])
    parser.add_argument("--plans", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which it ends")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    here = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    parser.add_argument("--hardware", default=here, help="as reports name it")
    parser.add_argument("--out", type=Path, help="the folder of reports and pictures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    short = f"cpu-{os.cpu_count()}core"
    if options.device == "cuda":
        short = torch.cuda.get_device_name().split()[1].lower()
    end = time.monotonic() + 60 * options.minutes
    by_network: dict[tuple[int, int], dict[int, list[Way]]] = {}
    for shape in options.shapes:
        found = by_network.setdefault((shape.width, shape.blocks), {})
        name = f"rivals_{shape.width}x{shape.blocks}_{short}_{datetime.date.today()}"
        for ways in all_ways(options, shape, end):
            found[shape.tokens] = ways
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                text = report(options, shape.width, shape.blocks, found)
                picture = f"\n![time against peak]({name}.png)\n"
                (options.out / f"{name}.md").write_text(text + picture)
        print(f"{name}, {shape.tokens} tokens", *table(found[shape.tokens]), sep="\n", flush=True)
        timed_lengths = {t: ways for t, ways in found.items() if any(way.times for way in ways)}
        if options.out and timed_lengths:
            draw(timed_lengths, options.out / f"{name}.png")
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
