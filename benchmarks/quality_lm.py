"""Does a reversible network learn as well as an ordinary one of equal parameters?

    python benchmarks/quality_lm.py --size 25M --seeds 3 --out runs/lm       # CUDA
    python benchmarks/quality_lm.py --size 100M --seeds 2 --forms ordinary layer-copy momentum-1/8
    python benchmarks/quality_lm.py --size tiny --steps 300 --seeds 4 --threads 1 --minutes 10

Language models of bytes learn the Python sources of installed packages, without duplicates; one
file in twenty is held out. All forms have the same layers with the same initial weights, and see
the same batches: runs of one seed are pairs. The learning rates of `--rates` are tried with the
first seed, and each form goes on with its best one. Activations are stored everywhere, since only
the form is compared; `--execution invert` trains as users would, with the same gradients.

Forms: `ordinary`; two streams `branch-…`, where f is an attention and g an MLP, and `layer-…`,
where f and g are two whole layers, each of them `copy` (both streams start as a copy, and their
mean is read), `sum` (their sum is read) or `chunk` (halves of an embedding twice as wide);
`cycle-3` and `cycle-3-branch`, where each layer (or branch) updates the next of three streams and
reads the sum of the others, so that it misses every third of those before it instead of every
second; `momentum-1/8` (a layer kicks the velocity) and `momentum-1/8-branch` (attention and MLP
kick it).

Each run is a folder in --out with its curve and a checkpoint of tensors. A benchmark that was ended
by `--minutes` or by hand goes on where it stopped; `report.md` and `curves.png` are written anew
after each run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import statistics
import sysconfig
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from _race import opening
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnet
from revnet.app.model import Attention, FeedForward, Shape, rotary_table

FORMS = (
    "ordinary", "branch-copy", "layer-copy", "cycle-3", "cycle-3-branch", "momentum-1/8",
    "momentum-1/16", "momentum-1/4", "momentum-1/2", "layer-sum", "branch-sum", "layer-chunk",
    "branch-chunk",
)  # fmt: skip
NARROWEST = 64  # below it a stream is too narrow for its heads to say anything about the form
SECONDS_BETWEEN_SAVES = 60
# Of the 95 % interval of a mean, by its number of pairs.
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
# What a form may lose against the ordinary network, in percent: with and without kept bits.
BARS = {True: 0.2, False: 0.6}


@dataclass(frozen=True)
class Size:
    """Layers of attention and MLP, and how they are trained by default."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    rates: tuple[float, ...]


SIZES = {
    "tiny": Size(4, 64, 2, 128, 16, 300, (4e-3,)),
    "6M": Size(8, 256, 4, 512, 64, 1500, (1e-3, 2e-3, 4e-3)),
    "25M": Size(8, 512, 8, 512, 64, 1500, (1e-3, 2e-3, 4e-3)),
    "100M": Size(14, 768, 12, 1024, 32, 4000, (1e-3,)),
}


# --- the network


class Layer(nn.Module):
    """What a whole layer of attention and MLP adds to its input."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        mixed = self.attention(x, **keywords)
        return mixed + self.mlp(x + mixed)


class Residual(nn.Module):
    """The ordinary network, each layer checkpointed or none."""

    def __init__(self, layers: list[Layer], checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        for layer in self.layers:
            if self.checkpointed:
                x = x + checkpoint(layer, x, use_reentrant=False, **keywords)
            else:
                x = x + layer(x, **keywords)
        return x


def momentum(form: str) -> dict[str, Any]:
    """Return the options of a sequence that is a momentum network, named by its factor."""
    mu = Fraction(form.split("-")[1])
    # Merged where the state would come to rest: the stream of the ordinary network.
    return {
        "coupling": revnet.Momentum(mu),
        "merge": lambda v, x: x + float(mu / (1 - mu)) * v,
    }


def body(form: str, pairs: list[tuple[nn.Module, nn.Module]], execution: str) -> nn.Module:
    """Build one form of the network from its attentions and MLPs."""
    layers = [Layer(*pair) for pair in pairs]
    if form == "ordinary":
        return Residual(layers, execution == "checkpoint")
    by_branch = "branch" in form
    if form.startswith("cycle"):
        parts = [branch for pair in pairs for branch in pair] if by_branch else layers
        turned = [not isinstance(part, FeedForward) for part in parts]
        return revnet.ReversibleCycle(
            parts, int(form.split("-")[1]), args_route={"rotary_pos_emb": turned},
            execution=cast(Any, execution),
        )  # fmt: skip
    if not by_branch and len(layers) % 2:
        raise SystemExit(f"{form}: a block is two layers, and {len(layers)} is an odd number")
    blocks: list[Any] = pairs if by_branch else list(zip(layers[::2], layers[1::2], strict=True))
    options: dict[str, Any] = {
        "args_route": {"rotary_pos_emb": (True, not by_branch)},
        "execution": execution,
    }
    if form.startswith("momentum"):
        options |= momentum(form)
    else:
        start = form.split("-")[1]
        options["split"], options["merge"] = {
            "copy": ("copy", "mean"),
            "sum": ("copy", "sum"),
            "chunk": ("chunk", "concat"),
        }[start]
    return revnet.ReversibleSequence(blocks, **options)


class Model(nn.Module):
    """A language model of bytes in one of the forms."""

    rotary: Tensor

    def __init__(self, form: str, size: Size, seed: int, execution: str = "store") -> None:
        super().__init__()
        chunk = form.endswith("chunk")
        if chunk and size.width < NARROWEST:
            raise SystemExit(f"{form}: streams of width {size.width}; {NARROWEST} is the least")
        torch.manual_seed(seed)
        shape = Shape(size.layers, size.width, size.heads, 2, 1, 256, size.context, 1)
        pairs = [(Attention(shape), FeedForward(shape)) for _ in range(size.layers)]
        for attention, mlp in pairs:
            for linear in (attention.qkv, mlp.hidden):
                nn.init.normal_(linear.weight, std=0.5 / size.width**0.5)
            for linear in (attention.out, mlp.out):
                # All of them add to the same streams.
                std = 0.5 / (linear.in_features * 2 * size.layers) ** 0.5
                nn.init.normal_(linear.weight, std=std)
        width = size.width * (2 if chunk else 1)
        self.embedding = nn.Embedding(256, width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.head.weight, std=0.5 / size.width**0.5)
        self.norm = nn.LayerNorm(width)
        self.body = body(form, pairs, execution)
        self.register_buffer("rotary", rotary_table(shape)[:, : size.context], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.embedding(tokens), rotary_pos_emb=self.rotary[:, : tokens.shape[1]])
        return self.head(self.norm(x))


def kept_bits(form: str) -> float | None:
    """Return the bits per element and layer that a form keeps; None for the ordinary network."""
    if form == "ordinary":
        return None
    if not form.startswith("momentum"):
        return 0
    return math.log2(1 / Fraction(form.split("-")[1])) * (2 if form.endswith("branch") else 1)


# --- the text


@dataclass
class Text:
    """Bytes to learn and bytes held out, as uint8."""

    train: Tensor
    held_out: Tensor

    @cached_property
    def digest(self) -> str:
        both = self.train.cpu().numpy().tobytes() + self.held_out.cpu().numpy().tobytes()
        return hashlib.sha256(both).hexdigest()[:12]


def python_sources(most: int) -> Text:
    """Return at most so many bytes of the Python files of this installation."""
    roots = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    known: dict[str, Path] = {}
    for root in sorted(roots):
        for path in sorted(Path(root).rglob("*.py")):
            with contextlib.suppress(OSError):
                known.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    size = 0
    # By the hash of their content: in an order that has nothing to do with packages.
    for digest in sorted(known):
        content = known[digest].read_bytes() + b"\0"
        parts[int(digest[-4:], 16) % 20 == 0].append(content)
        size += len(content)
        if size >= most:
            break
    train, held_out = (torch.frombuffer(bytearray(b"".join(parts[key])), dtype=torch.uint8)
                       for key in (False, True))  # fmt: skip
    return Text(train, held_out)


def batch(data: Tensor, size: Size, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Return inputs and targets: the same for the same seed, whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - size.context - 1, (size.batch, 1), generator=generator)
    places = starts.to(data.device) + torch.arange(size.context + 1, device=data.device)
    chunk = data[places].to(device, torch.int64)
    return chunk[:, :-1], chunk[:, 1:]


# --- training


@dataclass(frozen=True)
class Run:
    """One form, trained at one rate from one seed."""

    form: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.form.replace('/', '_')}_{self.rate:g}_{self.seed}"


def bits_of(model: Model, x: Tensor, y: Tensor) -> Tensor:
    autocast = x.device.type == "cuda"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        scores = model(x)
    return F.cross_entropy(scores.float().flatten(0, 1), y.flatten()) / math.log(2)


def compile_branches(model: Model) -> None:
    """Compile what the steps of the network run: whole layers, or attentions and MLPs."""
    body = model.body
    for part in body.layers if isinstance(body, Residual) else [body]:
        part.compile()


def captured(step: Callable[[], None], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return the step as one CUDA graph. Neither weights nor the optimizer's state change here."""
    before = copy.deepcopy(optimizer.state_dict())
    set_rate(optimizer, 0.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), warnings.catch_warnings():
        # torch warns of steps without a graph. These build kernels and the optimizer's state.
        warnings.simplefilter("ignore")
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    if before["state"]:
        optimizer.load_state_dict(before)
    else:
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            # A captured step reads this tensor.
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def held_out(model: Model, text: Text, size: Size, device: str, batches: int) -> float:
    model.eval()
    found = [
        bits_of(model, *batch(text.held_out, size, 10**9 + i, device)).item()
        for i in range(batches)
    ]
    model.train()
    return statistics.fmean(found)


def train(
    run: Run,
    text: Text,
    options: argparse.Namespace,
    end: float,
    evaluate: Callable[[Model, Text, Size, str, int], float] = held_out,
) -> bool:
    """Train, or go on; return whether the run is complete. It stops at the time `end`."""
    size, device = options.shape, options.device
    folder = options.out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    model = Model(run.form, size, run.seed, options.execution).to(device)
    if options.compile:
        compile_branches(model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    rate: Any = torch.tensor(run.rate, device=device) if options.capture else run.rate
    optimizer = torch.optim.AdamW(
        groups, lr=rate, betas=(0.9, 0.95), capturable=options.capture, fused=device == "cuda"
    )
    curve: list[dict[str, float]] = []
    seconds, first = 0.0, 0
    if (folder / "checkpoint.pt").exists():
        state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, curve = state["step"], state["seconds"], state["curve"]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                 "seconds": seconds, "curve": curve}  # fmt: skip
        torch.save(state, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")

    x, y = batch(text.train, size, 0, device)

    def step_once() -> None:
        optimizer.zero_grad()
        bits_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step_now = captured(step_once, optimizer) if options.capture else step_once
    every = max(1, size.steps // 15)
    started = saved = time.perf_counter()
    for step in range(first, size.steps):
        warm = min(1.0, (step + 1) / (0.05 * size.steps + 1))
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / size.steps)
        set_rate(optimizer, run.rate * warm * (0.05 + 0.95 * cosine))
        now = batch(text.train, size, run.seed * 10**6 + step, device)
        x.copy_(now[0])
        y.copy_(now[1])
        step_now()
        late = time.monotonic() > end
        if late or (step + 1) % every == 0 or step + 1 == size.steps:
            if device == "cuda":
                torch.cuda.synchronize()
            # Evaluation is not counted.
            seconds += time.perf_counter() - started
            if not late or step + 1 == size.steps:
                loss = evaluate(model, text, size, device, options.evaluations)
                curve.append({"step": step + 1, "seconds": seconds, "bits": loss})
            if late or time.perf_counter() > saved + SECONDS_BETWEEN_SAVES:
                save(step + 1)
                saved = time.perf_counter()
            if late and step + 1 < size.steps:
                return False
            started = time.perf_counter()
    for module in model.modules():
        if isinstance(module, revnet.ReversibleCycle | revnet.ReversibleSequence):
            module.check()
    parameters = sum(p.numel() for p in model.parameters())
    last = curve[-1]["bits"]
    result = {"form": run.form, "rate": run.rate, "seed": run.seed, "parameters": parameters,
              "bits": last if math.isfinite(last) else None, "curve": curve}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return True


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]


def best_rate(found: list[dict[str, Any]], form: str, seed: int) -> float | None:
    """Return the rate with the lowest bits at the first seed."""
    tried = [r for r in found if r["form"] == form and r["seed"] == seed and r["bits"] is not None]
    return min(tried, key=lambda r: r["bits"])["rate"] if tried else None


def train_all(text: Text, options: argparse.Namespace) -> bool:
    """Train what is missing: first all forms at all rates, then the other seeds at the best."""
    end = time.monotonic() + 60 * options.minutes
    first = options.first_seed

    def complete(run: Run) -> bool:
        if (options.out / run.name / "result.json").exists():
            return True
        done = time.monotonic() < end and train(run, text, options, end)
        if done:
            write_report(text, options)
        print(run.name, "done" if done else "stopped", flush=True)
        return done

    for form in options.forms:
        for rate in options.rates:
            if not complete(Run(form, rate, first)):
                return False
    for seed in range(first + 1, first + options.seeds):
        for form in options.forms:
            rate = best_rate(results(options.out), form, first)
            if rate is not None and not complete(Run(form, rate, seed)):
                return False
    return True


# --- the report


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float | None, int]:
    """Return the mean difference in percent, half its 95 % interval, and the number of pairs."""
    shared = sorted(ours.keys() & theirs.keys())
    differences = [100 * (ours[seed] / theirs[seed] - 1) for seed in shared]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return mean, None, count
    quantile = STUDENT.get(count, 2.0)
    return mean, quantile * statistics.stdev(differences) / count**0.5, count


def verdict(mean: float, half: float | None, bar: float) -> str:
    if half is None:
        return "one pair decides nothing"
    if mean + half <= bar:
        return f"within {bar} %"
    if mean - half > bar:
        return f"worse than {bar} %"
    return f"too few pairs to decide about {bar} %"


def of_form(found: list[dict[str, Any]], first: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the runs of each form at its best rate, by seed."""
    chosen: dict[str, dict[int, dict[str, Any]]] = {}
    for form in {r["form"]: None for r in found}:
        rate = best_rate(found, form, first)
        chosen[form] = {
            r["seed"]: r
            for r in found
            if r["form"] == form and r["rate"] == rate and r["bits"] is not None
        }
    return {form: runs for form, runs in chosen.items() if runs}


def table(found: list[dict[str, Any]], first: int) -> list[str]:
    chosen = of_form(found, first)
    lines = [
        "| form | bits kept per element and layer | parameters | rate | seeds | bits per byte | "
        "against ordinary, % | seconds | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = {seed: run["bits"] for seed, run in chosen.get("ordinary", {}).items()}
    for form in [form for form in FORMS if form in chosen] + sorted(chosen.keys() - set(FORMS)):
        runs = chosen[form]
        bits = {seed: run["bits"] for seed, run in runs.items()}
        kept = kept_bits(form)
        one = next(iter(runs.values()))
        difference = said = ""
        if form != "ordinary" and base.keys() & bits.keys():
            mean, half, _ = paired(bits, base)
            difference = f"{mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")
            said = verdict(mean, half, BARS[bool(kept)])
            more = one["parameters"] / next(iter(chosen["ordinary"].values()))["parameters"] - 1
            if more > 0.02:
                said = f"{100 * more:.0f} % more parameters: not compared"
        seconds = statistics.median(run["curve"][-1]["seconds"] for run in runs.values())
        lines.append(
            f"| {form} | {'–' if kept is None else f'{kept:g}'} | {one['parameters']:,} | "
            f"{one['rate']:g} | {len(runs)} | {statistics.fmean(bits.values()):.4f} | "
            f"{difference} | {seconds:.0f} | {said} |"
        )
    return lines


def between(found: list[dict[str, Any]], first: int) -> list[str]:
    """Return a table of how much more, in percent, each form has than each other."""
    chosen = {form: runs for form, runs in of_form(found, first).items() if len(runs) > 1}
    chosen = {form: chosen[form] for form in FORMS if form in chosen}
    bits = {
        form: {seed: run["bits"] for seed, run in runs.items()} for form, runs in chosen.items()
    }
    if len(bits) < 2:
        return []
    lines = ["| | " + " | ".join(bits) + " |", "|---|" + "---|" * len(bits)]
    for form in bits:
        cells = []
        for other in bits:
            if form == other or len(bits[form].keys() & bits[other].keys()) < 2:
                cells.append("")
                continue
            mean, half, _ = paired(bits[form], bits[other])
            cells.append(f"{mean:+.2f} ± {half:.2f}")
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return ["", "## Between forms, % of bits per byte more than the column", "", *lines]


def rates(found: list[dict[str, Any]], first: int) -> list[str]:
    by_form: dict[str, dict[float, float | None]] = defaultdict(dict)
    for run in found:
        if run["seed"] == first:
            by_form[run["form"]][run["rate"]] = run["bits"]
    columns = sorted({rate for tried in by_form.values() for rate in tried})
    if len(columns) < 2:
        return []
    lines = ["| form | " + " | ".join(f"{rate:g}" for rate in columns) + " |",
             "|---|" + "---|" * len(columns)]  # fmt: skip
    for form, tried in by_form.items():
        cells = [
            "" if rate not in tried else "NaN" if tried[rate] is None else f"{tried[rate]:.4f}"
            for rate in columns
        ]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return ["", "## Learning rates, at the first seed", "", *lines]


def draw(found: list[dict[str, Any]], size: Size, first: int, path: Path) -> None:
    """Draw the later half of training: held-out bits against tokens and seconds.

    Bands reach from the lowest seed to the highest.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    chosen, lowest, highest = of_form(found, first), math.inf, 0.0
    for form, runs in sorted(chosen.items(), key=lambda item: item[0] != "ordinary"):
        style = {"color": "black", "linestyle": "--"} if form == "ordinary" else {}
        curves = [run["curve"] for run in runs.values()]
        steps = [point["step"] for point in curves[0]]
        at = {step: [p["bits"] for c in curves for p in c if p["step"] == step] for step in steps}
        mean = [statistics.fmean(at[step]) for step in steps]
        seconds = [
            statistics.median([p["seconds"] for c in curves for p in c if p["step"] == step])
            for step in steps
        ]
        seen = [step * size.batch * size.context / 1e6 for step in steps]
        for plot, places in ((left, seen), (right, seconds)):
            (line,) = plot.plot(places, mean, label=form, **style)
            low, high = ([f(at[step]) for step in steps] for f in (min, max))
            plot.fill_between(places, low, high, color=line.get_color(), alpha=0.12, lw=0)
        halfway = mean[len(mean) // 2]
        lowest, highest = min(lowest, min(mean)), max(highest, halfway)
    left.set(xlabel="million bytes seen", ylabel="held-out bits per byte")
    right.set(xlabel="seconds of training")
    margin = 0.05 * (highest - lowest)
    left.set(ylim=(lowest - margin, highest + margin), xlim=(0.45 * seen[-1], 1.02 * seen[-1]))
    right.set(xlim=(0.45 * seconds[-1], None))
    left.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(text: Text, options: argparse.Namespace) -> None:
    found, size = results(options.out), options.shape
    cuda = options.device == "cuda"
    kept = "; the ordinary network keeps its activations" if options.execution == "invert" else ""
    lines = [
        *opening(
            "Does a reversible network learn as well as an ordinary one of equal parameters?",
            options.hardware,
            f"; {'bfloat16 autocast' if cuda else 'float32'}.",
        ),
        f"A language model of bytes: {size.layers} layers, width {size.width}, context "
        f"{size.context}, {size.batch} sequences a step, {size.steps} steps "
        f"({size.steps * size.batch * size.context / 1e6:.1f} million bytes) of the Python sources "
        f"of installed packages: {len(text.train):,} bytes to learn, {len(text.held_out):,} held "
        f"out (sha256 of both begins with {text.digest}). AdamW, cosine decay. Execution: "
        f"{options.execution}{kept}.",
        "",
        "Runs of one seed have the same layers' initial weights and the same batches. Differences "
        "are of paired seeds, with the 95 % interval of their mean by Student's t; the last column "
        "compares its upper end with 0.6 % (no bits kept) or 0.2 %. Seconds are those of training "
        "alone.",
        "",
        *table(found, options.first_seed),
        *between(found, options.first_seed),
        *rates(found, options.first_seed),
        "",
        f"![held-out bits per byte against bytes and seconds]({options.picture})",
    ]
    (options.out / "report.md").write_text("\n".join(lines) + "\n")
    draw(found, size, options.first_seed, options.out / "curves.png")


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="25M" if cuda else "tiny")
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--rates", type=float, nargs="+", help="to try with the first seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--megabytes", type=float, default=400, help="of text, at most")
    parser.add_argument("--evaluations", type=int, default=24, help="held-out batches")
    parser.add_argument("--execution", default="store", choices=("store", "invert", "checkpoint"))
    parser.add_argument("--compile", action="store_true", help="what the steps run")
    parser.add_argument("--capture", action="store_true", help="a training step as a CUDA graph")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which it stops")
    parser.add_argument("--out", type=Path, default=Path("runs/lm"))
    here = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    parser.add_argument("--hardware", default=here, help="as the report names it")
    parser.add_argument("--picture", default="curves.png", help="the name that the report gives it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    given = {key: getattr(options, key) for key in ("layers", "width", "batch", "context", "steps")}
    known = SIZES[options.size]
    options.shape = Size(
        heads=known.heads, rates=known.rates,
        **{key: value or getattr(known, key) for key, value in given.items()},
    )  # fmt: skip
    options.rates = options.rates or list(known.rates)
    text = python_sources(int(options.megabytes * 1e6))
    text = Text(text.train.to(options.device), text.held_out.to(options.device))
    train_all(text, options)
    if results(options.out):
        write_report(text, options)
        print((options.out / "report.md").read_text())


if __name__ == "__main__":
    main()
