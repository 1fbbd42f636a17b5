"""The benchmark of rivals checks what it times, and keeps the rows that fail."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

import revnet

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import rivals
from _models import branches


@pytest.fixture
def work() -> tuple[rivals.Pairs, torch.Tensor]:
    return branches(2, 16), torch.randn(1, 8, 16)


def test_a_report_has_all_ways_and_compares_them(tmp_path: Path):
    given = "--shapes 16x2x16 16x2x32:main 16x2x40:few --rounds 1 --check-tokens 8 --threads 1"
    fixed = ["--device", "cpu", "--hardware", "none", "--budgets"]
    rivals.main([*given.split(), *fixed, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("rivals_16x2_cpu-*.md")
    all_ways, main_ways, few = path.read_text().split("\n## ")[1:]
    rows = [line.split(" | ") for line in all_ways.splitlines() if line.startswith("| ")]
    by_name = {row[0].lstrip("| "): row for row in rows}
    assert by_name["stored"][3] == "1.000"
    for name in ("checkpoint per block", "revnet, fixed streams", "revnet, converted, bits=1"):
        assert by_name[name][9] == "equal in every bit"
    for name in ("revnet, float streams", "revnet, float streams, whole layers"):
        assert float(by_name[name][9]) < 1e-5
    assert all(float(row[10]) < 1e-5 for row in rows[1:] if len(row) > 10)
    assert "not asked for" in by_name["compiled blocks, activation_memory_budget"][2]
    assert "revnet, plan at the peak of: checkpoint per block" in by_name
    for name in ("stored", "checkpoint per block", "revnet, fixed streams"):
        assert f"\n| {name} |" in main_ways
    assert "save_on_cpu" not in main_ways
    assert few.count("\n| ") == 1 + len(rivals.FEW)  # the head and each way
    assert path.with_suffix(".png").exists()


def test_what_is_late_keeps_its_row_and_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = itertools.count()  # it is asked before each piece of work
    monkeypatch.setattr(rivals.time, "monotonic", lambda: next(clock))
    given = f"--shapes 16x2x16 --rounds 1 --check-tokens 8 --minutes {18 / 60} --no-plans"
    options = ["--device", "cpu", "--threads", "1", "--budgets", "--bits"]
    rivals.main([*given.split(), *options, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.md")
    rows = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    assert rows[1][2] == "–"  # no round was run, and the peak is there
    assert float(rows[1][5]) > 0
    assert rivals.LATE in rows[-1][2]


def test_the_networks_have_the_same_parameters_and_differ(
    work: tuple[rivals.Pairs, torch.Tensor],
):
    pairs, x = work
    ordinary, both = rivals.rivals(pairs, "cpu", [])[0], rivals.reversible(pairs)
    found = rivals.gradients(ordinary.run, pairs, x)
    again = rivals.gradients(rivals.Ordinary(pairs), pairs, x)
    assert rivals.difference(found, again) == 0
    assert all(rivals.difference(found, rivals.gradients(way.run, pairs, x)) > 0.1 for way in both)


def test_a_wrong_way_ends_the_benchmark(work: tuple[rivals.Pairs, torch.Tensor]):
    pairs, x = work
    stored = rivals.ordinary(pairs)
    wrong = rivals.Way("wrong", rivals.ORDINARY, lambda x: stored(1.01 * x), stored)
    with pytest.raises(SystemExit, match="wrong: gradients are off by"):
        rivals.compare([wrong], pairs, x, x, math.inf)


def test_a_way_that_fails_keeps_its_row(work: tuple[rivals.Pairs, torch.Tensor]):
    pairs, x = work

    def full(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ways = rivals.rivals(pairs, "cpu", [])[:2]
    ways.append(rivals.Way("full", rivals.ORDINARY, full, rivals.ordinary(pairs)))

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise KeyError

    ways.append(rivals.Way("broken", rivals.ORDINARY, broken, rivals.ordinary(pairs)))
    rivals.compare(ways, pairs, x, x, math.inf)
    for way in ways[:2]:
        rivals.measure(way, x, long=0.0)
    assert list(rivals.run_in_turn(ways, x, rounds=2, long=0.0)) == [0, 1]
    assert [len(way.times) for way in ways] == [1, 1, 0, 0]  # longer than `long`: once
    assert "| full | ordinary | out of memory |" in rivals.table(ways)[-2]
    assert "| broken | ordinary | fails: KeyError:  |" in rivals.table(ways)[-1]


@pytest.mark.parametrize(("products", "evaluated"), [(False, 4), (True, 2)])
def test_what_a_selective_checkpoint_computes_again(
    work: tuple[rivals.Pairs, torch.Tensor], products: bool, evaluated: int
):
    """Of the four matrix products of a block, all or every second one."""
    pairs, x = work
    pairs, counts = pairs[:1], {"aten::mm": 0}
    run = rivals.ordinary(pairs, lambda f, g, x: rivals.selective(f, g, x, products))

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts["aten::mm"] += func is torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    stored = rivals.ordinary(pairs)
    found = []
    for each in (run, stored):
        counts["aten::mm"] = 0
        with Count():
            rivals.gradients(each, pairs, x)
        found.append(counts["aten::mm"])
    # Without the last product of the block, before which early stop ends.
    assert found[0] - found[1] in (evaluated, evaluated - 1)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("save_on_cpu", "cpu"),
        ("checkpoint per block, offloaded", "cpu"),
        # It asks for an accelerator when it is made.
        pytest.param("TRL OffloadActivations", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_offloading_has_the_gradients_of_stored_execution(name: str, device: str):
    pairs, x = branches(2, 16, device=device), torch.randn(1, 8, 16, device=device)
    (way,) = (way for way in rivals.rivals(pairs, device, []) if way.name == name)
    if way.failure:
        pytest.skip(f"{name}: {way.failure}")
    found, expected = (rivals.gradients(run, pairs, x) for run in (way.run, way.stored))
    assert all(map(torch.equal, found, expected))


def test_a_network_by_layer_adds_whole_layers_in_turn():
    pairs, x = branches(3, 16), torch.randn(1, 8, 16)
    found = revnet.ReversibleSequence(rivals.by_layer(pairs), streams="float")(x)
    layers = [lambda x, pair=pair: rivals.residual(*pair, x) - x for pair in pairs[:2]]
    x1 = x + layers[0](x)
    x2 = x + layers[1](x1)
    x1 = x1 + pairs[2][0](x2)  # an odd last layer is two branches
    x2 = x2 + pairs[2][1](x1)
    assert torch.allclose(found, (x1 + x2) / 2, atol=1e-5)
