"""How wrong are gradients when activations are rebuilt, against stored execution of the same
network?

    python benchmarks/reconstruction_error.py --out benchmarks/results/reconstruction_error_cpu.md
    python benchmarks/reconstruction_error.py --device cuda --width 256 --tokens 128

By depth, by how much the output weights have grown, and by precision; other libraries run in the
same process where they are installed (pip install --group peers, and pip install --no-deps
dalle-pytorch). The error is the relative distance of all gradients, of parameters and input, from
those of the same library's network executed by plain autograd.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # after the line above, which CUDA reads once
from _models import branches
from _race import difference, opening, publish
from torch import Tensor, nn

import revnet

MODES = {
    "autocast": "float32 weights, bfloat16 autocast",
    "bfloat16": "bfloat16 weights",
    "float32": "float32",
}
Pairs = list[tuple[nn.Module, nn.Module]]
# From branches: the network as plain autograd executes it, and as it is executed without stored
# activations.
Arm = Callable[[Pairs], tuple[nn.Module, nn.Module]]


class Plain(nn.Module):
    """The two-stream loop as anyone would write it."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        x1 = x2 = x
        for f, g in self.blocks:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return (x1 + x2) / 2


class Halves(nn.Module):
    """A network on one tensor of which each stream is a half."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y1, y2 = self.net(torch.cat([x, x], -1)).chunk(2, -1)
        return (y1 + y2) / 2


def with_streams(streams: Any) -> Arm:
    def arm(pairs: Pairs) -> tuple[nn.Module, nn.Module]:
        return tuple(
            revnet.ReversibleSequence(pairs, streams=streams, execution=how)
            for how in ("store", "invert")
        )

    return arm


class Alone(nn.Module):
    """Blocks that are called one by one, so that each holds streams of its own."""

    def __init__(self, pairs: Pairs, streams: str, execution: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(revnet.ReversibleBlock(*pair) for pair in pairs)
        for block in self.blocks:
            block.streams, block.execution = streams, execution

    def forward(self, x: Tensor) -> Tensor:
        x1 = x2 = x
        for block in self.blocks:
            x1, x2 = block(x1, x2)
        return (x1 + x2) / 2


def one_by_one(streams: str) -> Arm:
    def arm(pairs: Pairs) -> tuple[nn.Module, nn.Module]:
        return tuple(Alone(pairs, streams, how) for how in ("store", "invert"))

    return arm


def dalle_pytorch(pairs: Pairs) -> tuple[nn.Module, nn.Module]:
    """Its one file: the package itself imports much that this does not need."""
    package = importlib.util.find_spec("dalle_pytorch")
    if package is None or not package.submodule_search_locations:
        raise ImportError("dalle-pytorch is not installed")
    path = Path(package.submodule_search_locations[0]) / "reversible.py"
    spec = importlib.util.spec_from_file_location("dalle_pytorch_reversible", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Plain(pairs), module.ReversibleSequence(pairs)


def memcnn(pairs: Pairs) -> tuple[nn.Module, nn.Module]:
    library = importlib.import_module("memcnn")
    couplings = [library.AdditiveCoupling(f, g, split_dim=-1) for f, g in pairs]
    return Plain(pairs), Halves(
        nn.Sequential(*(library.InvertibleModuleWrapper(pair) for pair in couplings))
    )


def revlib(pairs: Pairs) -> tuple[nn.Module, nn.Module]:
    library = importlib.import_module("revlib")
    halves = library.ReversibleSequential(
        *(branch for pair in pairs for branch in pair), split_dim=-1
    )
    return Plain(pairs), Halves(halves)


def momentumnet(pairs: Pairs) -> tuple[nn.Module, nn.Module]:
    """Another network: one stream with momentum 0.9, its remainders kept, compared with its own
    stored execution.
    """
    library = importlib.import_module("momentumnet")
    functions = [branch for pair in pairs for branch in pair]
    return tuple(
        library.MomentumNet(functions, gamma=0.9, use_backprop=how) for how in (True, False)
    )


ARMS: dict[str, Arm] = {
    "revnet fixed": with_streams("fixed"),
    "revnet fixed, 16 bits": with_streams(revnet.Fixed(16)),
    "revnet float": with_streams("float"),
    "revnet blocks alone, fixed": one_by_one("fixed"),
    "revnet blocks alone, float": one_by_one("float"),
    "DALLE-pytorch": dalle_pytorch,
    "memcnn": memcnn,
    "revlib": revlib,
    "momentumnet": momentumnet,
}
DISTRIBUTIONS = {
    "DALLE-pytorch": "dalle-pytorch",
    "memcnn": "memcnn",
    "revlib": "revlib",
    "momentumnet": "momentumnet",
}


@contextlib.contextmanager
def precision(mode: str, device: str) -> Iterator[None]:
    """Around the forward pass alone, as torch's documentation of autocast asks."""
    with torch.autocast(device, torch.bfloat16, enabled=mode == "autocast"):
        yield


def gradients(net: nn.Module, pairs: Pairs, x: Tensor, mode: str) -> tuple[Tensor, list[Tensor]]:
    parameters = [
        parameter for pair in pairs for branch in pair for parameter in branch.parameters()
    ]
    x = x.detach().clone().requires_grad_()
    for parameter in parameters:
        parameter.grad = None
    with precision(mode, x.device.type):
        y = net(x)
    generator = torch.Generator().manual_seed(2)
    (y * torch.randn(y.shape, generator=generator).to(y)).sum().backward()
    missing = [tensor for tensor in (x, *parameters) if tensor.grad is None]
    if missing:
        raise RuntimeError(f"{len(missing)} gradients are missing")
    return y.detach(), [tensor.grad.double() for tensor in (x, *parameters)]


def error(arm: Arm, depth: int, growth: float, mode: str, given: argparse.Namespace) -> float:
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(mode, torch.float32)
    pairs = branches(depth, given.width, device=given.device, dtype=dtype)
    with torch.no_grad():
        for branch in (branch for pair in pairs for branch in pair):
            branch.leave.weight.mul_(growth)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(given.batch, given.tokens, given.width, generator=generator).to(
        given.device, dtype
    )
    # Each gets its own branches: a library may wrap or change what it is given.
    stored_pairs, rebuilt_pairs = pairs, copy.deepcopy(pairs)
    y, expected = gradients(arm(stored_pairs)[0], stored_pairs, x, mode)
    if mode == "float64":
        # momentumnet holds its momentum with fewer bits than float64 has.
        assert torch.allclose(arm(copy.deepcopy(pairs))[1](x.clone()), y, rtol=1e-4, atol=1e-4), (
            "another network"
        )
    return difference(gradients(arm(rebuilt_pairs)[1], rebuilt_pairs, x, mode)[1], expected)


def usable(given: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """The arms that are right in float64 on three blocks, with their error there, and why others
    are left out.
    """
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in given.arms:
        arm = ARMS[name]
        try:
            errors[name] = error(arm, 3, 1.0, "float64", given)
        except Exception as failure:
            reasons[name] = f"{type(failure).__name__}: {failure}"
            continue
        if errors[name] > 1e-4:
            reasons[name] = (
                f"gradients of three blocks in float64 are off by {errors.pop(name):.1e}"
            )
    return errors, reasons


def measure(
    given: argparse.Namespace, arms: list[str]
) -> dict[tuple[str, float, int], dict[str, Any]]:
    results: dict[tuple[str, float, int], dict[str, Any]] = {}
    for mode in given.modes:
        for growth in given.growths:
            for depth in given.depths:
                row: dict[str, Any] = {}
                for name in arms:
                    try:
                        row[name] = error(ARMS[name], depth, growth, mode, given)
                    except Exception as failure:
                        row[name] = failure
                results[mode, growth, depth] = row
                print(
                    mode,
                    f"x{growth:g}",
                    depth,
                    *(f"{name}: {shown(row[name])};" for name in arms),
                    flush=True,
                )
    return results


def shown(value: Any) -> str:
    if isinstance(value, Exception):
        return type(value).__name__
    if value == 0 or not math.isfinite(value):
        return "**0**" if value == 0 else str(value)
    return f"{value:.1%}" if value >= 1e-3 else f"{value:.0e}"


def tables(
    given: argparse.Namespace, arms: list[str], results: dict[Any, dict[str, Any]]
) -> list[str]:
    lines = []
    for mode in given.modes:
        lines += [f"## {MODES[mode]}", "", f"| blocks | output weights | {' | '.join(arms)} |"]
        lines += ["|---:|---:|" + "---:|" * len(arms)]
        for growth in given.growths:
            for depth in given.depths:
                cells = " | ".join(shown(results[mode, growth, depth][name]) for name in arms)
                lines.append(f"| {depth} | ×{growth:g} | {cells} |")
        failures = {
            f"{name}: {type(failure).__name__}: "
            f"{str(failure).splitlines()[0] if str(failure) else ''}"
            for (of, _, _), row in results.items()
            for name, failure in row.items()
            if of == mode and isinstance(failure, Exception)
        }
        lines += [
            "",
            *(f"- {failure}" for failure in sorted(failures)),
            *([""] if failures else []),
        ]
    return lines


def document(
    given: argparse.Namespace,
    errors: dict[str, float],
    reasons: dict[str, str],
    results: dict[Any, dict[str, Any]],
) -> list[str]:
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for arm, name in DISTRIBUTIONS.items()
        if arm in errors
    ]
    lines = [
        *opening(
            "How wrong are gradients when activations are rebuilt?",
            given.hardware,
            f"; {', '.join(versions) or 'no other library installed'}.",
        ),
        f"Pre-norm attention and MLP branches without dropout, width {given.width}, {given.tokens} "
        f"tokens, batch {given.batch}, deterministic algorithms. The error is the relative "
        f"distance of all gradients, of parameters and input, from those of the same network in "
        f"the same precision executed by plain autograd; **0** means equal "
        'in every bit. "×4": the output weights of each branch are four times their initial '
        "values. Backward runs "
        "outside the autocast region, as torch's documentation asks: under autocast the other "
        "libraries rebuild activations in float32, which adds to their error. momentumnet is "
        "another network (one stream, momentum 0.9, each branch a step) and is compared with its "
        'own stored execution. "Blocks alone" are called one by one, outside of a sequence.',
        "",
        "In float64, three blocks: "
        + ", ".join(f"{name} {shown(value)}" for name, value in errors.items())
        + ".",
        "",
    ]
    lines += [f"- {name} is left out. {reason}" for name, reason in reasons.items()]
    lines += [""] if reasons else []
    if given.out is not None and len(given.modes) > 1:
        lines += [
            f"![Gradient error by depth and by weight "
            f"growth]({given.out.with_suffix('.png').name})",
            "",
        ]
    return lines + tables(given, list(errors), results)


def plot(
    given: argparse.Namespace, arms: list[str], results: dict[Any, dict[str, Any]], path: Path
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    zero, growth, depth = 1e-9, given.growths[len(given.growths) // 2], given.depths[-1]
    figure, grid = plt.subplots(
        2, len(given.modes), figsize=(4.2 * len(given.modes), 7), sharey=True, squeeze=False
    )
    # Larger below smaller: many of the lines are one.
    sizes = dict(zip(ARMS, (10, 6, 13, 4, 5, 10, 7.5, 5, 7), strict=True))
    marks = ("o-", "s--", "^-", "*:", "p:", "v-", "D:", "x--", "+-")
    looks = dict(zip(ARMS, marks, strict=True))
    order = ("C2", "C8", "C0", "C6", "C9", "C3", "C1", "C4", "C7")
    colours = dict(zip(ARMS, order, strict=True))
    for column, mode in enumerate(given.modes):
        rows = (
            (
                given.depths,
                [(mode, growth, depth) for depth in given.depths],
                f"blocks, output weights ×{growth:g}",
            ),
            (
                given.growths,
                [(mode, growth, depth) for growth in given.growths],
                f"growth of weights, {depth} blocks",
            ),
        )
        for axes, (places, keys, label) in zip(grid[:, column], rows, strict=True):
            for name in arms:
                values = [results[key][name] for key in keys]
                heights = [math.nan if isinstance(v, Exception) else max(v, zero) for v in values]
                look = {
                    "color": colours[name],
                    "markersize": sizes[name],
                    "fillstyle": "none",
                    "clip_on": False,
                }
                axes.plot(places, heights, looks[name], label=name, **look)
            axes.set(xscale="log", yscale="log", xlabel=label, ylim=(zero, 10))
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        grid[0, column].set_title(MODES[mode])
    ticks = [10.0**power for power in range(-8, 1, 2)]
    for axes in grid[:, 0]:
        axes.set_yticks([zero, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
        axes.set_ylabel("relative error of the gradients")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48, 96], help="blocks")
    parser.add_argument(
        "--growths", type=float, nargs="+", default=[1, 4, 16], help="factors of the output weights"
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--hardware", help="as the report names it")
    parser.add_argument(
        "--out", type=Path, help="a Markdown file; the plot of several modes is beside it"
    )
    given = parser.parse_args()
    if given.hardware is None:
        cuda, threads = given.device == "cuda", torch.get_num_threads()
        given.hardware = torch.cuda.get_device_name() if cuda else f"CPU, {threads} threads"
    torch.use_deterministic_algorithms(True)
    # Other libraries call what torch has deprecated since.
    warnings.simplefilter("ignore")
    errors, reasons = usable(given)
    results = measure(given, list(errors))
    report = document(given, errors, reasons, results)
    publish(report, given.out)
    if given.out is not None and len(given.modes) > 1:
        plot(given, list(errors), results, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
