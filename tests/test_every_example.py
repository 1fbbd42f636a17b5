"""The benchmark of the examples outlives an example that fails, hangs or is killed."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("every_example")


def fails() -> None:
    raise ValueError("no such shape | (2, 3)\nsee above")


@pytest.mark.parametrize(
    ("function", "args", "limit", "message"),
    [
        (fails, (), 60.0, "ValueError: no such shape / (2, 3) see above"),
        (os._exit, (7,), 60.0, "the process ended with exit code 7"),
        (time.sleep, (60,), 0.5, "no result within 0.5 s"),
    ],
    ids=["fails", "dies", "hangs"],
)
def test_a_failure_is_a_row(
    benchmark: Any, function: Any, args: tuple[Any, ...], limit: float, message: str
):
    found = benchmark.apart(function, *args, limit=limit)
    assert isinstance(found, Exception)
    row = benchmark.row("glow", found, 1.25)
    assert row.startswith(f"| glow | {message} |")
    assert row.endswith("| 1.2 |")
    assert row.count("|") == len(benchmark.COLUMNS) + 1


def test_a_report_is_gone_on_with(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    found = {"error": 0.0, "stored_bytes": 2.0**20}
    rows = [benchmark.row("glow", found, 1.0), benchmark.row("moe", ValueError("full"), 2.0)]
    options = argparse.Namespace(full=False, steps=1, hardware="none", threads=1)
    out = tmp_path / "report.md"
    out.write_text("\n".join([*benchmark.head(options), *rows]))
    ran: list[str] = []

    def run(function: Any, name: str, *args: Any, limit: float) -> Any:
        ran.append(name)
        return found

    monkeypatch.setattr(benchmark, "apart", run)
    command = ["every_example.py", "--only", "dit", "glow", "moe", "--hardware", "none"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    benchmark.main()
    assert ran == ["dit", "moe"]
    lines = out.read_text().splitlines()
    names = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert names == ["| example", "| glow", "| dit", "| moe"]
    assert rows[0] in lines
    out.write_text("| example | another column |\n")
    with pytest.raises(SystemExit, match="other columns"):
        benchmark.main()


@pytest.mark.slow
def test_two_examples_are_written_one_after_the_other(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
):
    out = tmp_path / "report.md"
    command = ["every_example.py", "--only", "momentum_net", "rev_gnn", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    benchmark.main()
    text = out.read_text()
    assert capsys.readouterr().out == text
    head, _, *rows = (line for line in text.splitlines() if line.startswith("|"))
    assert [row.split(" | ")[0] for row in rows] == ["| momentum_net", "| rev_gnn"]
    for row in rows:
        cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
        assert float(cells["largest gradient difference"]) < 1e-5
        assert float(cells["kept, inverted, MiB"]) < 0.5 * float(cells["kept, stored, MiB"])
    assert "loss, last" in head
