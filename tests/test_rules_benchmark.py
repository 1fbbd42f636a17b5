"""The benchmark of rules compares them with their formulas before it measures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import rules

SIZE = argparse.Namespace(width=8, rows=16, steps=8)


@pytest.mark.parametrize("rule", rules.RULES)
def test_a_rule_has_its_row(rule: str):
    cells = dict(zip(rules.COLUMNS, rules.row(rule, SIZE).strip("| ").split(" | "), strict=True))
    assert float(cells["float64"]) < 1e-6
    assert cells["fixed: error"] == "0"
    if rule == "Additive":
        streams = 2 * SIZE.rows * SIZE.width * 4
        assert float(cells["floats: MiB"]) == pytest.approx(streams / 2**20, abs=1e-3)


def test_a_wrong_formula_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch):
    right = rules.by_hand
    monkeypatch.setattr(rules, "by_hand", lambda step, streams: 1.01 * right(step, streams))
    with pytest.raises(SystemExit, match="Additive: gradients are off by"):
        rules.row("Additive", SIZE)
