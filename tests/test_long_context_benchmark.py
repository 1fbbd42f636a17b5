"""The benchmark of long contexts: its arms have right gradients, its arithmetic is the docs'."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    path, before = ROOT / "benchmarks" / "long_context.py", list(sys.path)
    # Examples and ecosystem have a `common` each.
    common = sys.modules.pop("common", None)
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("long_context_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    sys.modules.pop("common", None)
    if common is not None:
        sys.modules["common"] = common


def test_every_arm_has_the_gradients_of_stored_execution(benchmark: Any):
    for arm in benchmark.ARMS:
        if not benchmark.missing(arm):
            assert benchmark.examine(arm, "cpu") <= 1e-10, arm


def test_an_arm_is_measured(benchmark: Any):
    row = benchmark.row("reversible, fixed", "small", 1, 300, 1, "cpu")
    assert row.startswith("| reversible, fixed | 1 | 300 | 0.0")


def test_memory_for_the_blocks_that_do_not_run_is_that_of_their_weights(benchmark: Any):
    one, both = (
        benchmark.made("reversible, fixed", "small", n, "cpu", torch.bfloat16) for n in (1, 2)
    )
    weights = [sum(p.nbytes for p in model.parameters()) for model in (one, both)]
    for sgd, copies in ((True, 1), (False, 2)):
        held = benchmark.ballast(one, "small", sgd)
        assert held.nbytes == copies * (weights[1] - weights[0])
        assert benchmark.ballast(both, "small", sgd).nbytes == 0


def test_a_parameter_that_backward_updates_keeps_no_gradient(benchmark: Any):
    model = benchmark.made("reversible, fixed", "small", 1, "cpu", torch.bfloat16)
    benchmark.fill_gradients(model, sgd=True)
    before = [p.detach().clone() for p in model.parameters()]
    (1e6 * model(benchmark.text_for(300, "small", "cpu"))).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_report_is_written_row_by_row(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "report.md"
    arms, found = list(benchmark.ARMS)[:2], []

    def row(arm: str, *_: Any) -> str:
        found.append(out.read_text())
        if arm == arms[1]:
            raise KeyboardInterrupt
        return f"| {arm} | measured |"

    monkeypatch.setattr(benchmark, "row", row)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(["--device", "cpu", "--arms", *arms, "--out", str(out)])
    assert "| measured |" not in found[0]
    assert out.read_text().endswith(f"| {arms[0]} | measured |\n")


def test_the_arithmetic_is_that_of_the_page(benchmark: Any):
    text = (ROOT / "docs" / "long_context.md").read_text()
    for streams, eight, one in (("fixed", 25.5, 40), ("float", 17.5, 32)):
        assert benchmark._bytes.reversible(streams, 8, 1.0) == eight
        assert benchmark._bytes.reversible(streams, 1, 1.0) == one
        assert f"{eight}" in text
        assert f"{one}" in text
