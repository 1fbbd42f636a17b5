"""The benchmark of long contexts: its arms have right gradients, its arithmetic is the docs'."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    path, before = ROOT / "benchmarks" / "long_context.py", list(sys.path)
    # Examples and ecosystem have a `common` each.
    common = sys.modules.pop("common", None)
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


def test_the_arithmetic_is_that_of_the_page(benchmark: Any):
    text = (ROOT / "docs" / "long_context.md").read_text()
    for streams, eight, one in (("fixed", 25.5, 40), ("float", 17.5, 32)):
        assert benchmark.arithmetic(streams, 8, 1.0) == eight
        assert benchmark.arithmetic(streams, 1, 1.0) == one
        assert f"{eight}" in text
        assert f"{one}" in text
