"""Does what `revnet train` leaves behind reach its bars, and what does a cached token cost?

python benchmarks/quality.py digits text generation --threads 2 --out
benchmarks/results/quality_cpu-2core.md python benchmarks/quality.py icons --depth 8 --batch 128
--steps 2500 --dtype bfloat16 --pictures docs

Options that are not listed by --help go to `revnet train`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _race import opening

from revnet.app.data import START
from revnet.app.model import Shape, Transformer
from revnet.app.sample import Sampling, generate

POSITIONS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Bar:
    """What a run's result.json has to say.

    Args:
        data: The words after `revnet train`.
        key: The figure.
        what: What it is.
        bound: Its bar; the figure is to be `below` it, or else at least as large.
        minutes: The time that the run may take.
    """

    data: str
    key: str
    what: str
    bound: float
    below: bool
    minutes: float

    def verdict(self, found: float, seconds: float) -> str:
        reached = found < self.bound if self.below else found >= self.bound
        late = seconds > 60 * self.minutes
        return ("reached" if reached else "missed") + (
            f", but not in {self.minutes:g} min" if late else ""
        )


BARS = {
    "digits": Bar(
        "digits", "read_as_captioned", "digits that a classifier reads as captioned", 0.92, False, 4
    ),
    "text": Bar(
        "stdlib",
        "held_out_bits",
        "bits per byte of the standard library's held-out files",
        2.4,
        True,
        15,
    ),
    "icons": Bar(
        "icons",
        "own_caption_likelier",
        "held-out icons likelier under their own caption",
        0.8,
        False,
        10,
    ),
}


def trained(name: str, given: argparse.Namespace, options: Sequence[str]) -> list[str]:
    """Runs the command; a row of the table, and what stands below it."""
    bar, folder = BARS[name], given.runs / name
    command = ["train", bar.data, "--seed", str(given.seed), "--device", given.device, *options]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "revnet", *command, "--out", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": str(given.threads)},
        check=True,
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = json.loads((folder / "result.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    found = result[bar.key]
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
        for picture in sorted(folder.glob("*.png")) + sorted(folder.glob("samples.txt")):
            shutil.copy(picture, given.pictures / f"{name}-{picture.name}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [
        f"| {row['step']} | {row['seconds'] / 60:.1f} | {row['held_out_bits']:.3f} |"
        for row in rows
        if "held_out_bits" in row
    ]
    sizes = (
        "depth",
        "width",
        "heads",
        "batch",
        "steps",
        "lr",
        "dropout",
        "context",
        "dtype",
        "execution",
    )
    figures = {key: round(value, 4) for key, value in result.items() if key != "memory"}
    return [
        f"## {name}",
        "",
        f"    revnet {' '.join(command)}",
        "",
        "| | found | bar | wall | CPU time | |",
        "|---|---:|---:|---:|---:|---|",
        f"| {bar.what} | {found:.4g} | {'<' if bar.below else '≥'} {bar.bound:g} | "
        f"{seconds / 60:.1f} min | {busy / 60:.1f} min | {bar.verdict(found, seconds)} |",
        "",
        f"{', '.join(f'{key} {config[key]}' for key in sizes)}.",
        "",
        f"At the end: {', '.join(f'{key} {value}' for key, value in figures.items())}.",
        "",
        "| steps | minutes | held-out bits per token |",
        "|---:|---:|---:|",
        *curve,
        "",
    ]


def generation(given: argparse.Namespace) -> list[str]:
    """What the next token of one text costs at each place, and whether the cache changes any."""
    # One thread's CPU time says the same on a busy machine.
    torch.set_num_threads(1)
    lines = [
        "## generation",
        "",
        "CPU time of one more token after so many, batch 1, width 192, float32, one thread, with "
        "the keys and values of the tokens before it and without; medians of 20.",
        "",
        "| depth | | " + " | ".join(f"{position} tokens" for position in POSITIONS) + " |",
        "|---:|---|" + "---:|" * len(POSITIONS),
    ]
    same = []
    for depth in (4, 8, 16):
        torch.manual_seed(given.seed)
        model = Transformer(Shape(depth, 192, 6, START + 1, 1, 256, max(POSITIONS) + 1, 1)).eval()
        torch.nn.init.normal_(model.head.weight, std=0.1)
        prefix, tokens = torch.full((1, 1), START), torch.randint(256, (1, max(POSITIONS)))
        times = {True: [], False: []}
        for position in POSITIONS:
            for cached, found in times.items():
                found.append(
                    statistics.median(next_token(model, prefix, tokens[:, :position], cached, 20))
                )
        for cached, found in times.items():
            cells = " | ".join(f"{seconds * 1000:.1f} ms" for seconds in found)
            lines.append(f"| {depth} | {'cached' if cached else 'uncached'} | {cells} |")
        drawn = [
            generate(model, prefix, tokens[:, :1], 257, Sampling(seed=given.seed, cache=c))
            for c in (True, False)
        ]
        same.append(torch.equal(*drawn))
    lines += ["", f"256 tokens drawn with the cache equal those drawn without it: {same}.", ""]
    return lines


@torch.no_grad()
def next_token(
    model: Transformer, prefix: torch.Tensor, tokens: torch.Tensor, cached: bool, count: int
) -> list[float]:
    """Seconds of the call that predicts what comes after `tokens`."""
    before: dict = {}
    if cached:
        model(prefix, tokens[:, :-1], cache=before)
    found = []
    for _ in range(count):
        cache = dict(before) if cached else None
        start = time.process_time()
        model(prefix, tokens, cache=cache)
        found.append(time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Does what `revnet train` leaves behind reach its bars?"
    )
    names = [*BARS, "generation"]
    parser.add_argument(
        "questions", nargs="+", choices=names, metavar="QUESTION", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the runs")
    parser.add_argument("--device", default="auto", help="of the runs")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    parser.add_argument(
        "--pictures", type=Path, help="a folder for a copy of the pictures and texts"
    )
    parser.add_argument("--out", type=Path, help="a file for the report")
    given, options = parser.parse_known_args()
    given.runs = given.runs or Path(tempfile.mkdtemp(prefix="quality-"))
    on_cpu = given.device == "cpu" or not torch.cuda.is_available()
    hardware = f"a CPU ({platform.machine()})" if on_cpu else torch.cuda.get_device_name()
    lines = [
        *opening(
            "What the trained networks are worth",
            hardware,
            f", CPU threads: {given.threads}, seed {given.seed}.",
        ),
        "Wall and CPU time are those of the whole command: start, data, training, validations, "
        "samples and pictures.",
        "",
    ]
    for name in given.questions:
        lines += generation(given) if name == "generation" else trained(name, given, options)
        # After each: a later one that fails must not take the others with it.
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
