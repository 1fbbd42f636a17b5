"""Do the program's own sets want another form of the network?

    python benchmarks/quality_layers.py --threads 1 --out runs/layers
    python benchmarks/quality_layers.py --sets text --forms ordinary momentum-1/8 --seed 0 1 2

`revnet train` learns digits and text with its network in another form: `branch` is that of the
program, f an attention and g an MLP; `ordinary` the ordinary residual network of the same
attentions and MLPs; `layer`, `cycle-3` and `momentum-1/8` are those of `quality_lm.py` by whole
layers. Initial weights, batches and learning rate are those of the program. Each run is a folder in
--out, and a benchmark that was ended goes on behind the runs that are complete.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from _race import opening
from quality_lm import Layer, Residual, momentum
from torch import nn

import revnet
from revnet.app import model, report, training
from revnet.app.cli import main as program

FORMS = ("ordinary", "branch", "layer", "cycle-3", "momentum-1/8")
SETS = {"digits": ("digits",), "text": ("stdlib", "--steps", "900")}
# Of result.json, and `last`, that of the last validation.
FIGURES = {
    "digits": (("read_as_captioned", "read as captioned"), ("last", "held-out bits per token")),
    "text": (("held_out_bits", "held-out bits per byte"),),
}


class Ordinary(Residual):
    """The ordinary network in the place of a sequence, whose execution the program reads."""

    execution = "store"


def body(form: str, pairs: Iterable[tuple[nn.Module, nn.Module]], **options: Any) -> nn.Module:
    """Build one form of the network from the program's attentions and MLPs."""
    if form == "branch":
        return revnet.ReversibleSequence(pairs, **options)
    layers = [Layer(*pair) for pair in pairs]
    if form == "ordinary":
        return Ordinary(layers, checkpointed=False)
    routes = options.pop("args_route")
    if form.startswith("cycle"):
        return revnet.ReversibleCycle(
            layers, int(form.split("-")[1]), args_route=dict.fromkeys(routes, True), **options
        )
    options["args_route"] = dict.fromkeys(routes, (True, True))
    if form.startswith("momentum"):
        options |= momentum(form)
    return revnet.ReversibleSequence(zip(layers[::2], layers[1::2], strict=True), **options)


@contextlib.contextmanager
def in_the_form_of(build: Callable[..., nn.Module]) -> Iterator[None]:
    """Let the program build another network, and leave out what it says of a sequence alone."""
    with (
        patch.object(model, "revnet", SimpleNamespace(ReversibleSequence=build)),
        patch.object(report, "executed", lambda *_: contextlib.nullcontext()),
        patch.object(training, "reconstruction_error", lambda *_: 0.0),
    ):
        yield


def trained(form: str, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the program says at the end of a run, and the CPU minutes that it took."""
    folder = options.out / f"{name}_{form.replace('/', '_')}_{seed}"
    found = folder / "quality_layers.json"
    if not found.exists():
        given = ["--seed", str(seed), "--device", "cpu", "--threads", str(options.threads)]
        build: Callable[..., nn.Module] = partial(body, form)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        with in_the_form_of(build):
            code = program(["train", *SETS[name], *given, "--out", str(folder)])
        if code:
            raise SystemExit(f"{form}, {name}: the program ended with {code}")
        minutes = (resource.getrusage(resource.RUSAGE_SELF).ru_utime - before) / 60
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        last = [row["held_out_bits"] for row in rows if "held_out_bits" in row][-1]
        result = json.loads((folder / "result.json").read_text())
        found.write_text(json.dumps({**result, "minutes": minutes, "last": last}))
    known: dict[str, Any] = json.loads(found.read_text())
    return known


def table(runs: dict[tuple[str, str], list[dict[str, Any]]], options: argparse.Namespace) -> str:
    names = [name for name in options.sets if any(key[1] == name for key in runs)]
    columns = [f"{name}: {what}" for name in names for _, what in FIGURES[name]]
    lines = [
        *opening("Do the program's own sets want another form?", options.hardware, "; float32."),
        f"`revnet train`, seeds {', '.join(map(str, options.seed))}, {options.threads} thread(s); "
        "means. `branch` is the program's form.",
        "",
        "| form | " + " | ".join(columns) + " | CPU minutes |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for form in options.forms:
        cells = [
            f"{statistics.fmean(run[key] for run in runs[form, name]):.4f}"
            if (form, name) in runs else ""
            for name in names for key, _ in FIGURES[name]
        ]  # fmt: skip
        minutes = [run["minutes"] for name in names for run in runs.get((form, name), ())]
        if minutes:
            lines.append(f"| {form} | {' | '.join(cells)} | {sum(minutes):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/layers"))
    parser.add_argument(
        "--hardware", default=f"{os.cpu_count()} CPU cores", help="as reports name it"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in options.sets:
        for form in options.forms:
            for seed in options.seed:
                runs.setdefault((form, name), []).append(trained(form, name, seed, options))
            (options.out / "report.md").write_text(table(runs, options))
    print((options.out / "report.md").read_text())


if __name__ == "__main__":
    main()
