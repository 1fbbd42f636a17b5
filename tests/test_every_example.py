"""The benchmark of the examples outlives an example that fails, hangs or is killed."""

from __future__ import annotations

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
